"""Two controls at once: small or large files, and few or many of a second measure.

Source: CTRL, arXiv:2406.12120, section 6.2, whose second measure is the LAION aesthetic score.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from diffrl.errors import DiffRLError, unknown
from diffrl.rewards.fit import check_ceiling, fit_attribute
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.measures import MEASURES


@dataclass
class Multitask:
    """log p(y1|x) + log p(y2|x): two classes each of JPEG size and of colourfulness, 2 x 2 labels."""

    measures: list[str] = field(default_factory=lambda: ["compressibility", "colourfulness"])
    edges: list[float] | None = None  # one a measure; null: medians of the pictures
    num_pictures: int = 2048  # drawn from the pretrained policy where there is no dataset
    classifier: str | None = None  # path of a fitted one, instead of fitting
    ceiling: float = 1.0  # of each p(y|x): its reward is log min(p, ceiling)

    learned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in self.measures:
            if name not in MEASURES:
                raise unknown("measure", name, MEASURES)
        if len(set(self.measures)) != len(self.measures) or not self.measures:
            raise DiffRLError(f"reward.measures={self.measures}: give each once, one at least.")
        if self.edges is not None and len(self.edges) != len(self.measures):
            raise DiffRLError(
                f"reward.edges={self.edges}: {len(self.edges)} for {len(self.measures)} measures; give one "
                "each."
            )
        check_ceiling(self.ceiling, 2)

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Two of each measure."""
        return (2,) * len(self.measures)

    def fit(self, images: Tensor, seed: int, *, from_pretrained: bool) -> LogLikelihood:
        """Return the reward fitted to `images` `[M, 3, S, S]`; see `fit_attribute`."""
        return LogLikelihood(
            [
                fit_attribute(
                    name,
                    images,
                    None if self.edges is None else [self.edges[number]],
                    2,
                    features=MEASURES[name].features,
                    seed=seed,
                    from_pretrained=from_pretrained,
                )
                for number, name in enumerate(self.measures)
            ]
        )
