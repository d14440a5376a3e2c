"""Reward back-propagation: DRaFT-K, DRaFT-LV and AlignProp, by how the chain is cut.

Sources: DRaFT, arXiv:2309.17400 (the last K steps; LV, re-noised last steps); AlignProp, arXiv:2310.03739
(a random number of last steps).

    DRaFT-K    algo.truncation.kind=last algo.truncation.count=K algo.truncation.path=network env.eta=0
    DRaFT-LV   algo.variance_samples=2 env.eta=0
    AlignProp  +experiment=alignprop
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from diffrl.algorithms.pathwise import Pathwise
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.types import Observation, Trajectory


@dataclass
class RewardBackprop(Pathwise):
    """Maximise the expected reward by its pathwise gradient; without a KL it collapses in the end."""

    kl: float = 0.0  # weight of the KL to the pretrained model, in units of the reward a nat
    variance_samples: int = 0  # DRaFT-LV's n: re-noised last steps a picture; 0: off

    restraint: ClassVar[str] = "Raise algo.kl, or give algo.kl=0.001 algo.kl_budget=NATS."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl < 0:
            raise DiffRLError(f"algo.kl={self.kl}: must be 0 or more.")
        if self.variance_samples < 0:
            raise DiffRLError(f"algo.variance_samples={self.variance_samples}: must be 0 or more.")
        if self.variance_samples and self.kl:
            raise DiffRLError(
                f"algo.variance_samples={self.variance_samples} algo.kl={self.kl}: DRaFT-LV sees the last "
                "step alone and has no KL of the chain; set one of them to 0."
            )

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether there is a KL."""
        return self.kl > 0

    @property
    def kl_weight(self) -> float:
        """The setting `kl`."""
        return self.kl

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch with its graph: of the kept steps, or of the re-noised last ones."""
        if not self.variance_samples:
            return super().collect(env, policy, generator)
        trajectory = rollout(env, policy, generator)
        context, x_0 = trajectory.context, trajectory.latents[-1]
        last, rewards = env.schedule.timesteps[-1].expand(len(x_0)), []
        for _ in range(self.variance_samples):
            fresh = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0)
            obs: Observation = {
                "latents": env.schedule.add_noise(x_0, fresh, last),
                "timestep": last,
                "prompt_embeds": context.prompt_embeds,
                "label": context.label,
            }
            rewards.append(env.value(policy.act(obs, generator).prev_sample, context))
        return replace(trajectory, reward=torch.stack(rewards).mean(0))
