"""Truncated back-propagation: which steps' noise predictions carry a gradient.

Step i = 0, ..., T-1 is kept if i >= K: K first steps are cut. Sources: AlignProp, arXiv:2310.03739,
section 4 (K once a trajectory); the code of CTRL (a new K at every step).
"""

from dataclasses import dataclass

import torch

from diffrl.algorithms.base import check_choice
from diffrl.errors import DiffRLError


@dataclass
class Truncation:
    """The law of K, the number of first steps that are cut."""

    kind: str = "uniform"  # uniform in low..high, both included; or fixed at low
    draw: str = "trajectory"  # K once a trajectory, or anew at every step
    low: int = 0
    high: int | None = None  # null: T - 1, so that the last step is always kept

    def __post_init__(self) -> None:
        check_choice("algo.truncation.kind", self.kind, ("uniform", "fixed"))
        check_choice("algo.truncation.draw", self.draw, ("trajectory", "step"))
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
        count = 1 if self.draw == "trajectory" else num_steps
        cut = torch.randint(
            self.low, high + 1, (count,), generator=generator, device=generator.device
        ).tolist()
        return [i >= k for i, k in enumerate(cut * num_steps if count == 1 else cut)]
