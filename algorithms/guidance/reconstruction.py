"""Reconstruction guidance: the gradient of the reward at the predicted x_0, in every step.

Source: diffusion posterior sampling, arXiv:2209.14687; the frozen form is that of CTRL's comparison,
arXiv:2406.12120, section 6. Shapes: N samples.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.algorithms.base import check_choice
from diffrl.algorithms.guidance.base import FORMS, Guidance, check_strength
from diffrl.types import ActorStep, Observation, draw


@dataclass
class Reconstruction(Guidance):
    """g = grad_{x_t} r(x0hat(x_t)) shifts each step's mean: log p(y|x_t) by its value at x0hat.

    Exact in continuous time for a Gaussian prior and a linear reward. Otherwise the variance of x_0 given
    x_t is left out: for a concave log p(y|.) the posterior comes out too narrow, too far into the class.

    As in CTRL's comparison: `jacobian=frozen over_batch=true offset=1e-6`; its scale is another for each
    class, and not told.
    """

    scale: float = 1.0  # s, what g is multiplied by; gamma, if r is log p(y|x)
    jacobian: str = "full"  # of x0hat: full (DPS), or frozen: the noise prediction counts as a constant
    form: str = "eps"  # eps: eps - s sqrt(1 - A) g (the score of a posterior); sigma2: mean + s sigma^2 g
    over_batch: bool = False  # the published comparison's mean of r over the batch: g shrinks by 1 / N
    offset: float = 0.0  # r becomes log(exp(r) + offset); the published comparison: 1e-6, an attribute

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_strength("scale", self.scale)
        check_strength("offset", self.offset)
        check_choice("guidance.jacobian", self.jacobian, ("full", "frozen"))
        check_choice("guidance.form", self.form, FORMS)

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether the shift is a multiple of sigma^2."""
        return self.form == "sigma2"

    @property
    def target_gamma(self) -> float | None:
        """The scale, unless the batch has a say in what is drawn."""
        return None if self.over_batch else self.scale

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return a draw from the shifted step."""
        obs = {**obs, "latents": obs["latents"].detach()}
        eps, gradient = self._gradient(obs)
        law = self.steered(obs, eps, self.scale * gradient, self.form)
        return ActorStep(draw(law, generator), law)

    @torch.enable_grad()
    def _gradient(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Return the noise prediction and g, both `[N, C, H, W]` and without a graph."""
        x_t = obs["latents"].clone().requires_grad_()
        obs = {**obs, "latents": x_t}
        with torch.set_grad_enabled(self.jacobian == "full"):
            eps = self.policy.guided_eps(obs, in_chain=True)  # of the decoder and the reward
        reward = self.value(obs, eps)
        if self.offset:
            reward = (reward.exp() + self.offset).log()
        total = reward.mean() if self.over_batch else reward.sum()
        (gradient,) = torch.autograd.grad(total, x_t)
        return eps.detach(), gradient
