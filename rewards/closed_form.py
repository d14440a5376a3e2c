"""log p(y|x) in closed form, for points instead of pictures: nothing is fitted, nothing is approximate.

Shapes: N points `[N, d, 1, 1]`, K labels.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffrl.errors import DiffRLError
from diffrl.rewards.log_likelihood import of_label
from diffrl.types import Context


class ClosedForm:
    """A reward whose log p(y|x) is known for every label: what the exact solver asks for."""

    differentiable: ClassVar[bool] = True
    num_classes: tuple[int, ...]

    @property
    def num_dims(self) -> int:
        """Return d."""
        raise NotImplementedError

    def log_prob(self, points: Tensor) -> Tensor:
        """Return log p(y|x) for every label, nats, `[N, K]`, in the precision of `points`."""
        raise NotImplementedError

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return log p(y|x) of each point's own label, nats, `[N]`; 0 where it is NO_LABEL."""
        return of_label(self.log_prob(images), context.label[:, 0])

    def draw_label(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a label of each point, drawn from p(y|x), if need be normalised over y, `[N, 1]`."""
        chances = self.log_prob(images).softmax(1).to(generator.device)
        return chances.multinomial(1, generator=generator)

    def true_class(self, images: Tensor) -> Tensor:
        """Return the likeliest label of each point, `[N]`, on the CPU."""
        return self.log_prob(images).argmax(1).cpu()


@dataclass
class Softmax(ClosedForm):
    """log p(y|x) of a softmax classifier: p(y|x) is proportional to exp(slope_y . x + intercept_y)."""

    # by label; in 2-D each slope is a pair. The default is p(y=1|x) = sigmoid(4 x - 1)
    slopes: list[Any] = field(default_factory=lambda: [0.0, 4.0])
    intercepts: list[float] = field(default_factory=lambda: [0.0, -1.0])  # by label

    def __post_init__(self) -> None:
        self._slopes = as_rows("reward.slopes", self.slopes)
        if len(self.intercepts) != len(self._slopes):
            raise DiffRLError(
                f"reward.intercepts={self.intercepts}: {len(self.intercepts)} of them for "
                f"{len(self._slopes)} slopes; give one a label."
            )
        if len(self._slopes) < 2:
            raise DiffRLError(f"reward.slopes={self.slopes}: needs 2 labels or more.")
        self.num_classes = (len(self._slopes),)

    @property
    def num_dims(self) -> int:
        """Return d."""
        return len(self._slopes[0])

    def log_prob(self, points: Tensor) -> Tensor:
        """Return log p(y|x) for every label, nats, `[N, K]`."""
        x = points.flatten(1)
        return (x @ x.new_tensor(self._slopes).T + x.new_tensor(self.intercepts)).log_softmax(1)


@dataclass
class Gaussian(ClosedForm):
    """log p(y|x) of a noisy measurement: label k stands for the value y_k, and y_k | x ~ N(x, s^2 I).

    It is a density in y, so it may exceed 0; the posterior of a mixture under it is a mixture.
    """

    observations: list[Any] = field(default_factory=lambda: [-1.0, 1.0])  # y_k; in 2-D each is a pair
    standard_deviation: float = 0.5  # s

    def __post_init__(self) -> None:
        self._observations = as_rows("reward.observations", self.observations)
        if not self.standard_deviation > 0:
            raise DiffRLError(f"reward.standard_deviation={self.standard_deviation}: must be positive.")
        self.num_classes = (len(self._observations),)

    @property
    def num_dims(self) -> int:
        """Return d."""
        return len(self._observations[0])

    def log_prob(self, points: Tensor) -> Tensor:
        """Return log p(y_k|x) for every label, nats, `[N, K]`."""
        x = points.flatten(1)
        distance = (x[:, None, :] - x.new_tensor(self._observations)).square().sum(2)
        variance = self.standard_deviation**2
        normaliser = torch.tensor(2 * torch.pi * variance, dtype=torch.float64).log() * self.num_dims / 2
        return -distance / (2 * variance) - float(normaliser)


def as_rows(name: str, values: list[Any]) -> list[list[float]]:
    """Return points given as numbers (1-D) or as lists of d numbers, each as a list of d numbers.

    Raises:
        DiffRLError: an empty list, something that is not a number, or rows of different lengths.
    """
    try:
        rows = [[float(x) for x in (row if isinstance(row, list) else [row])] for row in values]
    except (TypeError, ValueError) as error:
        raise DiffRLError(f"{name}={values}: must be numbers, or lists of as many numbers each.") from error
    sizes = {len(row) for row in rows}
    if not rows or len(sizes) != 1 or 0 in sizes:
        raise DiffRLError(f"{name}={values}: must be one number each, or lists of as many numbers each.")
    if not torch.tensor(rows).isfinite().all():
        raise DiffRLError(f"{name}={values}: must be finite.")
    return rows
