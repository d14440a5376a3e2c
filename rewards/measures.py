"""True measures of a picture, black boxes whose classes a label asks for.

Shapes: N pictures `[N, 3, H, W]` in [0, 1], K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from diffrl.rewards.aesthetic import aesthetic_score
from diffrl.rewards.jpeg import jpeg_kilobytes
from diffrl.types import to_pixels

PUBLISHED_SIZE = 512
"""Of CTRL's pictures, to which its edges belong."""


@dataclass(frozen=True)
class Measure:
    """A number of each picture, and which way its classes count."""

    title: str
    of: Callable[..., Tensor]  # pictures to `[N]`
    features: str  # of a classifier that is to see it
    unit: str = ""
    falling: bool = False  # the last class holds the smallest values
    networks: tuple[str, ...] = ()  # that it stands on: where they lie is said by settings of these names
    published: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # edges, by number of classes

    def bind(self, networks: Mapping[str, str]) -> "Measure":
        """Return the measure on the networks that lie there."""
        return replace(self, of=partial(self.of, **networks))

    def published_edges(self, num_classes: int, side: int) -> tuple[float, ...] | None:
        """Return CTRL's edges for so many classes of pictures of `side` pixels, where it has them."""
        return self.published.get(num_classes) if side == PUBLISHED_SIZE else None

    def class_of(self, value: Tensor, edges: Tensor) -> Tensor:
        """Return the class of each value `[N]`, between rising edges `[K - 1]`: `[N]`, 0 to K - 1.

        A value on an edge belongs to the higher class (CTRL: r >= -60 is class 3, with r minus the size).
        """
        edges = edges.to(value)
        return ((value[:, None] <= edges) if self.falling else (value[:, None] >= edges)).sum(1)

    def bounds(self, edges: Tensor) -> list[str]:
        """Return in words what each class holds, K of them."""
        names = [f"{edge:.2f}" for edge in edges.tolist()]
        low, high = ("<=", ">") if self.falling else ("<", ">=")
        between = [f"{a} to {b}" for a, b in pairwise(names)]
        rising = [f"{low} {names[0]}", *between, f"{high} {names[-1]}"]
        said = [f"{words} {self.unit}".rstrip() for words in rising]
        return said[::-1] if self.falling else said


def opponents(images: Tensor) -> Tensor:
    """Return red against green and yellow against blue, in steps of 8 bits: `[N, 2, H, W]`."""
    red, green, blue = (255 * images).unbind(1)
    return torch.stack([red - green, (red + green) / 2 - blue], 1)


def colourfulness(images: Tensor) -> Tensor:
    """Return how colourful people find pictures, `[N]`: 0 not, 15 slightly, 45 averagely, 109 extremely.

    sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2) of the picture in 8 bits. Source: Hasler and
    Suesstrunk, Measuring colourfulness in natural images, SPIE 5007, 2003, M^(3) and table 2.
    """
    measured = []
    for part in images.split(16):  # large pictures in float64 are larger still
        pixels = torch.from_numpy(to_pixels(part)).permute(0, 3, 1, 2)
        planes = opponents(pixels.double() / 255).flatten(2)
        spread = planes.var(2, correction=0).sum(1).sqrt()
        measured.append(spread + 0.3 * planes.mean(2).norm(dim=1))
    return torch.cat(measured).float()


MEASURES = {
    "compressibility": Measure(
        "JPEG size",
        jpeg_kilobytes,
        "dct",
        "kB",
        falling=True,
        published={2: (70.0,), 4: (60.0, 85.0, 110.0)},
    ),
    "colourfulness": Measure("colourfulness", colourfulness, "colour"),
    "aesthetic": Measure(
        "aesthetic score", aesthetic_score, "clip", networks=("clip", "mlp"), published={2: (5.7,)}
    ),
}
"""By name; one that stands on networks is to be bound to them before it measures."""
