"""The denoising loss: what a diffusion model is trained by, on whatever pictures. Shapes: B pictures."""

import torch
from torch import Tensor

from diffrl.policy import Policy


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
    """Return |eps - eps_theta(x_t, t, c, y)|^2 of each picture, mean over dims, `[B]`.

    Args:
        policy: eps_theta.
        x_0: `[B, C, H, W]`.
        prompt_embeds: `[B, L, E]`.
        label: `[B, A]`.
        timestep: t, `[B]`.
        noise: eps, `[B, C, H, W]`.
        guided: through classifier-free guidance, as DDPO's code for RWR does; else the raw prediction.

    Source: DDPM, arXiv:2006.11239, eq. 14.
    """
    timestep, noise = timestep.to(x_0.device), noise.to(x_0)
    noisy = policy.schedule.add_noise(x_0, noise, timestep)
    predict = policy.guided_eps if guided else policy.eps
    return (predict(noisy, timestep, prompt_embeds, label) - noise).square().flatten(1).mean(1)
