"""Truncated back-propagation: which steps' noise predictions carry a gradient, and along which path.

Step i = 0, ..., T-1 is kept if i >= K: K first steps are cut. Sources: AlignProp, arXiv:2310.03739,
section 4 (K once a trajectory); the code of CTRL (a new K at every step). The product of the network's
Jacobians over many steps explodes, so by default nothing runs through the chain: a random subset of steps
is kept, and x_0's gradient reaches each of them at once, by the Jacobian of E[x_0|x_{t-1}]: the pretrained
model's, which turns the gradient into a direction in which pretrained pictures vary, or that of latents of
law N(0, I), a number a step and free. Leaving the Jacobians out altogether is DRTune's, arXiv:2405.00760.
"""

from dataclasses import dataclass

import torch

from diffrl.algorithms.base import check_choice
from diffrl.errors import DiffRLError


@dataclass
class Truncation:
    """Which steps are kept: those from K on, K by `kind`, or the last `count`, or `count` random ones."""

    kind: str = "subset"  # fixed (K = low), uniform (low..high), gaussian, last or subset
    draw: str = "trajectory"  # of a random K: once a trajectory, or anew at every step
    low: int = 0  # K if it is fixed, else the least
    high: int | None = None  # included; null: T - 1, or for a subset the end of the first four fifths
    mean: float = 42.0  # of a gaussian K, rounded, and drawn again outside low..high: AlignProp's code
    std: float = 5.0  # of a gaussian K
    count: int = 4  # of the kinds last and subset
    path: str = "posterior_mean"  # x_0's gradient to a kept step; or normal, or network: by the chain

    def __post_init__(self) -> None:
        check_choice("algo.truncation.kind", self.kind, ("fixed", "uniform", "gaussian", "last", "subset"))
        check_choice("algo.truncation.draw", self.draw, ("trajectory", "step"))
        check_choice("algo.truncation.path", self.path, ("network", "posterior_mean", "normal"))
        if self.count < 1:
            raise DiffRLError(f"algo.truncation.count={self.count}: must be 1 or more.")
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise DiffRLError(f"algo.truncation: low={self.low}, high={self.high}; needs 0 <= low <= high.")
        if not self.std > 0:
            raise DiffRLError(f"algo.truncation.std={self.std}: must be positive.")

    def kept(self, num_steps: int, generator: torch.Generator) -> list[bool]:
        """Return for each of the T steps whether it carries a gradient."""
        if self.low >= num_steps:
            raise DiffRLError(
                f"algo.truncation.low={self.low}: cuts all of the {num_steps} steps; give less."
            )
        if self.kind in ("uniform", "gaussian") and self.high is not None and self.high > num_steps:
            raise DiffRLError(
                f"algo.truncation.high={self.high}: at most env.num_steps={num_steps}, or most draws would "
                "cut all of the steps; give less, or null."
            )
        if self.kind == "last":
            return [i >= num_steps - self.count for i in range(num_steps)]
        if self.kind == "subset":
            return self._subset(num_steps, generator)
        cuts = [
            self._cut(num_steps, generator) for _ in range(1 if self.draw == "trajectory" else num_steps)
        ]
        kept = [i >= k for i, k in enumerate(cuts * num_steps if len(cuts) == 1 else cuts)]
        if not any(kept):  # a trajectory without any gradient would be drawn for nothing
            kept[-1] = True
        return kept

    def chances(self, num_steps: int) -> list[float] | None:
        """Return each step's chance of being kept; None where K is random."""
        if self.kind in ("uniform", "gaussian"):
            return None
        if self.kind == "subset":
            first, stop = self._window(num_steps)
            inside = min(self.count / (stop - first), 1.0)
            return [inside if first <= i < stop else 0.0 for i in range(num_steps)]
        first = self.low if self.kind == "fixed" else num_steps - self.count
        return [float(i >= first) for i in range(num_steps)]

    def _window(self, num_steps: int) -> tuple[int, int]:
        """Return where the steps that a subset is drawn from begin and stop."""
        last = max(4 * num_steps // 5 - 1, self.low) if self.high is None else min(self.high, num_steps - 1)
        return self.low, last + 1

    def _cut(self, num_steps: int, generator: torch.Generator) -> int:
        """Return K."""
        high = num_steps - 1 if self.high is None else self.high
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return int(torch.randint(self.low, high + 1, (), generator=generator, device=generator.device))
        for _ in range(1000):
            draw = torch.randn((), generator=generator, device=generator.device)
            cut = round(self.mean + self.std * float(draw))
            if self.low <= cut <= high:
                return cut
        raise DiffRLError(
            f"algo.truncation.mean={self.mean} std={self.std}: a thousand draws, none within "
            f"{self.low} to {high}; put the mean between them."
        )

    def _subset(self, num_steps: int, generator: torch.Generator) -> list[bool]:
        first, stop = self._window(num_steps)
        window = torch.randperm(stop - first, generator=generator, device=generator.device)
        chosen = {first + i for i in window[: self.count].tolist()}
        return [i in chosen for i in range(num_steps)]
