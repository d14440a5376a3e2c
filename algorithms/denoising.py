"""The denoising loss: what a diffusion model is trained by, on whatever pictures. Shapes: B pictures."""

import torch
from torch import Tensor

from diffrl.policy import Policy


def denoising_loss(
    policy: Policy, x_0: Tensor, prompt_embeds: Tensor, label: Tensor, *, guided: bool = False
) -> Tensor:
    """Return E|eps - eps_theta(x_t, t, c, y)|^2 at one random time for each picture, mean over dims, `[B]`.

    Args:
        policy: eps_theta.
        x_0: `[B, C, H, W]`.
        prompt_embeds: `[B, L, E]`.
        label: `[B, A]`.
        guided: through classifier-free guidance, as DDPO's code for RWR does; else the raw prediction.

    Source: DDPM, arXiv:2006.11239, eq. 14.
    """
    schedule = policy.schedule
    timestep = torch.randint(len(schedule.train_alpha_bar), (len(x_0),)).to(x_0.device)
    noise = torch.randn(x_0.shape).to(x_0)
    noisy = schedule.add_noise(x_0, noise, timestep)
    predict = policy.guided_eps if guided else policy.eps
    return (predict(noisy, timestep, prompt_embeds, label) - noise).square().flatten(1).mean(1)
