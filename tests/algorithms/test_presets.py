"""Each preset, its sizes aside: one update on fixed tensors against the gradient derived by hand; d = 3."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_close
from test_classifier_free import collected
from toy import Recorder, ToyEnv, ToyPolicy, linear_gain

import diffrl.conf
from diffrl import config

FOLDER = Path(diffrl.conf.__file__).parent / "experiment"


def algorithm(preset, *words):
    settings = ["algo.batch_size=8", "algo.micro_batch_size=8", "algo.max_grad_norm=1e9", *words]
    return config.load([f"+experiment={preset}", *settings]).algo


def one_update(algo, num_steps, seed=0):
    policy = ToyPolicy(num_steps, num_labels=1, num_dims=3)
    env = ToyEnv(policy.schedule, 8, num_labels=1, num_dims=3)
    batch = algo.collect(env, policy, torch.Generator().manual_seed(seed))
    recorder = Recorder(policy)
    torch.manual_seed(seed)
    algo.update([batch], policy, recorder)
    (gradient,) = recorder.gradients
    return float(gradient[0]), batch, policy.schedule, float(policy.theta.detach()[0])


def score(batch, schedule, theta, t):
    """d log p(x_{t-1} | x_t) / d theta at step t, log p a mean over dims, [N]."""
    mean = linear_gain(schedule)[t] * batch.latents[t] + schedule.eps_gain[t] * theta
    of_each_dim = (batch.latents[t + 1] - mean) / schedule.sigma[t] ** 2 * schedule.eps_gain[t]
    return of_each_dim.flatten(1).mean(1)


def test_ddpo_pytorch():
    """-1/(B T) sum A grad log p, the advantages of the batch while a prompt has fewer than 16 rewards."""
    gradient, batch, schedule, theta = one_update(algorithm("ddpo_pytorch", "algo.minibatches=1"), 5)
    reward = batch.reward
    advantage = ((reward - reward.mean()) / reward.std(unbiased=False)).clamp(-5, 5)
    by_hand = -torch.stack([advantage * score(batch, schedule, theta, t) for t in range(5)]).mean()
    assert_close(gradient, by_hand, atol=0, rtol=1e-6)


@pytest.mark.parametrize("preset", ["rwr_paper", "rwr_sparse_paper"])
def test_rwr_paper(preset):
    """2 E[2 w (2 theta - noise)], as guided: w = N softmax(r / 5), or 1 for the best tenth."""
    gradient, batch, _, theta = one_update(algorithm(preset, "algo.epochs=1", "algo.fit_batch_size=8"), 5)
    if preset == "rwr_paper":
        weight = 8 * (batch.reward / 5).softmax(0)
    else:
        weight = torch.zeros(8, dtype=torch.float64)
        weight[batch.reward.argmax()] = 1
    kept = weight.nonzero()[:, 0]
    torch.manual_seed(0)
    torch.rand(len(kept), 1)  # deals them into one minibatch
    torch.randint(1000, (len(kept),))
    noise = torch.randn(len(kept), 3, 1, 1).flatten(1).mean(1)
    by_hand = (2 * 2 * weight[kept] * (2 * theta - noise)).mean()
    assert_close(gradient, by_hand, atol=0, rtol=1e-6)


def path_slope(schedule, kept):
    """d x_0 / d theta: through the network where a step is kept, along x_gain alone where it is cut."""
    path, slope = 1.0, 0.0
    for t in reversed(range(schedule.num_steps)):
        slope += path * float(schedule.eps_gain[t]) * kept[t]
        path *= float(linear_gain(schedule)[t] if kept[t] else schedule.x_gain[t])
    return slope


def test_alignprop():
    """-E[dr/dx_0] times the slope through the last T - K steps, one K for the whole batch."""
    algo = algorithm("alignprop")
    gradient, batch, schedule, _ = one_update(algo, 50)
    kept = algo.truncation.kept(50, torch.Generator().manual_seed(0))
    assert sorted(kept) == kept
    assert 1 <= sum(kept) <= 49
    x_0 = batch.latents[-1].flatten()
    assert_close(gradient, (2 * (x_0 - 1)).mean() * path_slope(schedule, kept), atol=0, rtol=1e-5)


def test_classifier_free_paper():
    """2 E[(theta_y - noise) 1_y] on every picture, nothing left out, no guidance; sampled as published."""
    settings = config.load(["+experiment=classifier_free_paper"])
    algo = settings.algo
    assert (algo.drop_label, algo.drop_prompt, algo.batch_size * algo.updates) == (0, 0, 10_240)
    assert (settings.guidance.published, settings.guidance.scale, settings.env.eta) == (True, 1.0, 0.0)
    assert not algo.draw_left_out(1000).any()
    algo = algorithm("classifier_free_paper", "algo.epochs=1", "algo.fit_batch_size=8")
    policy, batch = collected(8, num_dims=3)
    recorder = Recorder(policy)
    torch.manual_seed(0)
    algo.update([batch], policy, recorder)
    torch.manual_seed(0)
    label = batch.context.label[:, 0]
    torch.rand(8, 1)  # deals them into one minibatch
    torch.randint(1000, (8,))
    noise = torch.randn(8, 3, 1, 1).flatten(1).mean(1)
    error = policy.theta.detach()[label] - noise
    by_hand = torch.stack([2 * (error * (label == y)).mean() for y in (0, 1)])
    assert_close(recorder.gradients[0], by_hand, atol=0, rtol=1e-6)


def test_ctrl_paper():
    """The same with a cut at every step anew, and the KL of the kept steps, 2 theta kappa / gamma each.

    That is a mean over dims; their sum would be three times as much.
    """
    algo = algorithm("ctrl_paper")
    gradient, batch, schedule, theta = one_update(algo, 50)
    kept = algo.truncation.kept(50, torch.Generator().manual_seed(0))
    assert sorted(kept) != kept
    x_0 = batch.latents[-1].flatten()
    of_kl = 2 * theta * sum(float(k) for k, keep in zip(schedule.kappa, kept, strict=True) if keep)
    by_hand = (2 * (x_0 - 1)).mean() * path_slope(schedule, kept) + of_kl / 10
    assert_close(gradient, by_hand, atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "setting"), [("ctrl_paper", "kl_reduction"), ("ddpo_pytorch", "log_prob_reduction")]
)
def test_a_published_reduction_does_not_lean_on_our_default(preset, setting):
    """DDPO's is a mean by default: the gradient would not tell until that changes."""
    assert yaml.safe_load((FOLDER / f"{preset}.yaml").read_text())["algo"][setting] == "mean"


@pytest.mark.parametrize(
    "preset",
    [
        "ddpo_pytorch",
        "rwr_paper",
        "rwr_sparse_paper",
        "alignprop",
        "ctrl_paper",
        "classifier_free_paper",
    ],
)
def test_every_preset_is_complete_and_for_sd15(preset):
    settings = config.load([f"+experiment={preset}"])
    assert settings.env.num_steps == 50
    assert config.chosen(settings, "env") == "sd15"
    assert settings.policy.rank == 4
