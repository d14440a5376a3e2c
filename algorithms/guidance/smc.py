"""Sequential Monte Carlo: a population for each (prompt, label), weighed, resampled, exact in the limit.

Sources: the twisted diffusion sampler, arXiv:2306.17775; without a twist, particle denoising,
arXiv:2402.06320. Shapes: N = B K envs, B populations of K particles, C,H,W latent.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent

from diffrl.algorithms.base import check_choice
from diffrl.algorithms.guidance.base import FORMS, Guidance, check_count, check_strength, shifted
from diffrl.errors import DiffRLError
from diffrl.types import ActorStep, Observation, draw


class _Ahead(NamedTuple):
    """What is known of each particle at its own time."""

    twist: Tensor  # gamma r(x0hat), after the last step gamma r(x_0), [N]
    eps: Tensor | None  # None after the last step
    gradient: Tensor | None  # of the twist by x_t; None without a twisted proposal


@dataclass
class SMC(Guidance):
    """Particles of the policy's own law times exp(gamma r) / Z: right for any number of steps as K grows.

    The potentials are exp(gamma r(x0hat)), in the end exp(gamma r(x_0)). A finite K errs towards the
    proposal: towards the prior without a twist, past the target with one. After an episode `log_weights`
    `[B, K]` are the particles' and `log_z` `[B]` is log of an unbiased estimate of Z.

    As in the published comparison (SVDD's code): `num_particles=2 gamma=0.05 resampling=multinomial
    ess_threshold=1 last=false`, its alpha of 20 being 1 / gamma. Differs from it: a population is of one
    prompt and label, the next step's potential is asked at the next timestep.
    """

    num_particles: int = 16  # K
    gamma: float = 1.0  # exponent of the reward's exp, if that is p(y|x) of the likelihood
    twisted: bool = False  # propose along the gradient of the potential too
    form: str = "sigma2"  # of a twisted proposal's shift; eps is far larger in the last steps
    resampling: str = "systematic"  # or multinomial, as published
    ess_threshold: float = 0.5  # resample where fewer than this share of K are effective; 1: in every step
    max_shift: float | None = None  # of a twisted shift's length in sigmas: its square is log w's variance
    last: bool = True  # weigh by the reward itself in the end; the published comparison's code does not

    needs_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        check_strength("gamma", self.gamma)
        if not 0 <= self.ess_threshold <= 1:
            raise DiffRLError(f"guidance.ess_threshold={self.ess_threshold}: must be between 0 and 1.")
        check_choice("guidance.form", self.form, FORMS)
        check_choice("guidance.resampling", self.resampling, ("systematic", "multinomial"))
        if self.max_shift is not None and not self.max_shift > 0:
            raise DiffRLError(f"guidance.max_shift={self.max_shift}: must be positive, or null.")

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """Whether the proposal is twisted."""
        return self.twisted

    @property
    def population(self) -> int:
        """K."""
        return self.num_particles

    @property
    def target_gamma(self) -> float | None:
        """The exponent."""
        return self.gamma

    @property
    def log_z_hat(self) -> Tensor | None:
        """`log_z`, unless the reward itself has no part in it."""
        return self.log_z if self.last else None

    def begin(self, obs: Observation) -> None:
        """Weigh nothing yet."""
        count = len(obs["latents"])
        if count % self.num_particles:
            raise DiffRLError(
                f"guidance.num_particles={self.num_particles}: does not divide the {count} envs into "
                "populations; make num_envs a multiple of it and group_size the same."
            )
        labels, embeds = obs["label"], obs["prompt_embeds"]
        first = torch.arange(count, device=labels.device) // self.num_particles * self.num_particles
        if (labels != labels[first]).any() or (embeds != embeds[first]).any():
            raise DiffRLError(
                f"guidance.num_particles={self.num_particles}: a population holds several prompts or "
                f"labels; make the env with group_size={self.num_particles}."
            )
        self._ahead: _Ahead | None = None
        self.log_weights = torch.zeros(count, dtype=torch.float64, device=labels.device)
        self.log_weights = self.log_weights.view(-1, self.num_particles)
        self.log_z = torch.zeros_like(self.log_weights[:, 0])

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return the particles' next places: those of the particles that were resampled."""
        obs = {**obs, "latents": obs["latents"].detach()}
        if self._ahead is None:
            self._ahead = self._look(obs)
            self._weigh(self._ahead.twist)
        ancestor = self._resample(generator)
        twist, eps, gradient = (None if part is None else part[ancestor] for part in self._ahead)
        assert twist is not None
        assert eps is not None
        obs = {**obs, "latents": obs["latents"][ancestor]}
        law = self.schedule.step(obs["latents"], eps, obs["timestep"])
        after = self.next_observation(obs, obs["latents"])
        proposal = law
        if gradient is not None and after is not None:  # in the last step, as in the source, none
            proposal = self._propose(obs, eps, law, gradient)
        with torch.no_grad():
            x = draw(proposal, generator)
        if after is None:
            with torch.no_grad():
                self._ahead = _Ahead(self.gamma * self.reward(x) if self.last else twist, None, None)
        else:
            self._ahead = self._look({**after, "latents": x})
        self._weigh(self._ahead.twist - twist + _log_ratio(law, proposal, x))
        if after is None:
            self.log_z = self.log_z + self.log_weights.logsumexp(1) - math.log(self.num_particles)
        return ActorStep(x, None)

    def chosen(self, generator: torch.Generator) -> Tensor:
        """Return the env of one particle a population, drawn by the final weights, `[B]`."""
        own = self.log_weights.softmax(1).to(generator.device).multinomial(1, generator=generator)[:, 0]
        return own.to(self.log_weights.device) + self._first()

    def _look(self, obs: Observation) -> _Ahead:
        """Return the potential at `obs`, and what the next step needs."""
        with torch.set_grad_enabled(self.twisted):
            x_t = obs["latents"].clone().requires_grad_(self.twisted)
            eps = self.policy.guided_eps({**obs, "latents": x_t}, in_chain=True)  # of decoder and reward
            twist = self.gamma * self.value({**obs, "latents": x_t}, eps)
            gradient = torch.autograd.grad(twist.sum(), x_t)[0] if self.twisted else None
        return _Ahead(twist.detach(), eps.detach(), gradient)

    def _weigh(self, log_factor: Tensor) -> None:
        self.log_weights = self.log_weights + log_factor.double().view_as(self.log_weights)

    def _resample(self, generator: torch.Generator) -> Tensor:
        """Return which particle each env goes on from, `[N]`; where one is chosen, weights start anew."""
        weights = self.log_weights.softmax(1)
        effective = 1 / weights.square().sum(1)
        poor = effective < self.ess_threshold * self.num_particles
        poor &= (weights != weights[:, :1]).any(1)  # equal weights leave nothing to choose
        kept = torch.arange(self.num_particles, device=weights.device).expand_as(weights)
        # drawn for every population, or one's label would decide what numbers the others see; where weights
        # are always equal, none are, as in the plain sampler
        if self.gamma and self.num_particles > 1:
            kept = torch.where(poor[:, None], self._draw(weights, generator), kept)
            gained = self.log_weights.logsumexp(1) - math.log(self.num_particles)
            self.log_z = self.log_z + torch.where(poor, gained, 0.0)
            self.log_weights = torch.where(poor[:, None], 0.0, self.log_weights)
        return (kept + self._first()[:, None]).flatten()

    def _draw(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Return K indices below K a population, each expected K w_k times, `[B, K]`."""
        if self.resampling == "multinomial":
            drawn = weights.to(generator.device).multinomial(
                self.num_particles, replacement=True, generator=generator
            )
            return drawn.to(weights.device)
        offset = torch.rand(len(weights), 1, generator=generator, device=generator.device).to(weights)
        teeth = (torch.arange(self.num_particles, device=weights.device) + offset) / self.num_particles
        return torch.searchsorted(weights.cumsum(1), teeth).clamp(max=self.num_particles - 1)

    def _propose(self, obs: Observation, eps: Tensor, law: Independent, gradient: Tensor) -> Independent:
        """Return the step along the potential's gradient, no further than `max_shift`."""
        move = self.steered(obs, eps, gradient, self.form).mean - law.mean
        if self.max_shift is not None:
            length = (move / law.stddev).flatten(1).norm(dim=1).clamp(min=self.max_shift)
            move = move * (self.max_shift / length).view(-1, *[1] * (move.dim() - 1))
        return shifted(law, move)

    def _first(self) -> Tensor:
        """Return the first env of each population, `[B]`."""
        return torch.arange(len(self.log_weights), device=self.log_weights.device) * self.num_particles


def _log_ratio(law: Independent, proposal: Independent, x: Tensor) -> Tensor:
    """Return log law(x) - log proposal(x) of Gaussians of equal width, nats, `[N]`.

    In the difference of their means: each log density by itself is a sum over all dimensions, and the
    difference of two such would keep few digits.
    """
    move = (proposal.mean - law.mean).double()
    offset = x.double() - law.mean.double()
    return ((move.square() / 2 - offset * move) / law.variance.double()).flatten(1).sum(1)
