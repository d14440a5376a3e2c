"""An algorithm on one page: draw pictures, keep the better half, make them likelier.

diffrl train algo=best_half.py:BestHalf reward=jpeg algo.keep=0.25

A class derived from `Algorithm` is its settings (updates, batch_size, learning_rate, ... come with it), a
way to collect episodes and a way to learn from them. Seeds, checkpoints and evaluations are done for it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffrl.algorithms.base import Algorithm
from diffrl.errors import DiffRLError
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class BestHalf(Algorithm):
    """The cross-entropy method on the denoising steps: raise log p of the best pictures' actions."""

    keep: float = 0.5  # the share of a batch that is learnt from

    needs_gradient: ClassVar[bool] = False  # of the reward: any will do
    needs_noise: ClassVar[bool] = True  # a step must have a density, eta > 0

    def __post_init__(self):
        super().__post_init__()  # checks the settings that come with Algorithm
        if not 0 < self.keep < 1:
            raise DiffRLError(f"algo.keep={self.keep}: must be between 0 and 1.")

    def collect(self, env, policy, generator):
        """Return one micro-batch of episodes, without a graph; all noise is drawn from `generator`."""
        return rollout(env, policy, generator)

    def update(self, trajectories, policy, optimizer):
        """Take one step on the log-likelihood of the best pictures' steps, and return the metrics."""
        batch = Trajectory.cat(list(trajectories))  # of this process; ddpo.py shows how several share one
        count = max(round(self.keep * len(batch.reward)), 1)
        best = batch.reward.topk(count).indices
        num_steps, total = len(batch.timesteps), 0.0
        for step in range(num_steps):  # one at a time: one step's graph in memory
            obs, action = batch.decision(best, torch.full_like(best, step))
            # per dim and step, so that the learning rate does not depend on their number
            loss = -policy(obs).log_prob(action).mean() / action[0].numel() / num_steps
            loss.backward()
            total += float(loss.detach())
        norms = self.step(policy, optimizer)  # clips, steps, forgets the gradient
        reward = batch.reward
        return norms | {
            "rollout/reward_mean": float(reward.mean()),
            "rollout/reward_best": float(reward[best].mean()),
            "train/loss": total,
        }
