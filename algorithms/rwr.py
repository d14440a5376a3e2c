"""RWR: sample, weigh by the reward, fit the denoising loss; again for so many rounds.

Sources: DDPO, arXiv:2305.13301, section 4.2 and the code of its JAX version (exponential weights, and
the sparse ones); the fit to the pretrained model's own samples, weights p(y|x, c)^gamma: CTRL,
arXiv:2406.12120, appendix G.2. Shapes: B pictures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffrl import processes
from diffrl.algorithms.advantages import Group, groups_of
from diffrl.algorithms.base import Algorithm, batches, check_choice
from diffrl.algorithms.denoising import denoising_loss, draw_noise
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy, Pretrained
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class RWR(Algorithm):
    """Fit E[w |eps - eps_theta(x_t, t, c, y)|^2] to pictures weighed by their reward.

    With `source=policy` each round starts from the last one's samples (the published method). With
    `source=pretrained` and r = log p(y|x, c), the limit is p_ref(x|c) p(y|x, c)^gamma / Z.
    One update is one round.
    """

    source: str = "policy"  # of the pictures: policy or pretrained
    weights: str = "exponential"  # exponential, percentile or threshold
    gamma: float = 0.2  # in exp(gamma r); published: 1/5 for JPEG sizes in kB
    percentile: float = 90.0  # of the rewards: what is above is kept, at weight 1
    threshold: float = 0.65  # the least reward that is kept, at weight 1
    per_prompt: bool = False  # softmax and percentile within each (prompt, label), not over the batch
    epochs: int = 5  # over the pictures of a round
    fit_batch_size: int = 16  # pictures an optimiser step
    train_guidance: bool = True  # through classifier-free guidance, as the published code does

    needs_gradient: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algo.source", self.source, ("policy", "pretrained"))
        check_choice("algo.weights", self.weights, ("exponential", "percentile", "threshold"))
        for name in ("epochs", "fit_batch_size"):
            if getattr(self, name) < 1:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be 1 or more.")
        if not self.gamma > 0:
            raise DiffRLError(f"algo.gamma={self.gamma}: must be positive.")
        if not 0 <= self.percentile < 100:
            raise DiffRLError(f"algo.percentile={self.percentile}: must be 0 or more and below 100.")

    @property
    def target_gamma(self) -> float | None:
        """The exponent, if each round starts from the pretrained model; else it grows with the rounds."""
        return self.gamma if self.source == "pretrained" and self.weights == "exponential" else None

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch of episodes of the policy, or of the pretrained model."""
        actor = Pretrained(policy) if self.source == "pretrained" else policy
        return rollout(env, actor, generator)

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Weigh the round's pictures and fit the denoiser to them."""
        batch = Trajectory.cat([trajectory.result() for trajectory in trajectories])
        reward = processes.joined(batch.reward)
        weight = self.weigh(reward, processes.gathered(groups_of(batch.context)))
        kept = weight.nonzero()[:, 0].cpu()  # pictures of weight 0 teach nothing
        if not len(kept):
            raise DiffRLError(
                f"algo.threshold={self.threshold}: none of {len(weight)} rewards reaches it, the best is "
                f"{float(reward.max()):.3f}. Lower it, or use algo.weights=percentile."
            )
        ours, x_0 = processes.place(len(batch.context)), batch.latents[-1]
        total, steps, norms = 0.0, 0, {}
        for _ in range(self.epochs):
            for samples in kept[torch.randperm(len(kept))].split(self.fit_batch_size):
                timestep, noise = draw_noise(policy, len(samples), x_0.shape[1:])
                for part in batches(processes.among(samples, ours), self.micro_batch_size):
                    own = (samples[part] - ours.start).to(x_0.device)
                    embeds, label = batch.context.prompt_embeds[own], batch.context.label[own]
                    drawn = timestep[part], noise[part]
                    losses = denoising_loss(
                        policy, x_0[own], embeds, label, *drawn, guided=self.train_guidance
                    )
                    loss = (weight[samples[part]] * losses).sum() / len(samples)
                    loss.backward()
                    total += float(loss.detach())
                norms = self.step(policy, optimizer)
                steps += 1
        share = weight / weight.sum()
        return (
            norms
            | processes.summed({"train/loss": total / steps})
            | {
                "rollout/reward_mean": float(reward.mean()),
                "train/effective_pictures": float(1 / share.square().sum()),
            }
        )

    def weigh(self, rewards: Tensor, groups: Sequence[Group]) -> Tensor:
        """Return the weight of each picture, `[B]`: 1 on average if exponential, 0 or 1 if sparse.

        Args:
            rewards: `[B]`.
            groups: the prompt and label of each.
        """
        members_of: dict[Group | None, list[int]] = {}
        for number, group in enumerate(groups):
            members_of.setdefault(group if self.per_prompt else None, []).append(number)
        weight = torch.zeros_like(rewards)
        for members in members_of.values():
            reward = rewards[members]
            if self.weights == "exponential":
                weight[members] = len(members) * (self.gamma * reward).softmax(0)
            elif self.weights == "percentile":
                weight[members] = (reward >= reward.quantile(self.percentile / 100)).to(weight)
            else:
                weight[members] = (reward >= self.threshold).to(weight)
        return weight
