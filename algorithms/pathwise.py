"""Direct back-propagation of a differentiable reward through the denoising chain, with or without a KL.

What CTRL and the reward back-propagation methods share. Shapes: N envs, T steps.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffrl import processes
from diffrl.algorithms.base import Algorithm, check_choice
from diffrl.algorithms.kl_budget import KLBudget
from diffrl.algorithms.truncation import Truncation
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class Pathwise(Algorithm):
    """Maximise E[r(x_0, c, y) - w sum_t KL(p_theta || p_ref)] by its pathwise gradient.

    With `kl_steps`, the KL is estimated without bias: each kept step's over the chance of its being kept,
    and `kl_steps` of those that `truncation` never keeps; where it keeps all of them, `kl_steps` of all. So
    is its gradient through the whole chain (`truncation.kind=fixed truncation.path=network`); on the
    shorter paths a step's KL has its gradient at a constant x_t, which leaves out what an action does to
    the KL of later steps. With null the KL is measured at every step; it has its gradient there on the
    shorter paths, where the reward's is weighed up to all steps, and at the kept ones alone through the
    chain or where K is random (CTRL's code). A step that is measured costs a call of the reference.
    """

    learning_rate: float = 1e-3  # of the LoRA weights
    kl_reduction: str = "sum"  # over latent dims: sum (nats) or mean (CTRL's code)
    max_grad_norm: float = 10.0  # of LoRA and embedding; chosen on emoji, where few updates pass it
    kl_steps: int | None = 1  # drawn to stand in the KL for those never kept; null: all are measured
    kl_budget: float | None = None  # nats that the KL of the rollouts is to come to: its weight adapts
    truncation: Truncation = field(default_factory=Truncation)

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algo.kl_reduction", self.kl_reduction, ("sum", "mean"))
        if self.kl_steps is not None and self.kl_steps < 1:
            raise DiffRLError(f"algo.kl_steps={self.kl_steps}: must be 1 or more, or null for all.")
        if self.kl_weight and self.kl_steps is not None:
            self._check_chances()
        self.budget = KLBudget(self.kl_budget, self.kl_weight)

    def _check_chances(self) -> None:
        """Raise DiffRLError where a KL from some of the steps would be another than that of all."""
        path, kind = self.truncation.path, self.truncation.kind
        if self.truncation.chances(1) is None:
            raise DiffRLError(
                f"algo.kl_steps={self.kl_steps} algo.truncation.kind={kind}: a KL from some steps needs "
                "each one's chance of being kept, and here K is random. Use algo.kl_steps=null, or "
                "algo.truncation.kind=fixed, last or subset."
            )
        if path == "network" and kind == "subset":
            raise DiffRLError(
                f"algo.truncation.path={path} algo.truncation.kind={kind}: a kept step's KL would count "
                "one over its chance, its reward through the chain once, and the KL weigh too much. "
                "Use algo.truncation.kind=fixed, or as CTRL's code algo.kl_steps=null and kind=uniform."
            )

    @property
    @abstractmethod
    def kl_weight(self) -> float:
        """The weight w before a budget adapts it, in units of the reward; 0: no KL is computed."""

    def target_gamma(self, num_dims: int) -> float | None:
        """Return one over the summed KL's weight: of a mean over dims, each nat weighs so much less."""
        if not self.kl_weight:
            return None
        return (num_dims if self.kl_reduction == "mean" else 1) / self.kl_weight

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch, with the graph of the steps that truncation keeps."""
        posterior_mean = None  # through the chain
        if self.truncation.path == "posterior_mean":
            posterior_mean = policy.posterior_mean
        elif self.truncation.path == "normal":
            posterior_mean = env.schedule.normal_mean
        kept = self.truncation.kept(env.schedule.num_steps, generator)
        chances = self.truncation.chances(env.schedule.num_steps)
        factors: list[float] = [float(keep) for keep in kept]
        if chances is not None:
            factors = [keep / chance if keep else 0.0 for keep, chance in zip(kept, chances, strict=True)]
        weights = None
        if self.kl_weight and chances is not None:
            if self.kl_steps is not None:
                weights = self._kl_weights(env.schedule.kappa, factors, chances, generator)
            elif posterior_mean is not None:
                weights = [1.0] * len(kept)
        return rollout(
            env,
            policy,
            generator,
            reference=policy.reference if self.kl_weight else None,
            grad_steps=kept if posterior_mean is None else factors,
            kl_weights=weights,
            posterior_mean=posterior_mean,
            log_probs=False,
        )

    def _kl_weights(
        self, kappa: Tensor, factors: list[float], chances: list[float], generator: torch.Generator
    ) -> list[float]:
        """Return a weight on the KL of each step, whose mean over draws is 1; 0: it is not measured."""
        all_kept = min(chances) == 1.0  # then to measure what is kept would be to measure everything
        open_to_draw = torch.tensor([all_kept or chance == 0 for chance in chances])
        own = [0.0 if all_kept else factor for factor in factors]
        # importance sampling: kappa is a step's share of the KL if |eps - eps_ref| is alike at all
        share = kappa.to(generator.device) * open_to_draw.to(generator.device)
        if not share.any():
            return own
        assert self.kl_steps is not None
        share = share / share.sum()
        times = share.multinomial(self.kl_steps, replacement=True, generator=generator)
        times = times.bincount(minlength=len(share))
        drawn = torch.where(times > 0, times / (self.kl_steps * share), 0.0).tolist()
        return [a + b for a, b in zip(own, drawn, strict=True)]

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Back-propagate through each micro-batch, then step once."""
        share = self.micro_batch_size / self.batch_size
        weight = self.kl_weight * self.budget.factor
        total: dict[str, float] = {}
        for trajectory in trajectories:
            objective, seen = trajectory.reward, {"rollout/reward_mean": trajectory.reward.mean()}
            if trajectory.kl is not None:
                kl = trajectory.kl.sum(0)  # or its unbiased estimate
                per_dim = kl / trajectory.latents[0][0].numel()
                objective = objective - weight * (kl if self.kl_reduction == "sum" else per_dim)
                seen |= {"rollout/kl": kl.mean(), "rollout/kl_mean": per_dim.mean()}
            loss = -objective.mean()
            (share * loss).backward()
            for name, value in (seen | {"train/loss": loss}).items():
                total[name] = total.get(name, 0.0) + share * float(value.detach())
        metrics = processes.summed(total)
        metrics |= self.budget.learn(metrics.get("rollout/kl", 0.0))
        return metrics | self.step(policy, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return what the budget has made of the KL's weight."""
        return self.budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.budget.load_state_dict(state)
