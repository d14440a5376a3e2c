"""CTRL's update as a plain loop, the way its reference implementations write it, to compare with.

The halves of guidance run apart, the reference is a second copy of the network, every prediction is made
with its graph and detached afterwards where the step is cut, and the autoencoder keeps all activations.
Each network call is checkpointed, as theirs are. Gradient, noise and precision are those of `CTRL`.
Shapes: N pictures, d latent dims.
"""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from diffrl.algorithms.ctrl import CTRL
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.policy import Policy, without_label, without_prompt
from diffrl.types import Observation


class PlainLoop:
    """One CTRL update at a time, by the chain rule and nothing else.

    Args:
        algo: gives truncation, weight and reduction of the KL, and the optimiser's step; along the chain
            (`path=network`), with the KL of every step (`kl_steps=None`).
        policy: is trained.
        env: resets, and holds autoencoder and reward.
    """

    def __init__(self, algo: CTRL, policy: Policy, env: DenoisingVectorEnv) -> None:
        self.algo, self.policy, self.env = algo, policy, env
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        for layer in self.reference.unet.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)

    def update(self, optimizer: Optimizer, generator: torch.Generator) -> dict[str, float]:
        """Draw N pictures, back-propagate through all steps, step once, and return the metrics."""
        schedule = self.policy.schedule
        obs, _ = self.env.reset()
        x_t, kl = obs["latents"], torch.zeros(len(obs["latents"]), device=obs["latents"].device)
        for i, keep in enumerate(self.algo.truncation.kept(schedule.num_steps, generator)):
            obs = {**obs, "latents": x_t, "timestep": schedule.timesteps[i].expand(len(x_t))}
            eps = self._guided(self.policy, obs)
            eps_ref = self._guided(self.reference, without_label(obs))
            if not keep:
                eps, eps_ref = eps.detach(), eps_ref.detach()
            mean, mean_ref = (schedule.x_gain[i] * x_t + schedule.eps_gain[i] * e for e in (eps, eps_ref))
            kl = kl + (mean - mean_ref).square().flatten(1).sum(1) / (2 * schedule.sigma[i] ** 2)
            x_t = mean + schedule.sigma[i] * torch.randn(
                mean.shape, generator=generator, device=generator.device, dtype=mean.dtype
            )
        reward = self.env.reward(self._decode(x_t), self.env.context)
        per_dim = kl / x_t[0].numel()
        penalty = kl if self.algo.kl_reduction == "sum" else per_dim
        loss = -(reward - self.algo.kl_weight * penalty).mean()
        loss.backward()
        metrics = {
            "rollout/reward_mean": reward,
            "rollout/kl": kl,
            "rollout/kl_mean": per_dim,
            "train/loss": loss,
        }
        means = {name: float(value.detach().mean()) for name, value in metrics.items()}
        return means | self.algo.step(self.policy, optimizer)

    def _guided(self, network: Policy, obs: Observation) -> Tensor:
        """Return eps_u + w (eps_c - eps_u), each half a network call of its own."""

        def call(obs: Observation) -> Tensor:
            self.policy.num_calls += len(obs["label"])
            inputs = (obs["latents"], obs["timestep"], obs["prompt_embeds"], obs["label"])
            return checkpoint(network._eps, *inputs, use_reentrant=False, preserve_rng_state=False)

        conditional = call(obs)
        if network.guidance_scale == 1.0:
            return conditional
        unconditional = call(without_prompt(without_label(obs), network.null_embeds))
        return unconditional + network.guidance_scale * (conditional - unconditional)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.env.backbone.vae  # type: ignore[attr-defined]
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)
