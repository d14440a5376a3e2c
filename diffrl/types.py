"""The words every other module speaks in.

Shapes: N envs, T steps, C,H,W latent, A attributes a label has, L tokens, E width of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent

from diffrl.datasets import Batch
from diffrl.errors import DiffRLError

EVALUATION_SEED = 42
"""Of an evaluation's noise and prompts, unless another is asked for (CTRL)."""

NO_LABEL = -1
"""The null label: no control. Its embedding is zero and never learns."""


class Observation(TypedDict):
    """The state s_t = (x_t, t, c, y) of N denoising processes."""

    latents: Tensor  # x_t, [N, C, H, W], float32
    timestep: Tensor  # the scheduler's integer, [N], int64
    prompt_embeds: Tensor  # [N, L, E], float32
    label: Tensor  # y, [N, A], int64, NO_LABEL where there is none


@dataclass(frozen=True)
class Context:
    """What a picture is asked to be: the arguments of a reward besides the picture itself."""

    prompts: Sequence[str]  # N of them
    prompt_embeds: Tensor  # [N, L, E]
    label: Tensor  # [N, A], int64

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> "Context":
        """Return the context of some of the pictures, numbers `[M]`."""
        prompts = [self.prompts[i] for i in index.tolist()]
        return Context(prompts, self.prompt_embeds[index], self.label[index])


@dataclass(frozen=True)
class ActorStep:
    """One action: x_{t-1} and the Gaussian it was drawn from, where there is one."""

    prev_sample: Tensor  # [N, C, H, W]
    distribution: Independent | None


class Actor(Protocol):
    """Anything that chooses x_{t-1}: a policy, or a guidance method."""

    def begin(self, obs: Observation) -> None:
        """Forget the last episode; `obs` is the first of a new one."""
        ...

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return the action at `obs`, every draw from `generator`."""
        ...


class Backbone(Protocol):
    """A pretrained denoiser and what lies around it: what an env and a policy are made on."""

    unet: Any  # eps(x_t, timestep, prompt_embeds, class_labels), with diffusers' time embedding
    scheduler: Any  # a diffusers DDIMScheduler

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        ...

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """(L, E) of `encode_prompts`."""
        ...

    @property
    def image_size(self) -> int:
        """S, the side of a decoded picture."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return `[len(prompts), L, E]`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return what rewards score: pictures `[N, 3, S, S]` in [0, 1], or points as they are."""
        ...


class Autoencoder(Backbone, Protocol):
    """A backbone whose latents are those of pictures."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents `[N, C, H, W]` of pictures `[N, 3, S, S]` in [0, 1]."""
        ...


class Reward(Protocol):
    """A score of finished pictures."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow from the score to the pictures."""
        ...

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Of each attribute of the label it reads; () if it reads none."""
        ...

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return `[N]` float32 for `images` `[N, 3, H, W]` in [0, 1]."""
        ...


class LabelledReward(Reward, Protocol):
    """A reward with classes: every picture has a true label."""

    def draw_label(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a label of each picture, drawn from the true p(y|x), `[N, A]`."""
        ...

    def label_of(self, batch: Batch) -> Tensor:
        """Return the label of each picture of a data set, `[B, A]`."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """N whole episodes. Tensors carry a graph where the rollout was asked for gradients."""

    latents: Tensor  # x_T, ..., x_0, [T + 1, N, C, H, W], detached
    timesteps: list[int]  # the scheduler's, T of them
    log_prob: Tensor | None  # of each action, nats, [T, N], detached
    kl: Tensor | None  # to the reference, nats, times the weight of the step, [steps measured, N]
    log_ratio: Tensor | None  # log p_theta - log p_ref of each action, where the KL is, detached
    reward: Tensor  # [N]
    images: Tensor  # decoded x_0, [N, 3, H, W] in [0, 1], detached
    context: Context

    def decision(self, sample: Tensor, step: Tensor) -> tuple[Observation, Tensor]:
        """Return the states and actions of B pairs (sample, step), indices `[B]` each.

        Returns:
            The observation `[B, ...]` and the x_{t-1} that was chosen there, `[B, C, H, W]`.
        """
        obs: Observation = {
            "latents": self.latents[step, sample],
            "timestep": self._timesteps[step],
            "prompt_embeds": self.context.prompt_embeds[sample],
            "label": self.context.label[sample],
        }
        return obs, self.latents[step + 1, sample]

    @cached_property
    def _timesteps(self) -> Tensor:  # one copy to the device, which waits for it, for all pairs
        return torch.tensor(self.timesteps, device=self.latents.device)

    def without_images(self) -> "Trajectory":
        """Return the same without pictures, which are most of what black-box learning would keep."""
        return replace(self, images=self.images[:, :0].clone())  # a view would keep the whole

    def result(self) -> "Trajectory":
        """Return the same without what led to x_0, and without pictures: little enough to keep many."""
        x_0 = self.latents[-1:].clone()
        return replace(self.without_images(), latents=x_0, log_prob=None, kl=None, log_ratio=None)

    @staticmethod
    def cat(parts: Sequence["Trajectory"]) -> "Trajectory":
        """Return the episodes of all parts, of equal T, as one."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values, 1)

        return Trajectory(
            latents=torch.cat([part.latents for part in parts], 1),
            timesteps=first.timesteps,
            log_prob=joined("log_prob"),
            kl=joined("kl"),
            log_ratio=joined("log_ratio"),
            reward=torch.cat([part.reward for part in parts]),
            images=torch.cat([part.images for part in parts]),
            context=Context(
                [prompt for part in parts for prompt in part.context.prompts],
                torch.cat([part.context.prompt_embeds for part in parts]),
                torch.cat([part.context.label for part in parts]),
            ),
        )


def stream_seed(seed: int, *stream: int) -> int:
    """Return the seed of the stream of random numbers that `stream` names, of those under `seed`."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> 1)


def draw(distribution: Independent, generator: torch.Generator) -> Tensor:
    """Return a reparameterised sample: gradients flow through mean and scale, not the noise."""
    mean = distribution.mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
    return mean + distribution.stddev * noise.to(mean.device)


def check_range(label: Tensor, num_classes: Sequence[int]) -> None:
    """Raise DiffRLError unless each attribute of labels `[N, A]` is one of its classes, or NO_LABEL."""
    for attribute, (column, count) in enumerate(zip(label.unbind(1), num_classes, strict=True)):
        wrong = column[(column < NO_LABEL) | (column >= count)]
        if len(wrong):
            raise DiffRLError(
                f"label={int(wrong[0])}: out of range; attribute {attribute} has labels 0 to "
                f"{count - 1}, and {NO_LABEL} for none."
            )


def every_label(num_classes: Sequence[int]) -> Tensor:
    """Return all labels of attributes with so many classes each, `[C, A]`: the last one counts fastest."""
    labels = list(product(*map(range, num_classes)))
    return torch.tensor(labels, dtype=torch.int64).reshape(len(labels), len(num_classes))


def to_pixels(images: Tensor) -> np.ndarray:
    """Return pictures `[N, 3, S, S]` in [0, 1] as uint8 `[N, S, S, 3]`, rounded."""
    return (255 * images.detach()).round().byte().permute(0, 2, 3, 1).cpu().numpy()
