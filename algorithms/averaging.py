"""The mean of the weights over the last updates: less noise in the end, at no more network calls.

Sources: Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992; of networks: SWA, arXiv:1803.05407.
"""

from collections.abc import Iterable

import torch
from torch import nn


class WeightAverage:
    """A running mean of parameters, kept beside them.

    Args:
        parameters: whose mean is kept; they stay as they are until `apply`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.count = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take the parameters' present values into the mean."""
        self.count += 1
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(parameter, 1 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their mean, where anything was added."""
        if not self.count:
            return
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            parameter.copy_(mean)
