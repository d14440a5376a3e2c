"""RWR: sample, weigh by the reward, fit the denoising loss; again for so many rounds.

Sources: DDPO, arXiv:2305.13301, section 4.2 and the code of its JAX version (exponential weights, and
the sparse ones); the fit to the pretrained model's own samples, weights p(y|x, c)^gamma: CTRL,
arXiv:2406.12120, appendix G.2. Shapes: B pictures.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffrl import processes
from diffrl.algorithms.advantages import Group, groups_of
from diffrl.algorithms.base import check_choice
from diffrl.algorithms.denoising import DenoisingFit, denoising_loss
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy, Pretrained
from diffrl.rollout import rollout
from diffrl.types import Trajectory


@dataclass
class RWR(DenoisingFit):
    """Fit E[w |eps - eps_theta(x_t, t, c, y)|^2] to pictures weighed by their reward.

    With `source=policy` each round starts from the last one's samples (the published method). With
    `source=pretrained` and r = log p(y|x, c), the limit is p_ref(x|c) p(y|x, c)^gamma / Z.
    One update is one round. Differs from the published code, which decodes its samples and fits to the
    autoencoder's of them: here x_0 is the sampler's own.
    """

    source: str = "policy"  # of the pictures: policy or pretrained
    weights: str = "exponential"  # exponential, percentile or threshold
    gamma: float = 0.2  # in exp(gamma r); published: 1/5 for JPEG sizes in kB
    percentile: float = 90.0  # of the rewards: it and what is above are kept, at weight 1
    threshold: float = 0.65  # the least reward that is kept, at weight 1
    per_prompt: bool = False  # softmax and percentile within each (prompt, label), not over the batch
    train_guidance: bool = True  # through classifier-free guidance, as the published code does

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algo.source", self.source, ("policy", "pretrained"))
        check_choice("algo.weights", self.weights, ("exponential", "percentile", "threshold"))
        if not 0 < self.gamma < math.inf:
            raise DiffRLError(f"algo.gamma={self.gamma}: must be positive and finite.")
        if not 0 <= self.percentile < 100:
            raise DiffRLError(f"algo.percentile={self.percentile}: must be 0 or more and below 100.")

    def target_gamma(self, num_dims: int) -> float | None:
        """Return the exponent, if rounds start from the pretrained model; else it grows with the rounds."""
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
        if not weight.any():
            raise DiffRLError(
                f"algo.threshold={self.threshold}: none of {len(weight)} rewards reaches it, the best is "
                f"{float(reward.max()):.3f}. Lower it, or use algo.weights=percentile."
            )
        share = weight / weight.sum()
        return self.fit(batch, weight, policy, optimizer) | {
            "rollout/reward_mean": float(reward.mean()),
            "train/effective_pictures": float(1 / share.square().sum()),
        }

    def losses(
        self, policy: Policy, x_0: Tensor, prompt_embeds: Tensor, label: Tensor, *drawn: Tensor
    ) -> Tensor:
        """Return the loss of each picture, `[b]`, guided as `train_guidance` says."""
        return denoising_loss(policy, x_0, prompt_embeds, label, *drawn, guided=self.train_guidance)

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
