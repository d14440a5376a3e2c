"""Manifold-preserving guided diffusion: a gradient step on the predicted x_0, none through the network.

Source: MPGD, arXiv:2311.16424, and its Stable Diffusion code for the step-size rule and the window.
Shapes: N samples. Notation: eps the guided noise prediction, eps_null the unconditional one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.algorithms.base import check_choice
from diffrl.algorithms.guidance.base import Guidance, check_strength, shifted
from diffrl.errors import DiffRLError
from diffrl.types import ActorStep, Observation, draw

_LEAST_RMS = 1e-12  # of a gradient, so that a flat reward moves nothing


@dataclass
class MPGD(Guidance):
    """x0hat + rho grad r(x0hat) in the place of x0hat, in some of the steps.

    A heuristic: no rho gives a posterior's mean and its width together; the law comes out too narrow.

    As its Stable Diffusion code: `step=normalised eps=rederive start=0.3 stop=0.7 over_batch=true`.
    """

    rho: float = 1.0  # step length, as `step` reads it
    step: str = "constant"  # constant: rho; normalised: rho rms(eps - eps_null) / rms(grad), as published
    eps: str = "keep"  # keep eps in the step's direction (the paper's line), or rederive it (its code)
    start: float = 0.0  # share of the trajectory from which on the reward is asked; published: 0.3
    stop: float = 1.0  # share from which on it is no longer; published: 0.7
    enough: float | None = None  # r from which on a picture is left alone; a normalised step never fades
    over_batch: bool = False  # the published code's rms, over the whole batch

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_strength("rho", self.rho)
        check_choice("guidance.step", self.step, ("constant", "normalised"))
        check_choice("guidance.eps", self.eps, ("keep", "rederive"))
        if not 0 <= self.start <= self.stop <= 1:
            raise DiffRLError(
                f"guidance.start={self.start} guidance.stop={self.stop}: must be shares of the trajectory "
                "between 0 and 1, in this order."
            )

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return a draw from the step with the moved x0hat."""
        obs = {**obs, "latents": obs["latents"].detach()}
        with torch.no_grad():
            eps = self.policy.guided_eps(obs)
        law = self.schedule.step(obs["latents"], eps, obs["timestep"])
        share = int(self.schedule.index(obs["timestep"])[0]) / self.schedule.num_steps
        if self.start <= share < self.stop:
            move = self._move(obs, eps)
            a, p = self.schedule.signals(obs)
            if self.eps == "keep":
                law = shifted(law, p.sqrt() * move)
            else:
                moved = eps - (a / (1 - a)).sqrt() * move  # the noise that the moved x0hat leaves
                law = self.schedule.step(obs["latents"], moved, obs["timestep"])
        return ActorStep(draw(law, generator), law)

    def _move(self, obs: Observation, eps: Tensor) -> Tensor:
        """Return what is added to x0hat, `[N, C, H, W]`."""
        x_0 = self.schedule.predict_x_0(obs["latents"], eps, obs["timestep"]).requires_grad_()
        with torch.enable_grad():
            reward = self.reward(x_0)
            (gradient,) = torch.autograd.grad(reward.sum(), x_0)
        length = torch.full_like(reward, self.rho).detach()
        if self.step == "normalised":
            with torch.no_grad():
                push = self._rms(eps - self.policy.unconditional(obs))
            length = length * push / self._rms(gradient).clamp(min=_LEAST_RMS)
        if self.enough is not None:
            length = length * (reward < self.enough)
        return length.view(-1, *[1] * (x_0.dim() - 1)) * gradient

    def _rms(self, x: Tensor) -> Tensor:
        """Return the root mean square of each sample, or of all, `[N]`."""
        square = x.square().flatten(1).mean(1)
        return (square.mean().expand_as(square) if self.over_batch else square).sqrt()
