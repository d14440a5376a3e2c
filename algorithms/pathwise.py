"""Direct back-propagation of a differentiable reward through the denoising chain, with or without a KL.

What CTRL and the reward back-propagation methods share. Shapes: N envs, T steps.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.optim import Optimizer

from diffrl.algorithms.base import Algorithm, check_choice
from diffrl.algorithms.truncation import Truncation
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class Pathwise(Algorithm):
    """Maximise E[r(x_0, c, y) - w sum_t KL(p_theta || p_ref)] by its pathwise gradient."""

    learning_rate: float = 1e-3  # of the LoRA weights
    kl_reduction: str = "sum"  # over latent dims: sum (nats) or mean (CTRL's code)
    kl_steps: int | None = 1  # steps, drawn by their share of the KL, that estimate it; null: all
    truncation: Truncation = field(default_factory=Truncation)

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algo.kl_reduction", self.kl_reduction, ("sum", "mean"))
        if self.kl_steps is not None and self.kl_steps < 1:
            raise DiffRLError(f"algo.kl_steps={self.kl_steps}: must be 1 or more, or null for all.")

    @property
    @abstractmethod
    def kl_weight(self) -> float:
        """w, in units of the reward; 0: no KL is computed."""

    @property
    def target_gamma(self) -> float | None:
        """One over the weight of the KL."""
        return 1 / self.kl_weight if self.kl_weight else None

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch, with the graph of the steps that truncation keeps."""
        schedule = env.schedule
        weights = None
        if self.kl_weight and self.kl_steps is not None:
            # importance sampling: kappa is a step's share of the KL if |eps - eps_ref| is alike at all
            share = (schedule.kappa / schedule.kappa.sum()).to(generator.device)
            drawn = share.multinomial(self.kl_steps, replacement=True, generator=generator)
            times = drawn.bincount(minlength=schedule.num_steps)
            weights = (times / (self.kl_steps * share)).tolist()
        return rollout(
            env,
            policy,
            generator,
            reference=policy.reference if self.kl_weight else None,
            grad_steps=self.truncation.kept(schedule.num_steps, generator),
            kl_weights=weights,
            posterior_mean=policy.posterior_mean if self.truncation.path == "posterior_mean" else None,
        )

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Back-propagate through each micro-batch, then step once."""
        share = self.micro_batch_size / self.batch_size
        total: dict[str, float] = {}
        for trajectory in trajectories:
            objective, metrics = trajectory.reward, {"rollout/reward_mean": trajectory.reward.mean()}
            if trajectory.kl is not None:
                kl = trajectory.kl.sum(0)  # or its unbiased estimate
                per_dim = kl / trajectory.latents[0][0].numel()
                objective = objective - self.kl_weight * (kl if self.kl_reduction == "sum" else per_dim)
                metrics |= {"rollout/kl": kl.mean(), "rollout/kl_mean": per_dim.mean()}
            loss = -objective.mean()
            (share * loss).backward()
            for name, value in (metrics | {"train/loss": loss}).items():
                total[name] = total.get(name, 0.0) + share * float(value.detach())
        return total | self.step(policy, optimizer)
