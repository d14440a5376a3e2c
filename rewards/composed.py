"""Several rewards as one: `reward=[jpeg_incompressible,my.py:redness] reward.weights=[1,2]`.

Shapes: N pictures `[N, 3, S, S]`, P parts.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffrl.errors import DiffRLError
from diffrl.types import Context, Reward


@dataclass
class Composed:
    """sum_i weights_i clip(scales_i r_i): differentiable if every part is.

    A label holds the attributes of the first part that reads any, then those of the next.
    """

    parts: Any = field(default_factory=dict)  # the rewards by name; reward.parts.NAME.x is a setting of one
    weights: list[float] | None = None  # one a part; null: 1 each
    scales: list[float] | None = None  # a factor on each part, before it is clipped; null: 1 each
    clip: float | None = None  # each scaled part is kept between -clip and clip; null: as it is

    def __post_init__(self) -> None:
        own = self.parts if isinstance(self.parts, dict) else vars(self.parts)
        self._parts: dict[str, Reward] = dict(own)
        for name in ("weights", "scales"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self._parts):
                raise DiffRLError(
                    f"reward.{name}={values}: {len(values)} of them for {len(self._parts)} parts, "
                    f"{', '.join(self._parts)}; give one each."
                )
            if values is not None and not all(map(math.isfinite, values)):
                raise DiffRLError(f"reward.{name}={values}: must be finite.")
        if self.clip is not None and not self.clip > 0:
            raise DiffRLError(f"reward.clip={self.clip}: must be positive, or null.")

    @property
    def differentiable(self) -> bool:
        """Whether all parts are."""
        return all(part.differentiable for part in self._parts.values())

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Those of all parts, one behind the other."""
        return tuple(count for part in self._parts.values() for count in part.num_classes)

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return the weighed sum, `[N]`."""
        ones = [1.0] * len(self._parts)
        total, column = torch.zeros(len(images), device=images.device), 0
        for part, weight, scale in zip(
            self._parts.values(), self.weights or ones, self.scales or ones, strict=True
        ):
            own = slice(column, column := column + len(part.num_classes))
            score = scale * part(images, replace(context, label=context.label[:, own]))
            if self.clip is not None:
                score = score.clamp(-self.clip, self.clip)
            total = total + weight * score
        return total
