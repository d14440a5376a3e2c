"""A KL that is to come to a budget: the controller by hand, then each algorithm where the end is known."""

import json
import math
from statistics import fmean

import pytest
import torch
from conftest import assert_close
from test_cli import fails
from toy import ToyEnv, ToyPolicy, objective

from diffrl.algorithms.ctrl import CTRL
from diffrl.algorithms.ddpo import DDPO
from diffrl.algorithms.kl_budget import KLBudget
from diffrl.algorithms.reward_backprop import RewardBackprop
from diffrl.algorithms.truncation import Truncation
from diffrl.cli import main


def test_the_weight_s_steps_by_hand():
    """Budget 10: 1 + .1 times the relative error, which is at most .2 either way."""
    table = [
        (11, 1.01),
        (10, 1.0),
        (9.5, 0.995),
        (0, 0.98),
        (8, 0.98),
        (12, 1.02),
        (1e6, 1.02),
        (math.nan, 1),
    ]
    for kl, step in table:
        budget = KLBudget(10.0, 0.5)
        assert budget.learn(kl) == {"train/kl_weight": 0.5}
        assert_close(budget.learn(10.0)["train/kl_weight"], 0.5 * step, atol=1e-12)


def test_without_a_budget_the_weight_stays_and_nothing_is_told():
    budget = KLBudget(None, 0.5)
    assert budget.learn(100.0) == {}
    assert (budget.factor, budget.state_dict()) == (1.0, {})


def test_its_state_is_taken_up():
    budget, other = KLBudget(10.0, 0.5), KLBudget(10.0, 0.5)
    budget.learn(11.0)
    other.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert other.factor == budget.factor == 1.01


BUDGET, BATCH = 1.0, {"batch_size": 64, "micro_batch_size": 64, "max_grad_norm": 1e9}
EXACT = BATCH | {"kl_steps": None, "truncation": Truncation(kind="fixed", low=0, path="network")}
SUM = BATCH | {"log_prob_reduction": "sum", "clip_range": 0.2, "minibatches": 1, "per_prompt": False}
STARTS = {
    "ctrl, too weak": lambda: CTRL(gamma=50.0, kl_budget=BUDGET, **EXACT),
    "ctrl, too strong": lambda: CTRL(gamma=1.0, kl_budget=BUDGET, **EXACT),
    "reward_backprop": lambda: RewardBackprop(kl=0.05, kl_budget=BUDGET, **EXACT),
    "ddpo": lambda: DDPO(kl=0.1, kl_budget=BUDGET, **SUM),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_kl_comes_to_the_budget_and_the_weight_to_its_multiplier(name):
    """On the toy chain KL = theta^2 sum kappa: at the budget theta is known, and w = E[r]' / KL' there."""
    algorithm, policy = STARTS[name](), ToyPolicy(num_labels=1)
    env = ToyEnv(policy.schedule, 64, num_labels=1)
    optimizer = torch.optim.SGD([policy.theta], lr=0.005)
    generator, thetas, weights = torch.Generator().manual_seed(0), [], []
    torch.manual_seed(0)
    for _ in range(220):
        metrics = algorithm.update([algorithm.collect(env, policy, generator)], policy, optimizer)
        thetas.append(policy.theta.item())
        weights.append(metrics["train/kl_weight"])
    kappa = float(policy.schedule.kappa.sum())
    assert_close(fmean(theta**2 for theta in thetas[-100:]) * kappa, BUDGET, atol=0.1)
    probe = ToyPolicy(num_labels=1)
    assert max(thetas[-100:]) < 0  # x_0 falls with theta, and its best mean is above 0
    probe.theta.data = torch.tensor([-((BUDGET / kappa) ** 0.5)]).double()
    slope = torch.autograd.grad(objective(probe).sum(), probe.theta)[0]
    assert_close(fmean(weights[-100:]), float(slope / (2 * probe.theta.detach() * kappa)), atol=0.02)


def test_on_the_solvable_model_the_exact_kl_ends_near_the_budget(tmp_path, hasty):
    """The posterior, gamma 1, is .5 nats away or more: half of that takes more than its weight of 1."""
    words = ["env.num_steps=8", "algo.updates=100", "algo.batch_size=64", "algo.micro_batch_size=64"]
    words += ["algo.gamma=1", "algo.kl_budget=0.25", f"root={tmp_path}", "name=run", "eval_every=100"]
    assert main(["train", "env=gaussian_mixture", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert_close(lines[-1]["exact/kl_nats"], 0.25, atol=0.03)
    assert max(line.get("rollout/kl", 0) for line in lines) > 0.5
    assert [line["train/kl_weight"] for line in lines if "train/kl_weight" in line][-1] > 1.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.kl_budget=0"], "algo.kl_budget=0.0: must be positive, or null for none"),
        (["algo=ddpo", "algo.kl_budget=9"], "algo.kl_budget=9.0 algo.kl=0.0: it adapts the KL's weight"),
        (["algo=reward_backprop", "algo.kl_budget=9"], "and 0 stays 0; give algo.kl=0.001"),
        (["algo.gamma=0"], "algo.gamma=0.0: must be positive"),
    ],
)
def test_mistakes_are_named(words, said, capsys):
    assert said in fails(capsys, "train", *words)
