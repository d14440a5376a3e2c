"""Is this combination of env, algorithm, reward and precision numerically sound? Answered before training.

Every check looks at an untrained policy, so each right answer is known: ratios are 1, the KL is 0, the
gradient reaches every adapter. Source of the traps: DDPO's and CTRL's code and their issue trackers.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffrl.algorithms.base import Algorithm
from diffrl.build import Setup, is_learned
from diffrl.config import Config
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.types import Reward, Trajectory

_PICTURES = 8
_FIT_PICTURES = 64  # enough for a reward whose gradient is looked at, not its accuracy


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    value: str
    sound: bool
    advice: str = ""  # the likely cause and the setting that mends it; said when it is not sound


def examine(config: Config) -> list[Finding]:
    """Return what is found, check by check; nothing is written, no weight is moved."""
    if is_learned(config.reward) and not config.reward.classifier:
        config.reward = replace(config.reward, num_pictures=_FIT_PICTURES)
    setup = Setup(config)
    policy = setup.make_policy(setup.num_classes())
    reward = setup.make_reward(policy)
    env = setup.make_env(reward, _PICTURES)
    noisy = config.env.eta > 0
    reference = policy.reference if noisy else None
    episodes = rollout(env, policy, setup.generator(3), reference=reference, seed=config.seed)
    findings = [_rewards(episodes)]
    if noisy:
        findings += [_kl(episodes), *_ratios(policy, episodes, config.algo)]
    if config.algo.needs_gradient:
        findings.append(_reward_gradient(episodes, reward))
        if not findings[-1].sound:  # nothing would arrive anywhere
            return findings
    return [*findings, *_gradients(setup, policy, reward, config.algo)]


def _rewards(episodes: Trajectory) -> Finding:
    reward = episodes.reward.detach()
    return Finding(
        "rewards of 8 pictures",
        f"{float(reward.min()):.3g} to {float(reward.max()):.3g}",
        bool(reward.min() < reward.max()),
        "all alike: advantages are 0 and nothing is learnt. Look at the reward on two different pictures.",
    )


def _kl(episodes: Trajectory) -> Finding:
    assert episodes.kl is not None
    worst = float(episodes.kl.abs().max())
    return Finding(
        "KL of the untrained policy",
        f"{worst:.3g} nats",
        worst == 0,
        "policy and reference do not run the same code: a precision of their own, dropout, or adapters "
        "that are not zero at the start.",
    )


def _ratios(policy: Policy, episodes: Trajectory, algo: Algorithm) -> list[Finding]:
    """Score the stored actions again, in one batch and one by one, as a policy gradient will."""
    summed = getattr(algo, "log_prob_reduction", "mean") == "sum"
    scale = 1.0 if summed else 1 / episodes.latents[0][0].numel()
    together = _largest_ratio(policy, episodes, len(episodes.reward), scale)
    alone = _largest_ratio(policy, episodes, 1, scale)
    allowed = getattr(algo, "clip_range", 1e-4)
    advice = (
        "re-scoring is not what sampling did. Keep latents in float32, dropout off, and raise "
        f"algo.clip_range={allowed:g} well above the value."
    )
    step, value = int(together.argmax()), float(together.max())
    floor = float(alone.max())
    return [
        Finding(
            "largest |ratio - 1| before an update",
            f"{value:.2g}, step {step} of {len(together)}",
            value < allowed / 2,
            advice,
        ),
        Finding(
            "the same in other batch sizes (rounding floor)",
            f"{floor:.2g} against a clip range of {allowed:g}",
            floor < allowed / 2,
            advice,
        ),
    ]


@torch.no_grad()
def _largest_ratio(policy: Policy, episodes: Trajectory, batch: int, scale: float) -> Tensor:
    """Return max |exp(scale (log-probability, new minus old)) - 1| of each step, `[T]`."""
    assert episodes.log_prob is not None
    worst = []
    for t, stored in enumerate(episodes.log_prob):
        again = []
        for samples in torch.arange(len(stored), device=stored.device).split(batch):
            obs, action = episodes.decision(samples, torch.full_like(samples, t))
            again.append(policy(obs).log_prob(action))
        log_ratio = scale * (torch.cat(again) - stored)
        worst.append((log_ratio.exp() - 1).abs().max())
    return torch.stack(worst)


def _reward_gradient(episodes: Trajectory, reward: Reward) -> Finding:
    images = episodes.images.clone().requires_grad_()
    score = reward(images, episodes.context)
    slope = torch.zeros_like(images)
    if score.requires_grad:
        (slope,) = torch.autograd.grad(score.sum(), images)
    sizes = slope.flatten(1).norm(dim=1)
    return Finding(
        "gradient of the reward by the pixels",
        f"norm {float(sizes.min()):.3g} to {float(sizes.max()):.3g}",
        bool((sizes > 0).all() and sizes.isfinite().all()),
        "the reward rounds, detaches or saturates (uint8, no_grad, a clamp). Keep it in tensor operations, "
        "or use algo=ddpo or algo=rwr.",
    )


class _Recorder:
    """Stands in for the optimiser: remembers the first step's gradients and moves nothing."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        for name, parameter in self.policy.named_parameters(remove_duplicate=False):
            if parameter.grad is not None and name not in self.gradients:
                self.gradients[name] = parameter.grad.clone()

    def zero_grad(self) -> None:
        for parameter in self.policy.parameters():
            parameter.grad = None


def _gradients(setup: Setup, policy: Policy, reward: Reward, algo: Algorithm) -> list[Finding]:
    """Take one small update, its step left out, and look at where the gradient arrived."""
    small: dict[str, Any] = {
        "batch_size": _PICTURES,
        "micro_batch_size": _PICTURES,
        "minibatches": 1,
        "inner_epochs": 1,
        "epochs": 1,
        "fit_batch_size": _PICTURES,
    }
    known = {field.name for field in fields(algo)}
    algo = replace(algo, **{name: value for name, value in small.items() if name in known})
    recorder: Any = _Recorder(policy)
    env = setup.make_env(reward, _PICTURES)
    env.reset(seed=setup.config.seed)
    algo.update([algo.collect(env, policy, setup.generator(4))], policy, recorder)
    # the other half of each adapter, A, has gradient 0 as long as B is 0
    adapters = [name for name in dict(policy.named_parameters()) if "lora_B" in name]
    found = recorder.gradients
    dead = [name for name in adapters if name not in found or not found[name].any()]
    findings = [
        Finding(
            "gradient in every adapter",
            f"{len(adapters) - len(dead)} of {len(adapters)}",
            not dead,
            f"none in {', '.join(dead[:1])}: is it on the path to the output, and is a step kept? Look at "
            "policy.targets and algo.truncation.",
        ),
        Finding(
            "gradients finite",
            "yes" if all(g.isfinite().all() for g in found.values()) else "no",
            all(bool(g.isfinite().all()) for g in found.values()),
            "an overflow: lower algo.gamma, cut earlier steps with algo.truncation, or use float32.",
        ),
    ]
    for number, count in enumerate(policy.label_embedding.num_classes):
        gradient = found.get(f"label_embedding.tables.{number}.weight")
        rows = 0 if gradient is None else int(gradient[:-1].any(1).sum())
        findings.append(
            Finding(
                f"gradient in the label embedding, attribute {number}",
                f"{rows} of {count} labels",
                gradient is not None and rows > 0 and not gradient[-1].any(),
                "labels do not reach the network, or the null row learns. Does the reward read the label?",
            )
        )
    return findings
