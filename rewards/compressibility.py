"""How compressible a picture is, as K classes of its JPEG size.

Source: CTRL, arXiv:2406.12120, section 6.1.
"""

from dataclasses import dataclass
from typing import ClassVar

from diffrl.datasets import Pictures
from diffrl.errors import DiffRLError, unknown
from diffrl.rewards.copies import check_copies
from diffrl.rewards.fit import check_ceiling, fit_attribute
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.measures import MEASURES
from diffrl.rewards.published import load_reward

_FEATURES = ("dct", "cnn")


@dataclass
class Compressibility:
    """log p(y|x) of the JPEG size's class; the last class holds the smallest files."""

    edges: list[float] | None = None  # kB, rising; null: 60, 85, 110 at 512 px, else quantiles
    num_classes: int = 4  # where the edges are quantiles
    num_pictures: int = 2048  # drawn from the pretrained policy where there is no dataset
    copies: int = 0  # altered ones of each, labelled by the true measure, for the classifier to learn from
    features: str = "dct"  # of the classifier: dct or cnn
    classifier: str | None = None  # path of a fitted one, or of CTRL's .pth, instead of fitting
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
        if self.features not in _FEATURES:
            raise unknown("reward.features", self.features, _FEATURES)
        check_ceiling(self.ceiling, self.num_classes)
        check_copies(self.copies, self.features)

    def load(self) -> LogLikelihood:
        """Return the reward of the file `classifier`."""
        (measure,) = self.measures
        edges = {} if self.edges is None else {measure: self.edges}
        return load_reward([str(self.classifier)], {measure: self.num_classes}, {}, edges)

    def fit(
        self, images: Pictures, seed: int, *, from_pretrained: bool, rehearsal: bool = False
    ) -> LogLikelihood:
        """Return the reward fitted to a data set or `[M, 3, S, S]`; see `fit_attribute`."""
        (measure,) = self.measures
        published = MEASURES[measure].published_edges(self.num_classes, images.shape[-1])
        attribute = fit_attribute(
            measure,
            images,
            self.edges or published,
            self.num_classes,
            features=self.features,
            seed=seed,
            from_pretrained=from_pretrained,
            copies=self.copies,
            rehearsal=rehearsal,
        )
        return LogLikelihood([attribute])
