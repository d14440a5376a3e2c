"""What an env must be. Shapes: N envs, C,H,W latent, S the side of a picture."""

from collections.abc import Iterator
from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from diffrl.checks import alike, global_generators, instance, raise_faults
from diffrl.envs.registration import make_from
from diffrl.errors import DiffRLError

_LONGEST = 10_000  # steps; an episode that does not end


def check_env(env: Any) -> None:
    """Raise DiffRLError with a line for every fault of a vector env; it draws some five episodes.

    Looked at: its spaces hold what it returns; `reset(seed)` repeats to the bit and draws anew without one;
    a step passes its action on as the next latents, with its graph, and moves nothing but the clock; the
    reward is 0 and nothing ends before the last step, where all end at once, with pictures in [0, 1];
    `value` is the terminal reward; places in the batch do not matter; the global generators are left alone.

    Args:
        env: a `DenoisingVectorEnv` or another vector env with its contract, or the settings of one.
    """
    env = instance("env", env)
    name = type(env).__name__
    if not isinstance(env, VectorEnv):
        if not hasattr(env, "load"):
            raise DiffRLError(f"{name}: neither a gymnasium.vector.VectorEnv nor the settings of one.")
        env = make_from(env, 4)
    raise_faults(name, _faults(env))


def _faults(env: Any) -> Iterator[str]:
    if env.metadata.get("autoreset_mode") is not AutoresetMode.DISABLED:
        yield (
            "its episodes run in lock-step, and it does not say so. Put "
            '{"autoreset_mode": AutoresetMode.DISABLED} into its metadata.'
        )
    for kind in ("observation", "action"):
        single = getattr(env, f"single_{kind}_space")
        if getattr(env, f"{kind}_space") != batch_space(single, env.num_envs):
            yield (
                f"{kind}_space is not {env.num_envs} times single_{kind}_space. Make it by "
                "gymnasium.vector.utils.batch_space."
            )
    before = global_generators()
    spaces = list(_spaces(env))
    yield from spaces
    if spaces:
        return  # an episode cannot be trusted to run
    yield from _resets(env)
    try:
        first = _Episode(env)
    except DiffRLError as error:
        yield str(error)
        return
    if global_generators() != before:
        yield (
            "it draws from, or seeds, a global generator. Draw from a torch.Generator of its own that "
            "reset(seed=...) seeds."
        )
    yield from first.faults
    if first.faults:
        return
    again = _Episode(env)
    if not torch.equal(first.reward, again.reward):
        yield (
            "the same seed and actions give another reward. Draw nothing in step(): all noise is the "
            "actor's."
        )
    else:
        yield from _value(env, first)
        yield from _places(env, first)
    yield from _refusals(env, first)
    if getattr(env.reward, "differentiable", False):
        yield from _graph(env)


def _spaces(env: Any) -> Iterator[str]:
    obs, _ = env.reset(seed=1)
    for key in sorted({*env.observation_space.spaces, *obs}):
        space, value = env.observation_space.spaces.get(key), obs.get(key)
        if space is None or value is None:
            yield f"{key!r} is only in its {'observation' if space is None else 'space'}. Put it into both."
        elif not isinstance(value, Tensor):
            yield f"observation {key!r} is a {type(value).__name__}. Return a tensor, on the env's device."
        elif not space.contains(value.detach().cpu().numpy()):
            yield (
                f"observation {key!r}, {value.dtype} of shape {list(value.shape)}, does not lie in its "
                f"space {space}. Mend whichever is wrong."
            )


def _resets(env: Any) -> Iterator[str]:
    one, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    after = env.reset()[0]
    for key in one:
        if not torch.equal(one[key], again[key]):
            yield (
                f"reset(seed=1) twice gives two {key!r}. Draw all from one generator that the seed "
                "restarts."
            )
    if torch.equal(one["latents"], other["latents"]):
        yield "reset(seed=1) and reset(seed=2) give the same latents. Seed its generator with the seed."
    if torch.equal(other["latents"], after["latents"]):
        yield "reset() after reset(seed=2) repeats the episode. Without a seed, go on with the generator."


class _Episode:
    """One episode of fixed actions from `reset(seed=1)`, and what was wrong with it.

    Raises:
        DiffRLError: it does not end.
    """

    def __init__(self, env: Any, order: Tensor | None = None) -> None:
        num_envs = env.num_envs
        order = torch.arange(num_envs) if order is None else order
        obs, _ = env.reset(seed=1)
        context = env.context.rows(order.to(env.context.label.device))
        options = {"latents": obs["latents"][order], "prompts": context.prompts, "label": context.label}
        first, _ = env.reset(seed=1, options=options)
        self.context = env.context
        self.faults: list[str] = []
        noise = torch.Generator().manual_seed(0)
        obs = first
        for step in range(_LONGEST):
            drawn = torch.randn(obs["latents"].shape, generator=noise)[order].to(obs["latents"])
            action = 0.7 * obs["latents"] + 0.7 * drawn
            timestep = obs["timestep"]
            outcome = env.step(action)
            obs, self.reward, ended, _, self.info = outcome
            done = bool(torch.as_tensor(ended).any())
            if not self.faults:  # the next steps would only repeat them
                wrong = _wrong(env, first, action, timestep, outcome)
                self.faults += [f"step {step}: {fault}" for fault in wrong]
            if done:
                break
        else:
            raise DiffRLError(f"no episode ends within {_LONGEST} steps. Terminate after the last one.")
        self.latents = obs["latents"]
        self.faults += _at_the_end(env, self.info)


def _wrong(env: Any, first: Any, action: Tensor, timestep: Tensor, outcome: Any) -> Iterator[str]:
    """Yield what is wrong with the outcome of a step that was taken at `timestep`."""
    obs, reward, ended, truncated, _ = outcome
    done = bool(torch.as_tensor(ended).any())
    if not torch.equal(obs["latents"], action):
        yield "the next latents are not the action. The env adds nothing to x_(t-1): noise is the actor's."
    for key in ("prompt_embeds", "label"):
        if not torch.equal(obs[key], first[key]):
            yield f"{key!r} changes within an episode. Draw it at reset alone."
    if not (obs["timestep"] < timestep).all() or (done and obs["timestep"].any()):
        yield (
            f"the timestep goes from {int(timestep[0])} to {int(obs['timestep'][0])}. It falls with every "
            "step, and ends at 0."
        )
    if not isinstance(reward, Tensor) or tuple(reward.shape) != (env.num_envs,):
        yield f"the reward is not a tensor [{env.num_envs}]. Return one number an env."
    elif not done and reward.any():
        yield "the reward is not 0 before the last step. Only a finished picture is scored."
    for name, flags in (("terminated", ended), ("truncated", truncated)):
        if not isinstance(flags, Tensor) or flags.dtype != torch.bool or len(flags) != env.num_envs:
            yield f"{name} is not a bool tensor [{env.num_envs}]. Return one flag an env."
    if not torch.as_tensor(ended).all() and done:
        yield "some envs end before others. They run in lock-step: terminate all at the last step."
    if torch.as_tensor(truncated).any():
        yield "an episode is truncated. It ends by itself, at the last step: return False."


def _at_the_end(env: Any, info: dict[str, Any]) -> Iterator[str]:
    images = info.get("images")
    if not isinstance(images, Tensor):
        yield "info has no tensor 'images' after the last step. Return what was scored."
    elif images.shape[-1] > 1 and (images.min() < 0 or images.max() > 1):
        yield (
            f"pictures lie between {float(images.min()):.3g} and {float(images.max()):.3g}. Decode to "
            "[0, 1], by .clamp(0, 1)."
        )


def _value(env: Any, episode: _Episode) -> Iterator[str]:
    value = env.value(episode.latents, episode.context).detach()
    if not alike(episode.reward.detach(), value).all():
        yield "value(x_0, context) is not the terminal reward. Compute both by the same code."


def _places(env: Any, episode: _Episode) -> Iterator[str]:
    order = torch.arange(env.num_envs).roll(1)
    moved = _Episode(env, order)
    if not alike(episode.reward.detach()[order], moved.reward.detach()).all():
        yield (
            "envs in another order score otherwise. Decode and score each with its own row of latents, "
            "prompt and label, with networks in .eval() mode; or reset does not honour its options."
        )


def _refusals(env: Any, episode: _Episode) -> Iterator[str]:
    try:
        env.step(episode.latents)
    except Exception:
        pass
    else:
        yield "it takes a step past the end of the episode. Raise an error: call reset() first."
    obs, _ = env.reset(seed=1)
    try:
        env.step(obs["latents"][:1])
    except Exception:
        pass
    else:
        yield f"it takes one action for {env.num_envs} envs. Refuse another shape than action_space's."


def _graph(env: Any) -> Iterator[str]:
    """A differentiable reward's gradient reaches the first action."""
    obs, _ = env.reset(seed=1)
    action = obs["latents"].clone().requires_grad_()
    x, done = action, False
    while not done:
        obs, reward, ended, _, _ = env.step(x)
        x, done = 0.9 * obs["latents"], bool(ended.any())
    slope = None
    if reward.requires_grad:
        (slope,) = torch.autograd.grad(reward.sum(), action, allow_unused=True)
    if slope is None or not slope.any():
        yield (
            "the reward is differentiable, and its gradient does not reach the first action. Neither "
            "detach nor no_grad in step() and decode: the rollout decides where gradients flow."
        )
