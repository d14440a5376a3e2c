"""DDPO: policy gradients on the denoising MDP, reward a black box.

DDPO-IS clips an importance-sampled surrogate and reuses each batch for several steps; DDPO-SF is
REINFORCE, one step a batch. Sources: arXiv:2305.13301, section 4.3, and the authors' code; the two forms
of the KL: CTRL, arXiv:2406.12120, appendix G.2. Shapes: B pictures of a batch, T steps, d latent dims.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.optim import Optimizer

from diffrl import processes
from diffrl.algorithms.advantages import SMALLEST_STD, GroupStatistics, groups_of, standardise
from diffrl.algorithms.base import Algorithm, batches, check_choice, dealt, over_steps
from diffrl.algorithms.kl_budget import KLBudget
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class DDPO(Algorithm):
    """Maximise E[r(x_0, c, y)], or with `kl` w > 0 E[r - w sum_t KL(p_theta || p_ref)], from samples alone.

    One update collects `batch_size` pictures, then takes `inner_epochs` x `minibatches` optimiser steps.
    """

    estimator: str = "is"  # is: importance sampling with clipping; sf: score function
    minibatches: int = 2  # optimiser steps an inner epoch
    inner_epochs: int = 1  # times that a batch is learnt from
    clip_range: float = 1e-4  # of the ratio, for log-probabilities averaged over latent dims
    log_prob_reduction: str = "mean"  # over latent dims: mean (DDPO's code) or sum (the density itself)
    advantage_clip: float = 5.0  # of standardised rewards: 5 in DDPO's PyTorch code, 10 in JAX
    timestep_fraction: float = 1.0  # of a picture's steps that are trained on, drawn for each picture
    per_prompt: bool = True  # statistics of each (prompt, label) rather than of the batch
    group_size: int = 1  # pictures of an update that share both, and compete at once (GRPO)
    buffer_size: int = 16  # rewards remembered for each
    min_count: int = 16  # with fewer, the batch's statistics stand in
    kl: float = 0.0  # weight of the KL to the pretrained model, in units of the reward a nat
    kl_budget: float | None = None  # nats that the KL of the rollouts is to come to: its weight adapts
    kl_form: str = "loss"  # reward: sampled log-ratios in the return; loss: analytic KL, both halves

    needs_gradient: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = True
    restraint: ClassVar[str] = "Raise algo.kl, or give algo.kl=0.001 algo.kl_budget=NATS."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algo.estimator", self.estimator, ("is", "sf"))
        check_choice("algo.log_prob_reduction", self.log_prob_reduction, ("mean", "sum"))
        check_choice("algo.kl_form", self.kl_form, ("reward", "loss"))
        for name in ("minibatches", "inner_epochs", "group_size", "buffer_size", "min_count"):
            if getattr(self, name) < 1:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be 1 or more.")
        for name in ("clip_range", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be positive.")
        if not 0 < self.timestep_fraction <= 1:
            raise DiffRLError(
                f"algo.timestep_fraction={self.timestep_fraction}: must be above 0 and at most 1."
            )
        if self.kl < 0:
            raise DiffRLError(f"algo.kl={self.kl}: must be 0 or more.")
        if self.batch_size % self.minibatches:
            raise DiffRLError(
                f"algo.minibatches={self.minibatches}: does not divide algo.batch_size={self.batch_size}."
            )
        if self.micro_batch_size % self.group_size:
            raise DiffRLError(
                f"algo.group_size={self.group_size}: does not divide algo.micro_batch_size="
                f"{self.micro_batch_size}."
            )
        if self.estimator == "sf" and self.minibatches * self.inner_epochs > 1:
            raise DiffRLError(
                f"algo.estimator=sf algo.minibatches={self.minibatches} algo.inner_epochs="
                f"{self.inner_epochs}: the score function is right for one step a batch; set both to 1."
            )
        if self.estimator == "is" and (self.clip_range < 1e-2) != (self.log_prob_reduction == "mean"):
            warnings.warn(
                f"algo.clip_range={self.clip_range} algo.log_prob_reduction={self.log_prob_reduction}: "
                "a mean over thousands of dims never reaches a range of .1, and a sum always passes 1e-4. "
                "Pair mean with 1e-4, sum with 0.1 to 0.2.",
                stacklevel=2,
            )
        self.statistics = GroupStatistics(self.buffer_size, self.min_count)
        self.budget = KLBudget(self.kl_budget, self.kl)

    def target_gamma(self, num_dims: int) -> float | None:
        """Return one over the weight of the KL."""
        return 1 / self.kl if self.kl else None

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch of episodes, without a graph."""
        return rollout(env, policy, generator, reference=policy.reference if self.kl else None)

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Turn rewards into advantages, then step on every minibatch."""
        batch = Trajectory.cat([trajectory.without_images() for trajectory in trajectories])
        rewards = processes.joined(batch.reward)
        ours = processes.place(len(batch.context))
        advantages, kl_weight = self._advantages(batch, rewards, ours)
        num_steps = len(advantages)
        trained_steps = max(round(self.timestep_fraction * num_steps), 1)
        total: dict[str, Tensor] = {}  # added up where they are: a look at a number waits for the device
        steps: list[dict[str, float]] = []
        for _ in range(self.inner_epochs):
            for samples in dealt(torch.arange(len(rewards)), self.minibatches):
                # each picture's steps in an order of its own, and of these the first so many
                order = torch.rand(len(samples), num_steps).argsort(1)[:, :trained_steps]
                pairs = torch.stack([samples[:, None].expand_as(order) - ours.start, order], -1)
                own = pairs[processes.among(samples, ours)].view(-1, 2).to(advantages.device)
                for part in batches(own, self.micro_batch_size):
                    sample, step = part.unbind(1)
                    chosen = advantages[step, sample], kl_weight[sample]
                    loss, seen = self._loss(batch, *chosen, part, policy)
                    (loss.sum() / order.numel()).backward()
                    for name, value in seen.items():
                        share = len(part) / order.numel() / (self.inner_epochs * self.minibatches)
                        total[name] = total.get(name, 0.0) + share * value
                steps.append(self.step(policy, optimizer))
        metrics = {name: float(value) for name, value in total.items()}
        if batch.kl is not None:
            metrics["rollout/kl"] = float(batch.kl.sum()) / len(rewards)
        metrics = processes.summed(metrics) | {"rollout/reward_mean": float(rewards.mean())}
        return metrics | self.budget.learn(metrics.get("rollout/kl", 0.0)) | over_steps(steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards of each group that are remembered, and the budget's factor."""
        return self.statistics.state_dict() | self.budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.statistics.load_state_dict(state)
        self.budget.load_state_dict(state)

    def _advantages(self, batch: Trajectory, rewards: Tensor, ours: slice) -> tuple[Tensor, Tensor]:
        """Return the advantage of every decision, `[T, B]`, and the weight of its KL as a loss, `[B]`.

        Of the batch, which is `ours` of all processes' pictures; `rewards` are all of theirs.
        """
        if self.per_prompt:
            groups = processes.gathered(groups_of(batch.context))
            mean, std = self.statistics.update(groups, rewards)
        else:
            mean, std = rewards.mean(), rewards.std(unbiased=False)
        standardised = standardise(rewards, mean, std, self.advantage_clip)
        advantages = standardised[ours].expand(len(batch.timesteps), -1)
        # the KL is measured in the units that the standardised rewards have; 1 where they are all alike
        unit = torch.where(std > SMALLEST_STD, std, 1.0).expand(len(rewards))[ours]
        weight = self.kl * self.budget.factor / unit
        if not self.kl:
            return advantages, weight
        assert batch.kl is not None
        assert batch.log_ratio is not None
        penalty = batch.log_ratio if self.kl_form == "reward" else batch.kl.detach()
        to_go = penalty.flip(0).cumsum(0).flip(0)
        if self.kl_form == "loss":
            to_go = to_go - penalty  # a step's own KL has its gradient in the loss
        baseline = processes.joined(to_go, 1).mean(1, keepdim=True)
        return advantages - weight * (to_go - baseline), weight

    def _loss(
        self, batch: Trajectory, advantage: Tensor, kl_weight: Tensor, pairs: Tensor, policy: Policy
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair (sample, step), `[P]`, and what is worth logging."""
        sample, step = pairs.unbind(1)
        obs, action = batch.decision(sample, step)
        law = policy(obs)
        log_prob = law.log_prob(action)
        assert batch.log_prob is not None
        scale = 1 / action[0].numel() if self.log_prob_reduction == "mean" else 1.0
        log_ratio = scale * (log_prob - batch.log_prob[step, sample])
        ratio = log_ratio.exp()
        if self.estimator == "sf":
            loss = -advantage * scale * log_prob
        else:
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        if self.kl and self.kl_form == "loss":
            with torch.no_grad():  # at a given x_t it is a constant, but its null label would have a graph
                reference = policy.reference(obs)
            loss = loss + scale * kl_weight * kl_divergence(law, reference)
        seen = {
            "train/loss": loss.mean(),
            "train/ratio_deviation": (ratio - 1).abs().mean(),
            "train/clip_fraction": ((ratio - 1).abs() > self.clip_range).float().mean(),
        }
        return loss, {name: value.detach() for name, value in seen.items()}
