"""Fitting the denoiser to pictures: the loss a diffusion model is trained by, and the passes over a round.

Shapes: B pictures of a round, b of them at a time.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffrl import processes
from diffrl.algorithms.base import Algorithm, anneal, batches, dealt, over_steps
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.types import Observation, Trajectory


@dataclass
class DenoisingFit(Algorithm):
    """An algorithm whose update is a round: pictures, fitted `epochs` times by the denoising loss."""

    epochs: int = 5  # over the pictures of a round
    fit_batch_size: int = 16  # pictures an optimiser step, at most

    needs_gradient: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "fit_batch_size"):
            if getattr(self, name) < 1:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be 1 or more.")

    def fit(
        self, batch: Trajectory, weight: Tensor, policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Take the optimiser steps of a round and return its metrics.

        Args:
            batch: this process's pictures; x_0 and the context are what is used.
            weight: of each picture of all processes, `[B]`; those of weight 0 are left out.
            policy: is trained.
            optimizer: of its parameters.
        """
        kept = weight.nonzero()[:, 0].cpu()
        ours, x_0, context = processes.place(len(batch.context)), batch.latents[-1], batch.context
        # added up where it is: a look at a number waits for the device
        total, steps = torch.zeros((), device=x_0.device), []
        num_steps = -(-len(kept) // self.fit_batch_size)  # an epoch
        for epoch in range(self.epochs):
            for number, samples in enumerate(dealt(kept, num_steps)):
                anneal(optimizer, (epoch + number / num_steps) / self.epochs)
                drawn = self.draw(policy, len(samples), x_0.shape[1:])
                for part in batches(processes.among(samples, ours), self.micro_batch_size):
                    own = (samples[part] - ours.start).to(x_0.device)
                    embeds, label = context.prompt_embeds[own], context.label[own]
                    losses = self.losses(
                        policy, x_0[own], embeds, label, *(of_all[part] for of_all in drawn)
                    )
                    loss = (weight[samples[part]] * losses).sum() / len(samples)
                    loss.backward()
                    total += loss.detach()
                steps.append(self.step(policy, optimizer))
        return over_steps(steps) | processes.summed({"train/loss": float(total) / len(steps)})

    def draw(self, policy: Policy, count: int, shape: torch.Size) -> tuple[Tensor, ...]:
        """Return what is random in an optimiser step over `count` pictures, each with `count` rows."""
        return draw_noise(policy, count, shape)

    def losses(
        self, policy: Policy, x_0: Tensor, prompt_embeds: Tensor, label: Tensor, *drawn: Tensor
    ) -> Tensor:
        """Return the loss of each picture, `[b]`; `drawn` is what `draw` returned for them."""
        return denoising_loss(policy, x_0, prompt_embeds, label, *drawn)


def draw_noise(policy: Policy, count: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return a random training timestep `[count]` and noise `[count, *shape]`, for as many pictures."""
    return torch.randint(len(policy.schedule.train_alpha_bar), (count,)), torch.randn(count, *shape)


def denoising_loss(
    policy: Policy,
    x_0: Tensor,
    prompt_embeds: Tensor,
    label: Tensor,
    timestep: Tensor,
    noise: Tensor,
    *,
    guided: bool = False,
) -> Tensor:
    """Return |eps - eps_theta(x_t, t, c, y)|^2 of each picture, mean over dims, `[b]`.

    Args:
        policy: eps_theta.
        x_0: `[b, C, H, W]`.
        prompt_embeds: `[b, L, E]`.
        label: `[b, A]`.
        timestep: t, `[b]`.
        noise: eps, `[b, C, H, W]`.
        guided: through classifier-free guidance, as DDPO's code for RWR does; else the raw prediction.

    Source: DDPM, arXiv:2006.11239, eq. 14.
    """
    timestep, noise = timestep.to(x_0.device), noise.to(x_0)
    noisy = policy.schedule.add_noise(x_0, noise, timestep)
    obs: Observation = {
        "latents": noisy,
        "timestep": timestep,
        "prompt_embeds": prompt_embeds,
        "label": label,
    }
    eps = policy.guided_eps(obs) if guided else policy.eps(obs)
    return (eps - noise).square().flatten(1).mean(1)
