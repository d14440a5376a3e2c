"""CTRL: direct back-propagation of gamma log p(y|x_0, c) - KL through the denoising chain.

Shapes: N envs, T steps. Source: CTRL, arXiv:2406.12120, algorithms 1 and 2.
"""

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
class CTRL(Algorithm):
    """Maximise J = E[gamma log p(y|x_0, c) - sum_t KL(p_theta || p_ref)] by its pathwise gradient.

    With the KL summed over latent dims, J <= log Z, and its maximiser is p_ref(x_0|c) p(y|x_0, c)^gamma / Z
    up to the law of x_T. Differs from CTRL's code, which takes the mean over the d latent dims:
    `kl_reduction=mean` reproduces it, and makes gamma d times as strong.
    """

    gamma: float = 10_000.0  # chosen on emoji; the paper's 10, with its mean KL, is as strong as 10 d
    kl_reduction: str = "sum"  # over latent dims: sum (nats) or mean (CTRL's code)
    kl_steps: int | None = 1  # steps, drawn by their share of the KL, that estimate it; null: all
    truncation: Truncation = field(default_factory=Truncation)

    needs_gradient: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algo.kl_reduction", self.kl_reduction, ("sum", "mean"))
        if self.kl_steps is not None and self.kl_steps < 1:
            raise DiffRLError(f"algo.kl_steps={self.kl_steps}: must be 1 or more, or null for all.")
        if self.gamma < 0:
            raise DiffRLError(f"algo.gamma={self.gamma}: must be 0 or more.")

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch, with the graph of the steps that truncation keeps."""
        schedule = env.schedule
        weights = None
        if self.kl_steps is not None:
            # importance sampling: kappa is a step's share of the KL if |eps - eps_ref| is alike at all
            share = (schedule.kappa / schedule.kappa.sum()).to(generator.device)
            drawn = share.multinomial(self.kl_steps, replacement=True, generator=generator)
            times = drawn.bincount(minlength=schedule.num_steps)
            weights = (times / (self.kl_steps * share)).tolist()
        return rollout(
            env,
            policy,
            generator,
            reference=policy.reference,
            grad_steps=self.truncation.kept(schedule.num_steps, generator),
            kl_weights=weights,
            path=self.truncation.path,
        )

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Back-propagate J through each micro-batch, then step once."""
        share = self.micro_batch_size / self.batch_size
        total: dict[str, float] = {}
        for trajectory in trajectories:
            assert trajectory.kl is not None
            num_dims = trajectory.latents[0][0].numel()
            kl = trajectory.kl.sum(0)  # or its unbiased estimate
            objective = self.gamma * trajectory.reward - kl
            trained = objective
            if self.kl_reduction == "mean":
                trained = self.gamma * trajectory.reward - kl / num_dims
            # Divided by gamma, so that the gradient's size, and its clipping, do not depend on gamma.
            loss = -trained.mean() / max(self.gamma, 1.0)
            (share * loss).backward()
            metrics = {
                "rollout/reward_mean": trajectory.reward.mean(),
                "rollout/kl": kl.mean(),
                "rollout/kl_mean": kl.mean() / num_dims,
                "rollout/objective": objective.mean(),
                "train/loss": loss,
            }
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + share * float(value.detach())
        return total | self.step(policy, optimizer)
