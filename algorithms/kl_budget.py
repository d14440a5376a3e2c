"""A KL to the pretrained model that comes to a budget, by a weight that adapts.

Source: Ziegler et al., arXiv:1909.08593, section 2.2.
"""

import math
from typing import Any

from diffrl.errors import DiffRLError

_GAIN, _MOST = 0.1, 0.2  # the paper's K_beta, and its bound on the relative error: 2% an update at most


class KLBudget:
    """A factor on the KL's weight that grows while the KL is above the budget, and shrinks below it.

    Proportional to the relative error, and multiplicative: the weight stays positive, and neither its scale
    nor that of the reward has to be known. Dual ascent, weight += rate (KL - budget), needs a rate in
    reward units a nat squared, which differs from task to task by orders of magnitude. Evaluations go on to
    measure J and its gap with the gamma that was asked for.

    Args:
        nats: that the mean KL of a picture's chain is to come to; None: the factor stays 1.
        weight: of the KL before the first update, in units of the reward a nat.
    """

    def __init__(self, nats: float | None, weight: float) -> None:
        if nats is not None and not nats > 0:
            raise DiffRLError(f"algo.kl_budget={nats}: must be positive, or null for none.")
        if nats is not None and not weight:
            raise DiffRLError(
                f"algo.kl_budget={nats} algo.kl={weight}: it adapts the KL's weight, and 0 stays 0; "
                "give algo.kl=0.001, or another to begin with."
            )
        self.nats, self.weight, self.factor = nats, weight, 1.0

    def learn(self, kl: float) -> dict[str, float]:
        """Take in the mean KL of an update's pictures, nats, and return the weight it had, as a metric."""
        if self.nats is None:
            return {}
        had = {"train/kl_weight": self.weight * self.factor}
        if math.isfinite(kl):
            error = kl / self.nats - 1
            self.factor *= 1 + _GAIN * max(-_MOST, min(error, _MOST))
        return had

    def state_dict(self) -> dict[str, Any]:
        """Return what later updates depend on; nothing without a budget."""
        return {} if self.nats is None else {"kl_factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.factor = state.get("kl_factor", 1.0)
