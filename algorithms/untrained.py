"""No training: the pretrained model, as a baseline and for guidance."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.optim import Optimizer

from diffrl.algorithms.base import Algorithm
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class Untrained(Algorithm):
    """Nothing is trained: the pretrained model as it is, alone or with `guidance=`."""

    updates: int = 0

    fewest_updates: ClassVar[int] = 0
    needs_gradient: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch of the policy's episodes."""
        return rollout(env, policy, generator)

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Learn nothing."""
        rewards = torch.cat([trajectory.reward for trajectory in trajectories])
        return {"rollout/reward_mean": float(rewards.mean())}
