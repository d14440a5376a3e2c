"""How compressible a picture is, as K classes of its JPEG size.

Shapes: N pictures `[N, 3, H, W]` in [0, 1], K classes. Source: CTRL, arXiv:2406.12120, section 6.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.errors import DiffRLError
from diffrl.rewards.fit import as_float, fit_classifier
from diffrl.rewards.jpeg import jpeg_kilobytes
from diffrl.rewards.log_likelihood import LogLikelihood, class_of

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

    def __post_init__(self) -> None:
        if self.edges is not None:
            if sorted(set(self.edges)) != list(self.edges) or not self.edges:
                raise DiffRLError(f"reward.edges={self.edges}: must be rising, one at least.")
            self.num_classes = len(self.edges) + 1
        if self.num_classes < 2:
            raise DiffRLError(f"reward.num_classes={self.num_classes}: must be 2 or more.")
        if not 1 / self.num_classes < self.ceiling <= 1:
            raise DiffRLError(
                f"reward.ceiling={self.ceiling}: must be at most 1, and more than chance, "
                f"1/{self.num_classes}."
            )

    def fit(self, images: Tensor, generator: torch.Generator, *, from_pretrained: bool) -> LogLikelihood:
        """Label `images` by their true size, fit and calibrate p(y|x), return the reward.

        Args:
            images: `[M, 3, S, S]`, uint8 or float in [0, 1].
            from_pretrained: they were drawn from the pretrained policy, so log Z follows from them.
        """
        sizes = torch.cat([jpeg_kilobytes(as_float(part)) for part in images.split(256)])
        edges = self._edges(sizes, images.shape[-1])
        label = class_of(sizes, edges)
        classifier, report, held_out = fit_classifier(
            images, label, len(edges) + 1, features=self.features, generator=generator
        )
        with torch.no_grad():
            log_prob = torch.cat([classifier(as_float(images[i])) for i in held_out.split(128)])
        return LogLikelihood(classifier, edges, report, log_prob if from_pretrained else None)

    def _edges(self, sizes: Tensor, side: int) -> Tensor:
        if self.edges is not None:
            return torch.tensor(self.edges)
        if side == PUBLISHED_SIZE and self.num_classes == len(PUBLISHED_EDGES) + 1:
            return torch.tensor(PUBLISHED_EDGES)
        share = torch.arange(1, self.num_classes) / self.num_classes
        return sizes.quantile(share)
