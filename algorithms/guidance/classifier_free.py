"""Classifier-free guidance in the label: away from what the policy draws without it.

Source: arXiv:2207.12598; with a scale each for prompt and label, arXiv:2211.09800, eq. 3.
Shapes: N samples. Notation: e(c, y) the noise prediction, 0 where prompt or label is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.algorithms.guidance.base import Guidance, check_strength
from diffrl.errors import DiffRLError
from diffrl.policy import without_label, without_prompt
from diffrl.types import ActorStep, Observation, draw


@dataclass
class ClassifierFreeGuidance(Guidance):
    """eps = e(c, 0) + s (e(c, y) - e(c, 0)), each with the model's own guidance by the prompt.

    With that at scale w, it is the three-way e(0, 0) + w (e(c, 0) - e(0, 0)) + w s (e(c, y) - e(c, 0)). For
    a policy that knows its label: `algo=classifier_free`, or any other. Above 1 the law is sharper than
    p(x|c, y), and no power of it.

    `published` is e(0, y) + w (e(c, y) - e(0, y)), as the baseline of CTRL (arXiv:2406.12120) samples: its
    model has no null label.
    """

    scale: float = 2.0  # s; 1 is the policy itself
    published: bool = False  # CTRL's baseline: the label in the empty prompt's half too, so no s of its own

    needs_gradient: ClassVar[bool] = False
    needs_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_strength("scale", self.scale)
        if self.published and self.scale != 1:
            raise DiffRLError(
                f"guidance.published=true guidance.scale={self.scale}: with the label in both halves "
                "nothing is without it to lead away from; use guidance.scale=1."
            )

    @torch.no_grad()
    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return a draw from the guided step."""
        law = self.schedule.step(obs["latents"], self._eps(obs), obs["timestep"])
        return ActorStep(draw(law, generator), law)

    def _eps(self, obs: Observation) -> Tensor:
        policy = self.policy
        if self.published:
            return self._of_both_halves(obs)
        if self.scale == 1.0:
            return policy.guided_eps(obs)
        if policy.guidance_scale != 1.0 and policy.control_scale == 1.0:
            return self._three_way(obs)
        eps, without = policy.guided_eps(obs), policy.guided_eps(without_label(obs))
        return without + self.scale * (eps - without)

    def _three_way(self, obs: Observation) -> Tensor:
        """Return the three-way prediction in one call: two guided ones would ask e(0, 0) twice."""
        embeds, no_label = obs["prompt_embeds"], without_label(obs)["label"]
        three: Observation = {
            "latents": obs["latents"].repeat(3, 1, 1, 1),
            "timestep": obs["timestep"].repeat(3),
            "prompt_embeds": torch.cat([self.policy.null_embeds.expand_as(embeds), embeds, embeds]),
            "label": torch.cat([no_label, no_label, obs["label"]]),
        }
        unprompted, prompted, controlled = self.policy.eps(three).chunk(3)
        without = unprompted + self.policy.guidance_scale * (prompted - unprompted)
        return without + self.policy.guidance_scale * self.scale * (controlled - prompted)

    def _of_both_halves(self, obs: Observation) -> Tensor:
        """Return e(0, y) + w (e(c, y) - e(0, y)): w acts on the prompt alone, and y has weight 1."""
        eps, scale = self.policy.eps(obs), self.policy.guidance_scale
        if scale == 1.0:
            return eps
        without = self.policy.eps(without_prompt(obs, self.policy.null_embeds))
        return without + scale * (eps - without)
