"""What an algorithm's update would do, seen before it is done."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from diffrl.policy import Policy


class Recorder(SGD):
    """Stands in for the optimiser of a policy: keeps the first gradients that it gets, and moves nothing.

    Attributes:
        gradients: of each trained tensor, LoRA's and then the embedding's; zeros where it has none. Empty
            until there are any.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__([*policy.lora_parameters(), *policy.embedding_parameters()], lr=0.0)
        self.gradients: dict[Tensor, Tensor] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the gradients, if they are the first."""
        self._keep()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Keep the first gradients here too: those that are not finite are dropped without a step."""
        self._keep()
        super().zero_grad(set_to_none)

    def _keep(self) -> None:
        trained = self.param_groups[0]["params"]
        if not self.gradients and any(p.grad is not None for p in trained):
            self.gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained}
