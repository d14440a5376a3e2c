"""A KL from some of its steps: what is measured, at which weight, and that its mean is the whole one."""

import pytest
import torch
from conftest import assert_close
from test_ctrl import make

from diffrl.algorithms.ctrl import CTRL
from diffrl.algorithms.truncation import Truncation

KAPPA = torch.tensor([1.0, 2.0, 3.0, 4.0])
ALL = Truncation(kind="fixed", low=0, path="network")


def weights(kl_steps, chances, factors=None, draws=4000):
    algorithm = CTRL(kl_steps=kl_steps, truncation=ALL)
    generator = torch.Generator().manual_seed(0)
    own = factors or [float(chance > 0) for chance in chances]
    return torch.tensor([algorithm._kl_weights(KAPPA, own, chances, generator) for _ in range(draws)])


@pytest.mark.parametrize("kl_steps", [1, 3])
def test_of_a_chain_that_is_kept_whole_so_many_steps_are_measured(kl_steps):
    drawn = weights(kl_steps, [1.0] * 4)
    assert ((drawn > 0).sum(1) <= kl_steps).all()
    assert_close(drawn.mean(0), torch.ones(4), atol=0.15)  # 3 standard errors of the rarest with one step
    once = drawn[(drawn > 0).sum(1) == 1]
    assert_close(once.max(1).values, 10.0 / KAPPA[once.argmax(1)], atol=1e-4)  # one over its share


def test_kept_steps_are_measured_and_the_others_stand_for_those_never_kept():
    drawn = weights(1, [0.5, 0.5, 0.0, 0.0], factors=[2.0, 0.0, 0.0, 0.0])
    assert (drawn[:, :2] == torch.tensor([2.0, 0.0])).all()
    assert ((drawn[:, 2:] > 0).sum(1) == 1).all()
    assert_close(drawn[:, 2:].mean(0), torch.ones(2), atol=0.1)


def test_the_exact_gradient_has_the_whole_kl_for_its_mean_at_fewer_calls(tiny):
    """The expectation over the one step drawn, in value and gradient, and the calls of one draw."""
    policy, env = make(tiny)

    def value_and_gradient(kl_steps, chosen=None):
        algorithm = CTRL(gamma=3.0, kl_steps=kl_steps, truncation=ALL)
        share = policy.schedule.kappa / policy.schedule.kappa.sum()
        if chosen is not None:
            algorithm._kl_weights = lambda *_: [(i == chosen) / float(share[i]) for i in range(4)]
        env.reset(seed=5)
        calls = policy.num_calls
        trajectory = algorithm.collect(env, policy, torch.Generator().manual_seed(5))
        kl = trajectory.kl.sum(0).mean()
        gradient = torch.autograd.grad((trajectory.reward - kl / 3).sum(), policy.lora_parameters())
        found = torch.cat([kl.detach()[None], *(g.flatten() for g in gradient)])
        return found * (1.0 if chosen is None else float(share[chosen])), policy.num_calls - calls

    whole, all_calls = value_and_gradient(None)
    parts, calls = zip(*(value_and_gradient(1, chosen) for chosen in range(4)), strict=True)
    assert_close(torch.stack(parts).sum(0), whole, atol=1e-12, rtol=1e-6)
    _, drawn_calls = value_and_gradient(1)
    each = env.num_envs * policy.calls_per_step
    assert all_calls == 8 * each
    assert {drawn_calls, *calls} == {5 * each}
