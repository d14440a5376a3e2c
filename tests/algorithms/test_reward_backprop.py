import pytest
import torch
from conftest import assert_close
from toy import Recorder, ToyEnv, ToyPolicy, linear_gain, objective

from diffrl.algorithms.reward_backprop import RewardBackprop
from diffrl.algorithms.truncation import Truncation
from diffrl.errors import DiffRLError


def gradient(algorithm, policy, seed=0):
    labels = len(policy.theta)
    env = ToyEnv(policy.schedule, algorithm.batch_size, num_labels=labels, num_dims=policy.num_dims)
    batch = algorithm.collect(env, policy, torch.Generator().manual_seed(seed))
    recorder = Recorder(policy)
    algorithm.update([batch], policy, recorder)
    return recorder.gradients[0], batch


def sized(number, **settings):
    return RewardBackprop(batch_size=number, micro_batch_size=number, max_grad_norm=1e9, **settings)


FULL = Truncation(kind="fixed", low=0, path="network")


@pytest.mark.parametrize(("kl", "reduction"), [(0.0, "sum"), (0.3, "sum"), (0.3, "mean")])
def test_full_back_propagation_is_the_gradient_of_the_closed_form_objective(kl, reduction):
    policy = ToyPolicy(num_dims=3)
    weight = kl / 3 if reduction == "mean" else kl  # of the sum over dims
    truth = torch.autograd.grad(objective(policy, weight).mean(), policy.theta)[0]
    algorithm = sized(20_000, truncation=FULL, kl=kl, kl_reduction=reduction, kl_steps=None)
    found = torch.stack([-gradient(algorithm, policy, seed)[0] for seed in range(5)])
    error = found.std(0) / 5**0.5
    assert ((found.mean(0) - truth).abs() < 4 * error + 1e-9).all()
    assert (error < 0.05 * truth.abs()).all()


def test_draft_k_differentiates_the_last_k_steps_alone():
    """d(-(x_0 - 1)^2)/dtheta through steps T-K, ..., T-1 only, by the chain rule written out."""
    policy = ToyPolicy(num_labels=1)
    schedule = policy.schedule
    for k in (1, 2, 4):
        algorithm = sized(16, truncation=Truncation(kind="last", count=k, path="network"))
        found, batch = gradient(algorithm, policy)
        path, slope = 1.0, 0.0
        for i in reversed(range(4 - k, 4)):
            slope += path * float(schedule.eps_gain[i])
            path *= float(linear_gain(schedule)[i])
        x_0 = batch.latents[-1].flatten()
        assert_close(found[0], (2 * (x_0 - 1) * slope).mean(), atol=1e-9)


def test_draft_lv_averages_re_noised_last_steps():
    """Same x_0, n fresh noises: the gradient is the mean over them of the last step's."""
    policy = ToyPolicy(num_labels=1)
    policy.schedule.sigma.zero_()  # DRaFT samples at eta = 0: no noise of the step itself
    schedule, count = policy.schedule, 3
    found, batch = gradient(sized(8, variance_samples=count), policy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        torch.randn(8, 1, 1, 1, generator=generator, dtype=torch.float64)  # the rollout's draws
    x_0, total = batch.latents[-1], 0.0
    for _ in range(count):
        noise = torch.randn(8, 1, 1, 1, generator=generator).double()
        torch.randn(8, 1, 1, 1, generator=generator, dtype=torch.float64)
        a = schedule.alpha_bar[-1]
        x_1 = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        again = linear_gain(schedule)[-1] * x_1 + schedule.eps_gain[-1] * policy.theta.detach()
        total += float((2 * (again - 1) * schedule.eps_gain[-1]).mean()) / count
    assert_close(found[0], total, atol=1e-9)


def test_without_a_kl_training_goes_past_the_regularised_optimum():
    ends = {}
    for kl in (0.0, 0.5):
        policy = ToyPolicy(num_labels=1)
        algorithm = sized(256, truncation=FULL, kl=kl, kl_steps=None)
        optimizer = torch.optim.Adam([policy.theta], lr=0.05)
        env, generator = ToyEnv(policy.schedule, 256, num_labels=1), torch.Generator().manual_seed(0)
        for _ in range(150):
            algorithm.update([algorithm.collect(env, policy, generator)], policy, optimizer)
        ends[kl] = float(policy.theta.detach())
    assert ends[0.0] < 2 * ends[0.5] < 0  # x_0 falls with theta: towards 1, and past the optimum


@pytest.mark.parametrize(
    "settings", [{"kl": -1.0}, {"variance_samples": -1}, {"variance_samples": 2, "kl": 1.0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DiffRLError, match=rf"algo\.{next(iter(settings))}"):
        RewardBackprop(**settings)
