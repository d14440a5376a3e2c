"""How compressible a picture is, as K classes of its JPEG size.

Source: CTRL, arXiv:2406.12120, section 6.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffrl.errors import DiffRLError
from diffrl.rewards.fit import check_ceiling, fit_attribute
from diffrl.rewards.log_likelihood import LogLikelihood

PUBLISHED_EDGES = (60.0, 85.0, 110.0)  # kB at 512 px: CTRL's four classes
PUBLISHED_SIZE = 512


@dataclass
class Compressibility:
    """log p(y|x) of the JPEG size's class; the last class holds the smallest files."""

    edges: list[float] | None = None  # kB, rising; null: 60, 85, 110 at 512 px, else quantiles
    num_classes: int = 4  # where the edges are quantiles
    num_pictures: int = 2048  # drawn from the pretrained policy where there is no dataset
    features: str = "dct"  # of the classifier: dct or cnn
    classifier: str | None = None  # path of a fitted one, instead of fitting
    ceiling: float = 1.0  # of p(y|x): the reward is log min(p, ceiling)

    learned: ClassVar[bool] = True
    measures: ClassVar[list[str]] = ["compressibility"]

    def __post_init__(self) -> None:
        if self.edges is not None:
            if sorted(set(self.edges)) != list(self.edges) or not self.edges:
                raise DiffRLError(f"reward.edges={self.edges}: must be rising, one at least.")
            self.num_classes = len(self.edges) + 1
        if self.num_classes < 2:
            raise DiffRLError(f"reward.num_classes={self.num_classes}: must be 2 or more.")
        check_ceiling(self.ceiling, self.num_classes)

    def fit(self, images: Tensor, seed: int, *, from_pretrained: bool) -> LogLikelihood:
        """Return the reward fitted to `images` `[M, 3, S, S]`; see `fit_attribute`."""
        edges: Sequence[float] | None = self.edges
        if edges is None and (images.shape[-1], self.num_classes) == (
            PUBLISHED_SIZE,
            len(PUBLISHED_EDGES) + 1,
        ):
            edges = PUBLISHED_EDGES
        attribute = fit_attribute(
            self.measures[0],
            images,
            edges,
            self.num_classes,
            features=self.features,
            seed=seed,
            from_pretrained=from_pretrained,
        )
        return LogLikelihood([attribute])
