"""Variance a second: of gradients laid by hand, and of a run's own."""

import json
import math
import sys

import pytest
import torch

from diffrl.benchmarks import gradients
from diffrl.errors import DiffRLError
from diffrl.restore import restore


def test_a_row_s_price_is_variance_times_seconds_over_the_first_row_s():
    steady = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # variance 2
    noisy = torch.tensor([[0.0, 5.0], [0.0, 1.0]])  # variance 8, at right angles
    first, second = gradients.compared(["a", "b"], [steady, noisy], [[2.0, 2.0, 9.0], [1.0, 1.0]])
    assert (first["variance"], first["seconds"], first["variance_seconds"]) == (2.0, 2.0, 1.0)
    assert (second["variance"], second["variance_seconds"], second["mean"]) == (8.0, 2.0, 0.0)
    assert second["noise"] == pytest.approx(math.sqrt(8) / 3)
    assert second["error"] == 0  # two gradients lie equally far from their mean
    uneven = torch.tensor([[0.0], [0.0], [3.0]])  # squares from the mean, times 3/2: 1.5, 1.5, 6
    (row,) = gradients.compared(["c"], [uneven], [[1.0]])
    assert row["variance"] == pytest.approx(3)
    assert row["error"] == pytest.approx(math.sqrt(6.75 / 3) / 3)


def test_the_gradient_is_that_of_a_batch_and_leaves_the_weights(learnt_run):
    setup, policy, reward = restore(learnt_run, {})
    algo = setup.config.algo
    parameters = [*policy.lora_parameters(), *policy.embedding_parameters()]
    before = [p.detach().clone() for p in parameters]
    algo.max_grad_norm = math.inf
    env = setup.make_env(reward, algo.micro_batch_size)
    found = gradients.gradient(setup, policy, env, algo, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert all(p.grad is None for p in parameters)

    losses = []
    for part in range(algo.batch_size // algo.micro_batch_size):
        env.reset(seed=setup.seed(gradients._EPISODES, 3, part))
        drawn = algo.collect(env, policy, setup.generator(gradients._ACTIONS, 3, part))
        losses.append((drawn.kl.sum(0) / algo.gamma - drawn.reward).mean())
    exact = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in exact]), rtol=1e-4, atol=1e-7)
    assert not torch.equal(found, gradients.gradient(setup, policy, env, algo, 4))


def test_the_command_prints_a_row_for_each_and_stores_them(learnt_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "g.json"
    rows = ["algo.kl_steps=1", "algo.kl_steps=2+algo.truncation.count=1"]
    monkeypatch.setattr(sys, "argv", ["x", str(learnt_run), *rows, "--rounds", "2", "--out", str(out)])
    assert gradients.main() == 0
    stored = json.loads(out.read_text())
    assert [row["settings"] for row in stored["rows"]] == rows
    assert [row["rounds"] for row in stored["rows"]] == [2, 2]
    assert stored["rows"][0]["mean"] == pytest.approx(1)
    assert "variance x seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "rounds", "why"),
    [
        ("seed=1", 2, "no setting of the algorithm"),
        ("algo.batch_size=8", 2, "leave it out"),
        ("algo.kl_steps=1", 1, "2 or more"),
        ("algo.kl_budget=5", 2, "without a KL budget"),
    ],
)
def test_what_cannot_be_compared_is_refused(learnt_run, word, rounds, why):
    with pytest.raises(DiffRLError, match=why):
        gradients.measure(learnt_run, [word], rounds)
