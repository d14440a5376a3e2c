"""Without a KL an algorithm goes past the target: on the solvable model, where both are known exactly."""

import json

import pytest

from diffrl.cli import main

DDPO = ["algo=ddpo", "algo.kl=0", "algo.updates=15", "algo.batch_size=256", "algo.micro_batch_size=256"]
DDPO += ["algo.minibatches=4", "algo.learning_rate=0.02", "algo.embedding_learning_rate=0.2"]
BACKPROP = ["algo=reward_backprop", "algo.updates=14", "algo.batch_size=64", "algo.micro_batch_size=64"]


@pytest.mark.parametrize("words", [DDPO, BACKPROP], ids=["ddpo", "reward_backprop"])
def test_the_reward_ends_above_the_target_s_and_the_law_is_narrower(words, tmp_path, hasty):
    words = [*words, "env.num_steps=10", "eval_every=1000", f"root={tmp_path}", "name=run"]
    assert main(["train", "env=gaussian_mixture", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if "exact/gap_nats" in line)
    assert first["exact/log_prob"] < first["exact/target_log_prob"] < last["exact/log_prob"]
    assert first["exact/target_log_prob"] == last["exact/target_log_prob"]
    assert last["exact/width"] < 1 < first["exact/width"]
    assert last["exact/off_grid"] < 0.1  # the law is not narrow for lying at the grid's edge
