"""Two controls at once: small or large files, and few or many of a second measure.

Source: CTRL, arXiv:2406.12120, section 6.2, whose second measure is the LAION aesthetic score.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffrl.datasets import Pictures
from diffrl.errors import DiffRLError, unknown
from diffrl.rewards.aesthetic import find_mlp
from diffrl.rewards.clip import VIT_L_14
from diffrl.rewards.copies import check_copies
from diffrl.rewards.fit import check_ceiling, fit_attribute
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.measures import MEASURES
from diffrl.rewards.published import load_reward


@dataclass
class Multitask:
    """log p(y1|x) + log p(y2|x): two classes each of JPEG size and of colourfulness, 2 x 2 labels."""

    # of compressibility, colourfulness and aesthetic; CTRL's are [compressibility,aesthetic]
    measures: list[str] = field(default_factory=lambda: ["compressibility", "colourfulness"])
    edges: list[float] | None = None  # one a measure; null: CTRL's at 512 px (70 kB, 5.7), else medians
    num_pictures: int = 2048  # drawn from the pretrained policy where there is no dataset
    copies: int = 0  # altered ones of each, labelled by the true measure, for the classifier to learn from
    classifier: Any = None  # path of a fitted one, or of CTRL's .pth, [one,a measure], instead of fitting
    ceiling: float = 1.0  # of each p(y|x): its reward is log min(p, ceiling)
    joint: bool = False  # one embedding each combination, as in CTRL's code, not the sum of one a measure
    clip: str = VIT_L_14  # of aesthetic: hub id, or a folder in the layout of transformers
    mlp: str | None = None  # of aesthetic: LAION's sac+logos+ava1-l14-linearMSE.pth, as there

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
        check_copies(self.copies)
        if "aesthetic" in self.measures:
            find_mlp(self.mlp)

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Two of each measure; of a joint label, their combinations."""
        count = len(self.measures)
        return (2**count,) if self.joint else (2,) * count

    def load(self) -> LogLikelihood:
        """Return the reward of the file `classifier`, or of CTRL's, one a measure."""
        paths = self.classifier if isinstance(self.classifier, list) else [self.classifier]
        asked = dict.fromkeys(self.measures, 2)
        edges = {name: [edge] for name, edge in zip(self.measures, self.edges or [], strict=False)}
        networks = self._networks(*self.measures)
        reward = load_reward([str(path) for path in paths], asked, networks, edges)
        reward.joint = self.joint
        return reward

    def fit(
        self, images: Pictures, seed: int, *, from_pretrained: bool, rehearsal: bool = False
    ) -> LogLikelihood:
        """Return the reward fitted to a data set or `[M, 3, S, S]`; see `fit_attribute`."""
        attributes = []
        for number, name in enumerate(self.measures):
            measure = MEASURES[name]
            published = measure.published_edges(2, images.shape[-1])
            attributes.append(
                fit_attribute(
                    name,
                    images,
                    published if self.edges is None else [self.edges[number]],
                    2,
                    features=measure.features,
                    seed=seed,
                    from_pretrained=from_pretrained,
                    networks=self._networks(name),
                    copies=self.copies,
                    rehearsal=rehearsal,
                )
            )
        return LogLikelihood(attributes, joint=self.joint)

    def _networks(self, *measures: str) -> dict[str, str]:
        """Return where the networks of these measures lie, by name."""
        return {key: str(getattr(self, key)) for name in measures for key in MEASURES[name].networks}
