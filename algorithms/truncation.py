"""Truncated back-propagation: which steps' noise predictions carry a gradient, and along which path.

Step i = 0, ..., T-1 is kept if i >= K: K first steps are cut. Sources: AlignProp, arXiv:2310.03739,
section 4 (K once a trajectory); the code of CTRL (a new K at every step). Or a random subset of steps is
kept, whose gradients reach them along the linear part of the chain alone, not through the Jacobians of
the network: their product over many steps explodes. Leaving those out is DRTune's estimator,
arXiv:2405.00760; ours also puts in their place the Jacobian of the optimal denoiser of N(0, I).
"""

from dataclasses import dataclass

import torch

from diffrl.algorithms.base import check_choice
from diffrl.errors import DiffRLError


@dataclass
class Truncation:
    """The law of the kept steps: K uniform in low..high, K fixed at low, or `count` steps of low..high."""

    kind: str = "subset"  # uniform, fixed, or subset
    draw: str = "trajectory"  # of a uniform K: once a trajectory, or anew at every step
    low: int = 0
    high: int | None = None  # included; null: T - 1, or for a subset the end of the first four fifths
    count: int = 3  # kept steps of a subset
    path: str = "linear"  # from x_{t-1} to x_t: network (its Jacobian, the true gradient) or linear

    def __post_init__(self) -> None:
        check_choice("algo.truncation.kind", self.kind, ("uniform", "fixed", "subset"))
        check_choice("algo.truncation.draw", self.draw, ("trajectory", "step"))
        check_choice("algo.truncation.path", self.path, ("network", "linear"))
        if self.count < 1:
            raise DiffRLError(f"algo.truncation.count={self.count}: must be 1 or more.")
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise DiffRLError(f"algo.truncation: low={self.low}, high={self.high}; needs 0 <= low <= high.")

    def kept(self, num_steps: int, generator: torch.Generator) -> list[bool]:
        """Return for each of the T steps whether it carries a gradient."""
        if self.low >= num_steps:
            raise DiffRLError(
                f"algo.truncation.low={self.low}: cuts all of the {num_steps} steps; give less."
            )
        if self.kind == "fixed":
            return [i >= self.low for i in range(num_steps)]
        high = num_steps - 1 if self.high is None else self.high
        if self.kind == "subset":
            high = max(4 * num_steps // 5 - 1, self.low) if self.high is None else min(high, num_steps - 1)
            window = torch.randperm(high + 1 - self.low, generator=generator, device=generator.device)
            chosen = {self.low + i for i in window[: self.count].tolist()}
            return [i in chosen for i in range(num_steps)]
        count = 1 if self.draw == "trajectory" else num_steps
        cut = torch.randint(
            self.low, high + 1, (count,), generator=generator, device=generator.device
        ).tolist()
        kept = [i >= k for i, k in enumerate(cut * num_steps if count == 1 else cut)]
        if not any(kept):  # a trajectory without any gradient would be drawn for nothing
            kept[-1] = True
        return kept
