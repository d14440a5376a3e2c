from dataclasses import replace

import pytest
import torch
from conftest import assert_close
from toy import Recorder, ToyEnv, ToyPolicy

from diffrl.algorithms.advantages import groups_of
from diffrl.algorithms.rwr import RWR
from diffrl.cli import main
from diffrl.errors import DiffRLError


def batch_of(policy, rewards, prompts=None, labels=None):
    env = ToyEnv(policy.schedule, len(rewards), num_labels=len(policy.theta))
    batch = RWR().collect(env, policy, torch.Generator().manual_seed(0))
    context = replace(
        batch.context,
        prompts=prompts or ["x"] * len(rewards),
        label=torch.tensor(labels or [0] * len(rewards))[:, None],
    )
    return replace(batch, reward=torch.tensor(rewards, dtype=torch.float64), context=context)


def scored(batch):
    return batch.reward, groups_of(batch.context)


def test_exponential_weights_are_a_softmax_that_averages_one():
    batch = batch_of(ToyPolicy(), [0.0, 5.0, 10.0])
    e = torch.tensor([0.0, 1.0, 2.0]).double().exp()
    assert_close(RWR(gamma=0.2).weigh(*scored(batch)), 3 * e / e.sum(), atol=1e-9)


def test_per_prompt_weights_compete_within_a_prompt_and_label():
    batch = batch_of(ToyPolicy(), [0.0, 5.0, 7.0, 100.0], ["a", "a", "a", "b"], [0, 0, 1, 0])
    e = torch.tensor([0.0, 1.0]).double().exp()
    expected = torch.cat([2 * e / e.sum(), torch.ones(2)])
    assert_close(RWR(gamma=0.2, per_prompt=True).weigh(*scored(batch)), expected, atol=1e-9)


def test_sparse_weights_keep_the_top_tenth_or_what_reaches_the_threshold():
    batch = batch_of(ToyPolicy(), [float(i) for i in range(20)])
    assert RWR(weights="percentile").weigh(*scored(batch)).tolist() == [0.0] * 18 + [1.0] * 2
    assert RWR(weights="threshold", threshold=17.0).weigh(*scored(batch)).tolist() == [0.0] * 17 + [1.0] * 3


def test_a_threshold_that_nothing_reaches_is_named():
    policy = ToyPolicy()
    algorithm = RWR(weights="threshold", threshold=3.0)
    with pytest.raises(DiffRLError, match=r"none of 4 rewards reaches it, the best is 2\.000"):
        algorithm.update([batch_of(policy, [1.0, 2.0, 0.0, 1.0])], policy, Recorder(policy))


def learnt_from_six(algorithm, policy):
    """Return weights and gradients of an update; the generator is then where the update found it."""
    batch = batch_of(policy, [0.0, 5.0, 10.0, 1.0, 2.0, 3.0])
    recorder = Recorder(policy)
    torch.manual_seed(3)
    algorithm.update([batch], policy, recorder)
    torch.manual_seed(3)
    return algorithm.weigh(*scored(batch)), recorder.gradients


@pytest.mark.parametrize(("train_guidance", "scale"), [(True, 2.0), (False, 1.0)])
def test_the_gradient_is_that_of_the_weighted_denoising_error(train_guidance, scale):
    """eps_theta = s theta, s the guidance's scale: 2 s E[w (s theta - noise)]."""
    policy = ToyPolicy(num_labels=1)
    sizes = {"epochs": 1, "fit_batch_size": 6, "micro_batch_size": 3, "batch_size": 6}
    algorithm = RWR(train_guidance=train_guidance, max_grad_norm=1e9, **sizes)
    weight, gradients = learnt_from_six(algorithm, policy)
    torch.rand(6, 1)  # deals them into one minibatch
    torch.randint(1000, (6,))
    noise = torch.randn(6, 1, 1, 1).double().flatten()
    by_hand = float((2 * scale * weight * (scale * policy.theta.detach() - noise)).mean())
    assert_close(gradients[0][0], by_hand, atol=1e-6)


def test_each_minibatch_has_the_weights_of_its_own_pictures():
    """Six pictures of unlike weights in two minibatches of three: those of their hands, in that order."""
    policy = ToyPolicy(num_labels=1)
    sizes = {"epochs": 1, "fit_batch_size": 3, "micro_batch_size": 3, "batch_size": 6}
    algorithm = RWR(max_grad_norm=1e9, **sizes)
    weight, gradients = learnt_from_six(algorithm, policy)
    hands = torch.rand(3, 2).argsort(1) + torch.tensor([[0], [2], [4]])
    for number, gradient in enumerate(gradients):
        torch.randint(1000, (3,))
        noise = torch.randn(3, 1, 1, 1).double().flatten()
        by_hand = float((4 * weight[hands[:, number]] * (2 * policy.theta.detach() - noise)).mean())
        assert_close(gradient[0], by_hand, atol=1e-6)
    assert number == 1


def test_the_rate_falls_within_a_round_to_where_the_next_one_begins(tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: seen.append(self.param_groups[0]["lr"]) or step(self)
    )
    words = ["algo=rwr", "env=gaussian_mixture", "env.num_steps=2", "algo.learning_rate=0.8"]
    words += ["algo.updates=2", "algo.batch_size=6", "algo.micro_batch_size=6", "algo.fit_batch_size=3"]
    assert main(["train", *words, "algo.epochs=2", f"root={tmp_path}"]) == 0
    assert_close(torch.tensor(seen), torch.tensor([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]), atol=1e-6)


def test_pictures_come_from_the_pretrained_model_if_asked():
    policy = ToyPolicy()
    policy.theta.data += 5.0
    means = {}
    for source in ("policy", "pretrained"):
        env = ToyEnv(policy.schedule, 512)
        batch = RWR(source=source).collect(env, policy, torch.Generator().manual_seed(0))
        means[source] = batch.latents[-1].mean()
    assert means["pretrained"].abs() < 0.2
    assert means["policy"] < -1  # more noise predicted, so more taken away


@pytest.mark.parametrize(
    "settings",
    [{"source": "x"}, {"weights": "x"}, {"gamma": 0.0}, {"percentile": 100.0}, {"epochs": 0}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DiffRLError, match=rf"algo\.{next(iter(settings))}"):
        RWR(**settings)
