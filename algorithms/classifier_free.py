"""Classifier-free training: the denoiser learns p(x|c, y) from labelled pictures, c or y left out at times.

Sources: classifier-free guidance, arXiv:2207.12598; with a label beside the prompt it is the baseline of
CTRL, arXiv:2406.12120, section 6. Shapes: B pictures.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffrl import processes
from diffrl.algorithms.denoising import DenoisingFit, denoising_loss, draw_noise
from diffrl.datasets import Pictures, draw
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy, Pretrained
from diffrl.rollout import rollout
from diffrl.types import NO_LABEL, Autoencoder, Context, LabelledReward, Trajectory


@dataclass
class ClassifierFree(DenoisingFit):
    """Fit E|eps - eps_theta(x_t, t, c, y)|^2 to labelled pictures.

    They are those of `dataset`, drawn with replacement, each with its label and, if it has one, its prompt;
    or where there is no data set the pretrained model's own, with their true labels.

    With `env.guidance_scale=1` its limit is p(x|c, y) itself, and `guidance=classifier_free` sharpens it in
    y; with more, pictures drawn at that scale are learnt and guided by the prompt once more, as is usual.
    One update is a round of `batch_size` labelled pictures, fitted `epochs` times; `updates=1` is a data
    set of that size. Neither a reward's gradient nor a classifier is used.

    Differs from CTRL's baseline, which trains the whole U-Net without a null label: `drop_label=0
    drop_prompt=0` leaves nothing out, as it does, and `guidance=classifier_free guidance.published=true`
    samples as it does (`+experiment=classifier_free_paper`).
    """

    updates: int = 8
    batch_size: int = 512
    micro_batch_size: int = 64
    learning_rate: float = 1e-3  # of the LoRA weights
    embedding_learning_rate: float = 1e-2
    epochs: int = 4  # over the pictures of a round
    fit_batch_size: int = 32  # pictures an optimiser step
    drop_label: float = 0.1  # the share of pictures whose label is left out
    drop_prompt: float = 0.1  # the share whose prompt is, independently

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drop_label", "drop_prompt"):
            if not 0 <= getattr(self, name) < 1:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be 0 or more and below 1.")

    def target_gamma(self, num_dims: int) -> float | None:
        """Return 1: the posterior itself."""
        return 1.0

    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch of labelled pictures.

        Of the pretrained model they are whole episodes; of a data set only x_0 is known.
        """
        if env.dataset is not None:
            return self._read(env, env.dataset, generator)
        drawn = rollout(env, Pretrained(policy), generator)
        reward = cast(LabelledReward, env.reward)  # `needs_labels` has been checked
        label = reward.draw_label(drawn.images, generator).to(drawn.images.device)
        context = replace(drawn.context, label=label)
        return replace(drawn, context=context, reward=reward(drawn.images, context))

    def _read(self, env: DenoisingVectorEnv, dataset: Pictures, generator: torch.Generator) -> Trajectory:
        """Return triplets (x_0, c, y) of a data set as episodes of no step; no prompt is the empty one."""
        backbone, reward = cast(Autoencoder, env.backbone), cast(LabelledReward, env.reward)
        parts = []
        for batch in draw(dataset, env.num_envs, generator):
            images, prompts = batch.images.to(env.device), [prompt or "" for prompt in batch.prompts]
            label = reward.label_of(batch).to(env.device)
            context = Context(prompts, backbone.encode_prompts(prompts), label)
            parts.append(
                Trajectory(
                    latents=backbone.encode(images, generator)[None],
                    timesteps=[],
                    log_prob=None,
                    kl=None,
                    log_ratio=None,
                    reward=reward(images, context),
                    images=images,
                    context=context,
                )
            )
        return Trajectory.cat(parts)

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Fit the denoiser to the round's pictures."""
        batch = Trajectory.cat([trajectory.result() for trajectory in trajectories])
        reward = processes.joined(batch.reward)
        weight = torch.ones_like(reward)
        return self.fit(batch, weight, policy, optimizer) | {"rollout/reward_mean": float(reward.mean())}

    def draw(self, policy: Policy, count: int, shape: torch.Size) -> tuple[Tensor, ...]:
        """Return timestep, noise, and whose prompt and whose label are left out, bool `[count, 2]`."""
        return *draw_noise(policy, count, shape), self.draw_left_out(count)

    def draw_left_out(self, count: int) -> Tensor:
        """Return whose prompt and whose label are to be left out, bool `[count, 2]`, independently."""
        share = torch.tensor([self.drop_prompt, self.drop_label])
        return share > torch.rand(2, count).T

    def losses(
        self, policy: Policy, x_0: Tensor, prompt_embeds: Tensor, label: Tensor, *drawn: Tensor
    ) -> Tensor:
        """Return the loss of each picture, `[b]`, with its prompt, its label, or neither."""
        *noise, left_out = drawn
        no_prompt, no_label = left_out.to(x_0.device).T
        embeds = torch.where(no_prompt[:, None, None], policy.null_embeds, prompt_embeds)
        return denoising_loss(policy, x_0, embeds, label.masked_fill(no_label[:, None], NO_LABEL), *noise)
