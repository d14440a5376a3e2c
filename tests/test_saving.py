"""Saving memory and time must not move the gradient: other ways to the same one, the plain loop too."""

import copy

import pytest
import torch
from conftest import assert_close
from diffusers.models.attention_processor import Attention, AttnProcessor
from test_policy import learn_a_little, make_policy
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from diffrl.algorithms.ctrl import CTRL
from diffrl.algorithms.ddpo import DDPO
from diffrl.algorithms.truncation import Truncation
from diffrl.benchmarks import cost
from diffrl.benchmarks.plain import PlainLoop
from diffrl.envs.denoising import DenoisingVectorEnv, own_seed
from diffrl.rollout import rollout

FULL = Truncation(kind="fixed", path="network")


class Recorder:
    """Stands in for the optimiser: keeps the gradients."""

    def __init__(self, policy):
        self.policy = policy

    def step(self):
        self.gradients = [p.grad.clone() for p in trainable(self.policy)]

    def zero_grad(self):
        self.policy.zero_grad()


def trainable(policy):
    return [*policy.lora_parameters(), *policy.embedding_parameters()]


def make(backbone, num_envs=3, num_steps=4):
    reward = cost.unfitted_reward()
    policy = make_policy(backbone, num_classes=reward.num_classes, num_steps=num_steps)
    learn_a_little(policy)
    env = DenoisingVectorEnv(backbone, policy.schedule, reward, ["cat", "dog"], num_envs=num_envs)
    env.reset(seed=7)
    return policy, env


def ctrl(truncation=FULL, reduction="mean", gamma=0.01):
    """Weigh the KL so that it has a share in the gradient."""
    return CTRL(
        gamma=gamma, kl_reduction=reduction, kl_steps=None, truncation=truncation, max_grad_norm=1e9
    )


def ours(policy, env, algo=None, kept=None, reference=None):
    """Return the gradients and metrics of one update, through all steps or those `kept`."""
    algo, recorder = algo or ctrl(), Recorder(policy)
    trajectory = rollout(
        env,
        policy,
        torch.Generator().manual_seed(5),
        reference=reference or policy.reference,
        grad_steps=kept or policy.schedule.num_steps,
        seed=7,
    )
    metrics = algo.update([trajectory], policy, recorder)
    return recorder.gradients, metrics


def assert_same_gradients(actual, expected, tolerance):
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-6
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, atol=tolerance * largest)


def halves_apart(policy, env, monkeypatch):
    def apart(obs, adapters):
        with policy._adapters(adapters):
            null = policy.null_embeds.expand_as(obs["prompt_embeds"])
            no_label = torch.full_like(obs["label"], -1)
            unconditional = policy._eps(obs["latents"], obs["timestep"], null, no_label)
            conditional = policy._eps(*obs.values())
        return unconditional + policy.guidance_scale * (conditional - unconditional)

    monkeypatch.setattr(policy, "_both_halves", apart)


def test_only_a_chain_of_steps_is_run_again(tiny):
    """A single call's second run would hold the very activations that the first one gave up."""
    policy, env = make(tiny)
    runs = []
    policy.unet.register_forward_pre_hook(lambda *_: runs.append(1))
    ours(policy, env)
    # policy and reference at each of four steps, and again; at a given x_T the reference is a constant
    assert len(runs) == 2 * 2 * 4 - 1
    runs.clear()
    ddpo = DDPO(batch_size=3, micro_batch_size=3, minibatches=1, per_prompt=False)
    drawn = ddpo.collect(env, policy, torch.Generator().manual_seed(0))
    ddpo.update([drawn], policy, SGD(trainable(policy), lr=0.0))
    assert len(runs) == 4 + 4  # drawn, and scored once


def activations_kept(policy, env, monkeypatch):
    policy.checkpointing = False


def decoder_activations_kept(policy, env, monkeypatch):
    env.backbone.checkpointing = False


def decoded_one_by_one(policy, env, monkeypatch):
    env.backbone.slice_size = 1


def attention_by_hand(policy, env, monkeypatch):
    policy.unet.set_attn_processor(AttnProcessor())  # softmax(q k^T) v, whole in memory


def channels_last(policy, env, monkeypatch):
    env.backbone.to(memory_format=torch.channels_last)


def compiled(policy, env, monkeypatch):
    """By the backend that needs no compiler; tracing and its graphs are those of any."""
    trace, graphs = torch._dynamo.lookup_backend("aot_eager"), []
    policy.unet.compile(backend=lambda graph, inputs: graphs.append(1) or trace(graph, inputs))
    return graphs


CHANGES = [halves_apart, activations_kept, decoder_activations_kept, decoded_one_by_one]
CHANGES += [attention_by_hand, channels_last, compiled]


@pytest.mark.parametrize("change", CHANGES)
def test_how_memory_and_time_are_saved_does_not_move_the_gradient(tiny, monkeypatch, change):
    policy, env = make(tiny)
    before, _ = ours(policy, env)
    graphs = change(policy, env, monkeypatch)
    after, _ = ours(policy, env)
    assert graphs != []  # None of the others
    assert_same_gradients(after, before, 1e-5)


def test_attention_is_fused(tiny, monkeypatch):
    """One fused call, so one a layer and evaluation of the network, and none by hand."""
    policy, env = make(tiny)
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs),
    )
    layers = [m for m in policy.unet.modules() if isinstance(m, Attention)]
    with torch.no_grad():
        policy(env.reset(seed=7)[0])
    assert len(calls) == len(layers) > 1


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: a number looked at, a shape that depends on numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [2, 0])
def test_no_step_of_a_chain_waits_for_the_device(tiny, kept):
    waits = []
    for num_steps in (4, 8):
        policy, env = make(copy.deepcopy(tiny), num_steps=num_steps)
        env._looks_at_once = False  # as on a GPU
        with Waits() as counted:
            ours(policy, env, kept=kept)
        waits.append(counted.count)
    assert waits[0] == waits[1]


def test_adapters_off_are_a_second_copy_of_the_network(tiny):
    pretrained = copy.deepcopy(tiny)  # before any adapter is on it
    policy, env = make(tiny)
    other = make_policy(pretrained, num_classes=())  # untrained: its adapters add nothing
    gradients, metrics = ours(policy, env)
    by_copy, metrics_by_copy = ours(policy, env, reference=other)
    assert metrics["rollout/kl"] > 0
    assert_close(metrics["rollout/kl"], metrics_by_copy["rollout/kl"], atol=0, rtol=1e-5)
    assert_same_gradients(gradients, by_copy, 1e-5)


def test_the_timesteps_are_copied_to_the_device_once_a_trajectory(tiny, monkeypatch):
    """DDPO asks for every batch of (picture, step), and each copy waits for the device."""
    policy, env = make(tiny)
    episodes = rollout(env, policy, torch.Generator().manual_seed(0), seed=7)
    copies, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *of, **more: (copies.append(of), tensor(*of, **more))[1])
    for step, timestep in enumerate(policy.schedule.timesteps.tolist()):
        obs, _ = episodes.decision(torch.arange(3), torch.full((3,), step))
        assert obs["timestep"].tolist() == [timestep] * 3
    assert len(copies) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kept", [[True] * 4, [True, False, True, False]], ids=["full", "truncated"])
def test_the_plain_loop_takes_the_same_update(tiny, monkeypatch, kept, reduction):
    policy, env = make(tiny)
    monkeypatch.setattr(Truncation, "kept", lambda self, num_steps, generator: kept)
    algo = ctrl(reduction=reduction)
    expected, known = ours(policy, env, algo, kept)
    recorder = Recorder(policy)
    env._generator.manual_seed(own_seed(7))  # as `ours` begins
    calls = policy.num_calls
    metrics = PlainLoop(algo, policy, env).update(recorder, torch.Generator().manual_seed(5))
    assert policy.num_calls - calls == 3 * 4 * 4  # pictures, steps, two halves of two networks
    assert_same_gradients(recorder.gradients, expected, 1e-4)
    for name in ("rollout/reward_mean", "rollout/kl", "train/loss"):
        assert_close(metrics[name], known[name], atol=1e-6, rtol=1e-4)
    assert abs(known["rollout/kl"] / known["rollout/reward_mean"]) > 1e-3
