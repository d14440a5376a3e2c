"""Is this combination of env, algorithm, reward and precision numerically sound? Answered before training.

Every check looks at an untrained policy, or one that has moved next to nothing, so each right answer is
known: ratios are 1, the KL is 0, the gradient reaches every adapter. Source of the traps: DDPO's and CTRL's
code and their issue trackers.
Shapes: T steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffrl.algorithms.base import Algorithm, resized
from diffrl.algorithms.recorder import Recorder
from diffrl.algorithms.untrained import Untrained
from diffrl.build import Setup
from diffrl.config import Config, chosen
from diffrl.learned import is_at_hand, make_reward, rehearse
from diffrl.policy import Policy, Pretrained
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.scoring import score
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.rollout import rollout
from diffrl.types import Reward, Trajectory

_PICTURES = 8
_CLIP_RANGE = 1e-4  # DDPO's: what ratios are held against where the algorithm has none of its own
_WIDEST = 0.2  # PPO's clip range: a ratio further off than that is no rounding
_NUDGE = 1e-6  # of an adapter's half that begins at 0; chosen: a thousandth of an optimiser's first step
_LEAST_KL = 1.0  # nats, of what a policy that draws otherwise has
_LISTED = 10  # steps of which a line shows each one's value; chosen: emoji's

# What mends a finding: `{algo.gamma}` is a setting's value, `{word.env}` the word that chose the component.
_AGAINST_ROUNDING = (
    "set env.precision=fp32 instead of {env.precision}",
    "raise env.eta={env.eta:g}, whose little noise magnifies it",
)
_AGAINST_MAGNIFYING = (
    "take fewer, larger steps than env.num_steps={env.num_steps}",
    "lower env.guidance_scale={env.guidance_scale:g}",
)
_AGAINST_LIMITS = (
    "raise reward.clip={reward.clip:g}",
    "raise reward.ceiling={reward.ceiling:g}",
    "choose another reward than {word.reward}",
)
_IN_EVAL = "let load() of env={word.env} return its network in .eval() mode"
# settings at their best, which can mend nothing more
_SPENT = {"env.precision": "fp32", "env.eta": 1.0, "reward.ceiling": 1.0}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    value: str
    sound: bool | None  # None: not looked at, and the value says why
    advice: str = ""  # the likely cause, if it is not sound
    mends: tuple[str, ...] = ()  # of them the advice names those whose settings are there


def examine(config: Config) -> list[Finding]:
    """Return what is found, check by check; nothing is written, no weight is moved."""
    return [
        _advised(config, finding) if finding.sound is False else finding for finding in _findings(config)
    ]


def _findings(config: Config) -> Iterator[Finding]:
    setup = Setup(config)
    policy = setup.make_policy(setup.num_classes())
    reward = _reward(setup, policy)
    env = setup.make_env(reward, _PICTURES)
    noisy = config.env.eta > 0
    reference = policy.reference if noisy else None
    episodes = rollout(env, policy, setup.generator(3), reference=reference, seed=config.seed)
    if isinstance(reward, OnlineSurrogateReward):  # 0 everywhere, until it has asked about some pictures
        reward.observe([(episodes.images, episodes.context)], config.reward_timeout)
        episodes = replace(episodes, reward=score(reward, episodes.images, episodes.context))
    yield _rewards(episodes, reward)
    if noisy:
        yield _kl(episodes)
        with _nudged(policy):
            moved = rollout(env, policy, setup.generator(3), reference=reference, seed=config.seed)
        yield _kl_of_rounding(moved)
    if isinstance(config.algo, Untrained):
        skipped = f"skipped: algo={chosen(config, 'algo')} trains nothing"
        yield Finding("ratios and gradients", skipped, None)
        return
    if noisy:
        yield from _ratios(policy, episodes, config.algo)
    if config.algo.needs_gradient:
        yield (slope := _reward_gradient(episodes, reward))
        if not slope.sound:
            yield Finding("gradients of the weights", "skipped: the reward has none to pass on", None)
            return
    yield from _gradients(setup, policy, reward, config.algo)


def _reward(setup: Setup, policy: Policy) -> Reward:
    """Return the reward, or if it is still to be fitted, one that does for what is looked at here."""
    if is_at_hand(setup):
        return make_reward(setup, policy)
    env = setup.make_env(Jpeg(), _PICTURES)
    drawn = rollout(env, Pretrained(policy), setup.generator(1), seed=setup.config.seed)
    return rehearse(setup, drawn.images)


def _advised(config: Config, finding: Finding) -> Finding:
    """Return the finding with the options that mend it in its advice: those that the components have."""
    parts: dict[str, Any] = {name: getattr(config, name) for name in ("algo", "env", "reward")}
    words = {name: getattr(part, "chosen_by", chosen(config, name)) for name, part in parts.items()}
    known = {"word": SimpleNamespace(**words)}
    spent = _SPENT
    if getattr(config.env, "precision", "") == "tf32" and not torch.cuda.is_available():
        spent = spent | {"env.precision": "tf32"}  # which is fp32 there
    for name, part in parts.items():
        settings = {field.name: getattr(part, field.name) for field in fields(part)}
        left = {key: value for key, value in settings.items() if value != spent.get(f"{name}.{key}")}
        known[name] = SimpleNamespace(**left)
    fitting = []
    for mend in finding.mends:
        with suppress(AttributeError, ValueError):  # no such setting here, or one of another kind
            fitting.append(mend.format(**known))
    return replace(finding, advice=f"{finding.advice}. To mend it {', or '.join(fitting)}.")


def _rewards(episodes: Trajectory, reward: Reward) -> Finding:
    scores = episodes.reward.detach()
    asked = f", after {reward.num_queries} queries" if isinstance(reward, OnlineSurrogateReward) else ""
    return Finding(
        f"rewards of {_PICTURES} pictures",
        f"{float(scores.min()):.3g} to {float(scores.max()):.3g}{asked}",
        bool(scores.min() < scores.max()),
        "all alike, so nothing is learnt: the reward rounds, is cut off, or does not look at the pictures",
        _AGAINST_LIMITS,
    )


def _kl(episodes: Trajectory) -> Finding:
    assert episodes.kl is not None
    worst = float(episodes.kl.abs().max())
    return Finding(
        "KL of the untrained policy",
        f"{worst:.3g} nats",
        worst == 0,
        "policy and reference do not run the same code: dropout, adapters that are not zero at the start, "
        "or a rounding of their own",
        (_IN_EVAL, "name other layers in policy.targets", *_AGAINST_ROUNDING),
    )


@contextmanager
def _nudged(policy: Policy) -> Iterator[None]:
    """Move every adapter by less than anything that could be learnt, and back.

    From then on policy and reference are not the same products, and round each in its own way.
    """
    halves = [p for name, p in policy.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for half in halves:
            half.add_(_NUDGE)
    try:
        yield
    finally:
        with torch.no_grad():
            for half in halves:
                half.zero_()


def _kl_of_rounding(episodes: Trajectory) -> Finding:
    assert episodes.kl is not None
    kl = float(episodes.kl.sum(0).mean())
    return Finding(
        f"KL of adapters that are {_NUDGE:g}",
        f"{kl:.2g} nats",
        kl < _LEAST_KL,
        "policy and reference round apart, magnified by guidance and small steps: so much of a KL is noise",
        (*_AGAINST_ROUNDING, *_AGAINST_MAGNIFYING),
    )


def _ratios(policy: Policy, episodes: Trajectory, algo: Algorithm) -> Iterator[Finding]:
    """Score the stored actions again, in one batch and one by one, as a policy gradient will."""
    summed = getattr(algo, "log_prob_reduction", "mean") == "sum"
    scale = 1.0 if summed else 1 / episodes.latents[0][0].numel()
    together = _largest_ratio(policy, episodes, len(episodes.reward), scale)
    alone = _largest_ratio(policy, episodes, 1, scale)
    allowed = getattr(algo, "clip_range", _CLIP_RANGE)
    whose = "" if hasattr(algo, "clip_range") else " (of ddpo)"
    needed = 2 * max(float(together.max()), float(alone.max()))
    wider = [f"raise algo.clip_range={{algo.clip_range:g}} above {needed:.2g}"] if needed < _WIDEST else []
    yield Finding(
        "largest |ratio - 1| before an update",
        _by_step(together),
        float(together.max()) < allowed / 2,
        "re-scoring in the same batch is not what sampling did: the network draws something, such as "
        "dropout, or rounds otherwise each time",
        (_IN_EVAL, *_AGAINST_ROUNDING, *wider),
    )
    yield Finding(
        "the same in other batch sizes (rounding floor)",
        f"{_by_step(alone)}; clip range {allowed:g}{whose}",
        float(alone.max()) < allowed / 2,
        "rounding depends on the batch that an action is scored in, and small steps magnify it",
        (*_AGAINST_ROUNDING, *wider, *_AGAINST_MAGNIFYING[:1]),
    )
    with _nudged(policy):
        moved = _largest_ratio(policy, episodes, len(episodes.reward), scale)
    yield Finding(
        f"the same of adapters that are {_NUDGE:g}",
        _by_step(moved),
        float(moved.max()) < allowed / 2,
        "after one optimiser step rounding alone leads out of the clip range",
        (*_AGAINST_ROUNDING, *_AGAINST_MAGNIFYING),
    )


def _by_step(largest: Tensor) -> str:
    """Return the value of each step if they are few, else the largest one and where it is."""
    worst = float(largest.max())
    if worst == 0:
        return f"0 at each of {len(largest)} steps"
    if len(largest) <= _LISTED:
        return f"by step: {' '.join(f'{value:.1g}' for value in largest.tolist())}"
    place = f"at step {int(largest.argmax())} of 0 to {len(largest) - 1}"
    return f"{worst:.2g} {place}, median {float(largest.median()):.1g}"


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
    scores = reward(images, episodes.context)
    slope = torch.zeros_like(images)
    if scores.requires_grad:
        (slope,) = torch.autograd.grad(scores.sum(), images)
    sizes = slope.flatten(1).norm(dim=1)
    return Finding(
        "gradient of the reward by the pixels",
        f"norm {float(sizes.min()):.3g} to {float(sizes.max()):.3g}",
        bool((sizes > 0).all() and sizes.isfinite().all()),
        "the reward rounds, detaches or saturates (uint8, no_grad, a clamp). Keep it in tensor operations",
        (*_AGAINST_LIMITS, "use algo=ddpo or algo=rwr"),
    )


def _gradients(setup: Setup, policy: Policy, reward: Reward, algo: Algorithm) -> Iterator[Finding]:
    """Take one small update, its step left out, and look at where the gradient arrived."""
    algo = resized(algo, _PICTURES, inner_epochs=1, epochs=1, fit_batch_size=_PICTURES)
    recorder = Recorder(policy)
    env = setup.make_env(reward, _PICTURES)
    env.reset(seed=setup.config.seed)
    algo.update([algo.collect(env, policy, setup.generator(4))], policy, recorder)
    # the other half of each adapter, A, has gradient 0 as long as B is 0
    adapters = [name for name, _ in policy.named_parameters() if "lora_B" in name]
    named = policy.named_parameters(remove_duplicate=False)
    found = {name: recorder.gradients[p] for name, p in named if p in recorder.gradients}
    dead = [name for name in adapters if name not in found or not found[name].any()]
    layer = (dead or [""])[0].partition(".lora_B")[0]
    yield Finding(
        "gradient in every adapter",
        f"{len(adapters) - len(dead)} of {len(adapters)}",
        not dead,
        f"none in {layer}: it is not on the path to the output, or no step that needs it is kept",
        (
            "leave the layer out of policy.targets",
            "keep other steps than algo.truncation.kind={algo.truncation.kind} does",
        ),
    )
    finite = all(bool(g.isfinite().all()) for g in found.values())
    yield Finding(
        "gradients finite",
        "yes" if finite else "no",
        finite,
        "an overflow, of the reward or along the steps",
        (
            "lower algo.gamma={algo.gamma:g}",
            "cut earlier steps, algo.truncation.low={algo.truncation.low} of them now",
            *_AGAINST_ROUNDING,
            "choose another reward than {word.reward}",
        ),
    )
    for number, count in enumerate(policy.label_embedding.num_classes):
        gradient = found.get(f"label_embedding.tables.{number}.weight")
        rows = 0 if gradient is None else int(gradient[:-1].any(1).sum())
        yield Finding(
            f"gradient in the label embedding, attribute {number}",
            f"{rows} of {count} labels",
            gradient is not None and rows > 0 and not gradient[-1].any(),
            "labels do not reach the network, or the null row learns",
            (
                "let the network of env={word.env} add class_embedding(class_labels) to its time embedding",
                "lower algo.drop_label={algo.drop_label:g}",
            ),
        )
