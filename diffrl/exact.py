"""The exact answers of a one-dimensional model: soft values, target, any policy's law, KL and objective.

Each of the chain's T steps is a Gaussian kernel, so on a grid it is a matrix, and every expectation a
product of matrices: no sampling noise anywhere. The kernels are the network's own, so the discretisation
of time and the errors of its fit are part of the model, not of the answer. A step reaches few points, so of
each matrix only a band is kept.

Shapes: n grid points, T steps, K labels, W points of a band. All tensors here are float64; laws are masses
that sum to 1.
Source: CTRL, arXiv:2406.12120, section 4 for the objective; its maximiser is Doob's h-transform.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent

from diffrl.errors import DiffRLError
from diffrl.schedule import DDIMSchedule
from diffrl.types import NO_LABEL, Observation

_POINTS_PER_SIGMA = 1.5  # a sum over the grid is then a Gaussian's integral to exp(-2 pi^2 1.5^2): rounding
_MOST_POINTS = 4001  # chosen: a matrix of 128 MB, should a band be that wide
_REACH = 9.0  # sigmas to either side that a kernel keeps: beyond lies 2e-19, less than rounding

Law = Callable[[Observation], Independent]
"""What gives the law of x_{t-1} at a state: `policy`, `policy.reference`, or a closed form."""


class Kernel(NamedTuple):
    """The transition matrix of one step, from rows to columns; what is not kept is 0."""

    columns: Tensor  # indices of the points each row reaches, [n, W]
    log_prob: Tensor  # rows sum to 1, [n, W]

    def expect(self, values: Tensor) -> Tensor:
        """Return each row's E[value after the step], `[..., n]` of `[..., n]`."""
        return (self.log_prob.exp() * values[..., self.columns]).sum(-1)

    def push(self, law: Tensor, log_tilt: Tensor | float = 0.0) -> Tensor:
        """Return the law after the step, `[n]`; its probabilities times exp(log_tilt), `[n, W]`."""
        mass = law[:, None] * (self.log_prob + log_tilt).exp()
        return torch.zeros_like(law).index_add_(0, self.columns.flatten(), mass.flatten())


@dataclass(frozen=True)
class Measured:
    """What a policy is, without sampling noise; each `[K]` in nats unless said otherwise."""

    law: Tensor  # of x_0, masses, [K, n]
    log_prob: Tensor  # E log p(y|x_0)
    kl: Tensor  # sum over steps of KL(policy || reference)
    objective: Tensor  # J = gamma log_prob - kl
    gap: Tensor  # E[V_T] - J, never negative but for rounding
    tv: Tensor  # total variation between the law and the target, in [0, 1]
    off_grid: float  # the probability that left the grid and was put back on its edge, over all steps


class ExactSolver:
    """The solved control problem: maximise E[gamma log p(y|x_0)] - KL from x_T ~ N(0, 1).

    Args:
        schedule: T steps with sigma > 0.
        reference: the law to stay close to.
        log_prob: `[n, 1, 1, 1]` points to log p(y|x) `[n, K]`.
        gamma: scale of log p(y|x).
        prompt_embeds: `[1, L, E]`, of the only prompt there is.
        bound: the grid reaches from -bound to bound.

    Attributes:
        points: `[n]`.
        prior: law of x_0 under the reference, `[n]`.
        values: soft values V_t = log E_ref[p(y|x_0)^gamma | x_t], `[T + 1, K, n]`, V_T first, V_0 last.
        log_z: log E_ref[p(y|x_0)^gamma], `[K]`.
        target: the law prior p(y|x_0)^gamma / Z, `[K, n]`: the soft-optimal policy reaches it from x_T
            drawn in proportion to exp(V_T).
        attainable: its law of x_0 from x_T ~ N(0, 1), the best for the objective, `[K, n]`.
        best: E[V_T] over x_T ~ N(0, 1), the objective's maximum, `[K]`, at most `log_z`.
        best_gaussian: its maximum over policies of our class, N(any mean, sigma_t^2), `[K]`. The
            soft-optimal kernel is not of that shape but in the limit of many steps: `best -
            best_gaussian` falls like 1 / T, and no training gets under it.
    """

    def __init__(
        self,
        schedule: DDIMSchedule,
        reference: Law,
        log_prob: Callable[[Tensor], Tensor],
        gamma: float,
        *,
        prompt_embeds: Tensor,
        bound: float = 6.0,
    ) -> None:
        self.schedule, self.gamma, self.prompt_embeds = schedule, gamma, prompt_embeds
        self.sigma = schedule.sigma.double().cpu()
        self.points = _grid(float(self.sigma.min()), bound)
        self.start = (-self.points.square() / 2).softmax(0)
        self.log_prob = log_prob(self.points[:, None, None, None]).T
        self.reference_means = torch.stack(
            [self._mean(reference, i, NO_LABEL) for i in range(self.num_steps)]
        )

        values = [gamma * self.log_prob]
        for i in reversed(range(self.num_steps)):
            kernel = self.kernel(self.reference_means[i], i, _slope(values[-1], self.points))
            values.append((kernel.log_prob + values[-1][:, kernel.columns]).logsumexp(2))
        self.values = torch.stack(values[::-1])
        self.best = self.values[0] @ self.start
        self.best_gaussian = self._best_gaussian()
        law = self.start
        optimal = self.start.expand(len(self.log_prob), -1)
        for i in range(self.num_steps):
            before, after = self.values[i], self.values[i + 1]
            kernel = self.kernel(self.reference_means[i], i, _slope(after, self.points))
            law = kernel.push(law)
            # the soft-optimal kernel; formed as one exponent, so that nothing under- or overflows
            tilts = after[:, kernel.columns] - before[:, :, None]
            optimal = torch.stack([kernel.push(q, tilt) for q, tilt in zip(optimal, tilts, strict=True)])
        self.prior, self.attainable = law, optimal
        joint = law.log() + self.values[-1]
        self.log_z = joint.logsumexp(1)
        self.target = (joint - self.log_z[:, None]).exp()

    @property
    def num_steps(self) -> int:
        """T."""
        return self.schedule.num_steps

    def measure(self, policy: Law) -> Measured:
        """Return what `policy` does when asked for each label."""
        laws, kls, off_grid = [], [], 0.0
        for label in range(len(self.log_prob)):
            law, kl = self.start, torch.zeros((), dtype=torch.float64)
            for i in range(self.num_steps):
                mean = self._mean(policy, i, label)
                shift = (mean - self.reference_means[i]) / self.sigma[i]
                kl = kl + law @ shift.square() / 2
                off_grid += float(law @ self._outside(mean, i))
                law = self.kernel(mean, i).push(law)
            laws.append(law)
            kls.append(kl)
        law, kl = torch.stack(laws), torch.stack(kls)
        log_prob = (law * self.log_prob).sum(1)
        objective = self.gamma * log_prob - kl
        return Measured(
            law=law,
            log_prob=log_prob,
            kl=kl,
            objective=objective,
            gap=self.best - objective,
            tv=total_variation(law, self.target),
            off_grid=off_grid,
        )

    def _best_gaussian(self) -> Tensor:
        """Return the best objective with Gaussian steps, by dynamic programming over their means."""
        values = self.values[-1]
        for i in reversed(range(self.num_steps)):
            slope = _slope(values, self.points)
            future = self.kernel(self.points, i).expect(values)  # by mean, on the same grid
            near = self.kernel(self.reference_means[i], i, slope).columns  # the best mean is one of these
            cost = ((self.points[near] - self.reference_means[i][:, None]) / self.sigma[i]).square() / 2
            values = torch.stack([_peak(future_of_label[near] - cost) for future_of_label in future])
        return values @ self.start

    def kernel(self, mean: Tensor, i: int, slope: float = 0.0) -> Kernel:
        """Return step `i` from rows whose means are `mean` `[n]`.

        A mean off the grid counts as on its edge, which `Measured.off_grid` tells.

        Args:
            mean: where each row's Gaussian has its centre.
            i: of the step, for its sigma.
            slope: steepest slope of a log tilt that the kernel will be given; it moves the centres by
                sigma^2 times as much, and the band is wider by that.
        """
        mean = mean.clamp(self.points[0], self.points[-1])
        sigma, spacing = self.sigma[i], self.points[1] - self.points[0]
        half = int(sigma * (_REACH + sigma * slope) / spacing) + 1
        width = min(2 * half + 1, len(self.points))
        first = ((mean - self.points[0]) / spacing).round().long() - half
        first = first.clamp(0, len(self.points) - width)
        reached = self.points.unfold(0, width, 1)[first]
        exponent = (reached - mean[:, None]).square() / (-2 * sigma**2)
        # no largest one need be taken out first: the point next to the mean has an exponent of about 0
        log_prob = exponent - exponent.exp().sum(1, keepdim=True).log()
        return Kernel(first[:, None] + torch.arange(width), log_prob)

    def _outside(self, mean: Tensor, i: int) -> Tensor:
        """Return the probability of each row's Gaussian beyond the grid, `[n]`."""
        low, high = ((edge - mean) / self.sigma[i] for edge in (self.points[0], self.points[-1]))
        return torch.special.ndtr(low) + torch.special.ndtr(-high)

    @torch.no_grad()
    def _mean(self, law: Law, i: int, label: int) -> Tensor:
        device, dtype = self.schedule.sigma.device, self.schedule.sigma.dtype
        count = len(self.points)
        obs: Observation = {
            "latents": self.points[:, None, None, None].to(device, dtype),
            "timestep": self.schedule.timesteps[i].expand(count),
            "prompt_embeds": self.prompt_embeds.expand(count, -1, -1),
            "label": torch.full((count, 1), label, device=device),
        }
        return law(obs).mean.double().cpu().flatten()


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the L1 distance of two laws `[..., n]` on the same grid."""
    return (p - q).abs().sum(-1) / 2


def moments(law: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of laws `[..., n]`."""
    mean = law @ points
    return mean, (law @ points.square() - mean.square()).sqrt()


def _slope(values: Tensor, points: Tensor) -> float:
    """Return the steepest slope of functions `[K, n]` on the grid."""
    return float(values.diff(dim=-1).abs().max() / (points[1] - points[0]))


def _peak(rows: Tensor) -> Tensor:
    """Return each row's maximum between its grid points: of the parabola through the highest three."""
    top = rows.argmax(1).clamp(1, rows.shape[1] - 2)[:, None]
    before, at, after = (rows.gather(1, top + offset)[:, 0] for offset in (-1, 0, 1))
    return at - (before - after).square() / (8 * (before - 2 * at + after))


def _grid(sigma: float, bound: float) -> Tensor:
    if sigma <= 0:
        raise DiffRLError("the exact solver needs noise in every step; set env.eta=1.")
    count = 2 * int(bound * _POINTS_PER_SIGMA / sigma) + 3  # odd: 0 is one of them
    if count > _MOST_POINTS:
        raise DiffRLError(
            f"the exact solver would need {count} grid points to resolve a step's sigma of {sigma:.2g}, "
            f"more than {_MOST_POINTS}; set env.eta=1, or give wider components."
        )
    return torch.linspace(-bound, bound, count, dtype=torch.float64)
