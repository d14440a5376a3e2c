"""Denoising as a Gymnasium vector env: the action is x_{t-1} itself.

| state s_t | (x_t, t, c, y) |
| action a_t | x_{t-1} |
| transition | the clock moves, the latents become the action |
| reward | 0, then r(decode(x_0), c, y) at the last step |

Shapes: N envs, T steps, C,H,W latent, L tokens of width E, A attributes of a label.
Source: DDPO, arXiv:2305.13301, section 4.2; CTRL, arXiv:2406.12120, appendix B, for the label.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from diffrl.datasets import Pictures
from diffrl.envs.prompts import LabelledPrompt
from diffrl.errors import DiffRLError
from diffrl.rewards.scoring import score
from diffrl.schedule import DDIMSchedule
from diffrl.types import (
    NO_LABEL,
    Backbone,
    Context,
    Observation,
    Reward,
    check_range,
    stream_seed,
    to_pixels,
)


class DenoisingVectorEnv(VectorEnv[Observation, Tensor, Any]):
    """N denoising processes in lock-step over one frozen backbone.

    Tensors stay on the backbone's device, with their graph: the env neither detaches nor disables
    gradients. It draws only at `reset` (prompt, label, x_T); all other noise is the actor's.

    Args:
        backbone: encodes prompts and decodes latents.
        schedule: gives the clock.
        reward: scores finished pictures.
        prompts: one is drawn for each env, uniformly; a `LabelledPrompt` with its own label.
        num_envs: N.
        group_size: so many consecutive envs share prompt and label; it divides N.
        dataset: labelled pictures for an algorithm that learns from them; the env itself reads none.
        reward_timeout: seconds that a black-box reward may take for N pictures; None: for ever.

    Examples:
        >>> import gymnasium
        >>> env = gymnasium.make_vec("diffrl:diffrl/Emoji-v0", num_envs=2, num_steps=2)
        >>> obs, _ = env.reset(seed=0, options={"prompts": ["cat", "dog"]})
        >>> obs["latents"].shape, obs["timestep"].tolist()
        (torch.Size([2, 4, 16, 16]), [501, 501])
        >>> obs, reward, terminated, truncated, info = env.step(0.5 * obs["latents"])
        >>> reward.tolist(), terminated.tolist(), obs["timestep"].tolist()
        ([0.0, 0.0], [False, False], [1, 1])
        >>> obs, reward, terminated, truncated, info = env.step(0.5 * obs["latents"])
        >>> terminated.tolist(), info["images"].shape, bool((reward < 0).all())
        ([True, True], torch.Size([2, 3, 64, 64]), True)
    """

    metadata: dict[str, Any] = {  # noqa: RUF012, as Gymnasium declares it
        "render_modes": ["rgb_array"],
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(
        self,
        backbone: Backbone,
        schedule: DDIMSchedule,
        reward: Reward,
        prompts: Sequence[str],
        *,
        num_envs: int = 1,
        group_size: int = 1,
        dataset: Pictures | None = None,
        reward_timeout: float | None = None,
        render_mode: str | None = "rgb_array",
    ) -> None:
        if num_envs < 1:
            raise DiffRLError(f"num_envs={num_envs}: must be 1 or more.")
        if group_size < 1 or num_envs % group_size:
            raise DiffRLError(f"group_size={group_size}: must divide num_envs={num_envs}.")
        if not prompts:
            raise DiffRLError("prompts: the list is empty; give at least one.")
        self.backbone, self.schedule, self.reward = backbone, schedule, reward
        self.dataset, self.reward_timeout = dataset, reward_timeout
        self.prompts = list(prompts)
        self.num_envs, self.group_size, self.render_mode = num_envs, group_size, render_mode
        self.device, self.dtype = backbone.unet.device, schedule.sigma.dtype
        self._prompt_embeds: dict[str, Tensor] = {}

        def unbounded(shape: tuple[int, ...]) -> Box:
            return Box(-np.inf, np.inf, shape, np.float32)

        self.single_action_space = unbounded(backbone.latent_shape)
        most = np.array([count - 1 for count in reward.num_classes], dtype=np.int64)
        self.single_observation_space = Dict(
            latents=unbounded(backbone.latent_shape),
            timestep=Box(0, backbone.scheduler.config.num_train_timesteps, (), np.int64),
            prompt_embeds=unbounded(backbone.prompt_shape),
            label=Box(np.full_like(most, NO_LABEL), most, dtype=np.int64),
        )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._looks_at_once = self.device.type == "cpu"  # elsewhere a look at a number waits for the device
        self._times = torch.cat([schedule.timesteps, schedule.timesteps.new_zeros(1)])
        self._generator = torch.Generator()
        self._generator.seed()  # from the system, until reset(seed=...)
        self.num_scored = 0  # pictures that the reward has seen so far
        self._clock: int | None = None  # the index i of the next step, 0 to T; None before a reset

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin N new episodes.

        Args:
            seed: restarts the env's generator: the same seed gives the same episode to the bit.
            options: `prompts` (N strings), `label` (int64 `[N, A]`, NO_LABEL for none) or `latents`
                (`[N, C, H, W]`) replace what would be drawn. All three are drawn in any case, so that
                giving one does not change the others.
        """
        if seed is not None:
            self._generator.manual_seed(own_seed(seed))
        options = options or {}
        stray = set(options) - {"prompts", "label", "latents"}
        if stray:
            raise DiffRLError(f"reset: unknown option {min(stray)!r}. Known: label, latents, prompts.")
        groups = self.num_envs // self.group_size
        choice = self._draw(len(self.prompts), groups)
        labels = [self._draw(count, groups) for count in self.reward.num_classes]
        shape = (self.num_envs, *self.backbone.latent_shape)
        latents = torch.randn(shape, generator=self._generator)

        prompts = [self.prompts[i] for i in choice.tolist()]
        label = torch.stack(labels, 1) if labels else torch.zeros(groups, 0, dtype=torch.int64)
        for own, prompt in zip(label, prompts, strict=True):
            if isinstance(prompt, LabelledPrompt) and labels:
                own.copy_(torch.tensor(prompt.label))
        prompts = [prompt for prompt in prompts for _ in range(self.group_size)]
        label = label.repeat_interleave(self.group_size, 0)
        prompts = list(options.get("prompts", prompts))
        label = self._check_label(torch.as_tensor(options.get("label", label)))
        latents = torch.as_tensor(options.get("latents", latents), dtype=self.dtype)
        if len(prompts) != self.num_envs:
            raise DiffRLError(f"reset: {len(prompts)} prompts for {self.num_envs} envs; give one each.")
        self._check_latents(latents, "reset: latents")

        self._latents, self._clock = latents.to(self.device), 0
        self.context = Context(prompts, self._encode(prompts), label.to(self.device))
        return self._observe(), {}

    def step(self, actions: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Make `actions` = x_{t-1}, `[N, C, H, W]`, the latents of the next state.

        Returns:
            The observation, reward `[N]`, terminated `[N]`, truncated `[N]` and an info that holds
            `images` `[N, 3, S, S]` in [0, 1] after the last step.

        Raises:
            DiffRLError: called out of turn, or `actions` have another shape or are not finite; on a GPU
                the latter shows at the end of the episode, so that no step waits for it.
        """
        if self._clock is None or self._clock >= self.schedule.num_steps:
            state = "before the first reset" if self._clock is None else "past the end of the episode"
            raise DiffRLError(f"step: called {state}; call reset() first.")
        actions = torch.as_tensor(actions)
        done = self._clock + 1 == self.schedule.num_steps
        name = f"step {self._clock}: x_(t-1)"
        self._check_latents(actions, name, finite=done or self._looks_at_once)
        self._latents = actions.to(self.device, self.dtype)
        self._clock += 1
        reward, info = torch.zeros(self.num_envs, device=self.device), {}
        if done:
            images = self.backbone.decode(self._latents)
            reward, info = self._score(images, self.context), {"images": images}
        terminated = torch.full((self.num_envs,), done, device=self.device)
        return self._observe(), reward, terminated, torch.zeros_like(terminated), info

    def value(self, x_0: Tensor, context: Context) -> Tensor:
        """Return the terminal reward `[N]` of latents `x_0` `[N, C, H, W]`."""
        return self._score(self.backbone.decode(x_0), context)

    def render(self) -> tuple[np.ndarray, ...]:
        """Return each env's current latents decoded, uint8 `[S, S, 3]`."""
        if self._clock is None:
            raise DiffRLError("render: nothing to show before the first reset().")
        if self.render_mode is None:
            raise DiffRLError("render: this env was made with render_mode=None, it shows nothing.")
        with torch.no_grad():
            images = self.backbone.decode(self._latents)
        return tuple(to_pixels(images))

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing is held open."""

    def _score(self, images: Tensor, context: Context) -> Tensor:
        reward = score(self.reward, images, context, self.reward_timeout)
        self.num_scored += len(images)
        return reward

    def _observe(self) -> Observation:
        assert self._clock is not None
        return {
            "latents": self._latents,
            "timestep": self._times[self._clock].repeat(self.num_envs),
            "prompt_embeds": self.context.prompt_embeds,
            "label": self.context.label,
        }

    def _draw(self, count: int, number: int) -> Tensor:
        """Return `number` indices below `count`, in random order, each as often as any other or once less.

        Each is uniform, and their mean varies less than that of independent draws.
        """
        rounds = [torch.randperm(count, generator=self._generator) for _ in range(-(-number // count))]
        order = torch.randperm(number, generator=self._generator)
        return torch.cat(rounds)[:number][order]

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_embeds]
        if new:
            encoded = self.backbone.encode_prompts(new)
            self._prompt_embeds.update(zip(new, encoded, strict=True))
        return torch.stack([self._prompt_embeds[prompt] for prompt in prompts])

    def _check_latents(self, latents: Tensor, name: str, *, finite: bool = True) -> None:
        shape = (self.num_envs, *self.backbone.latent_shape)
        if tuple(latents.shape) != shape:
            raise DiffRLError(f"{name} has shape {list(latents.shape)}; it must be {list(shape)}.")
        if finite and not latents.isfinite().all():
            bad = (~latents.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise DiffRLError(
                f"{name} is not finite in env {bad[0]} ({len(bad)} of {self.num_envs}); lower the "
                "learning rate or look at the reward's gradient."
            )

    def _check_label(self, label: Tensor) -> Tensor:
        counts = self.reward.num_classes
        if tuple(label.shape) != (self.num_envs, len(counts)):
            raise DiffRLError(
                f"reset: label has shape {list(label.shape)}; it must be {[self.num_envs, len(counts)]}."
            )
        check_range(label, counts)
        return label.long()


def own_seed(seed: int) -> int:
    """Return the seed of the env's own stream: an actor's generator of `seed` would draw x_T once more."""
    return stream_seed(seed % 2**64, *b"x_T")
