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


def test_of_a_law_off_the_grid_nothing_is_said_to_be_exact(tmp_path, hasty, capsys):
    words = [*BACKPROP, "algo.updates=40", "env.num_steps=10", f"root={tmp_path}", "name=run"]
    words += ["eval_every=1000", "keep_best=exact/tv"]
    assert main(["train", "env=gaussian_mixture", *words]) == 0
    assert "leaves the grid, 6 to either side of 0" in " ".join(capsys.readouterr().out.split())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, far, kept = (line for line in lines if "exact/gap_nats" in line)
    assert far["exact/off_grid"] > 0.05
    assert far["exact/gap_nats"] is far["exact/tv"] is far["exact/tv_per_label"] is None
    assert kept["exact/tv"] == first["exact/tv"]  # the run keeps the weights of which something is known
