"""Altered copies of pictures: what a true measure labels anew costs a moment, and drawing one much more.

Shapes: N pictures `[N, 3, S, S]` in [0, 1].
"""

import torch
from torch import Tensor

from diffrl.errors import DiffRLError

_FACTOR = 0.4, 1.6  # chosen: pale and flat to gaudy, so that a policy's own pictures lie between


def altered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures whose channels are shuffled, and whose saturation and contrast are others.

    Shapes and textures stay the model's own, colours go further. To a classifier of the true measure they
    are pictures like others, and tell it what is true where a policy may lead.
    """
    order = torch.rand(len(images), 3, generator=generator).argsort(1)
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    low, high = _FACTOR
    saturation, contrast = low + (high - low) * torch.rand(2, len(images), 1, 1, 1, generator=generator)
    grey = images.mean(1, keepdim=True)
    images = grey + saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + contrast * (images - mean)).clamp(0, 1)


def check_copies(copies: int, features: str | None = None) -> None:
    """Raise DiffRLError unless so many copies of a picture can be learnt from."""
    if copies < 0:
        raise DiffRLError(f"reward.copies={copies}: must be 0 or more.")
    if copies and features == "cnn":
        raise DiffRLError(
            f"reward.copies={copies} reward.features=cnn: copies are looked at once, and these features "
            "learn; take reward.features=dct, or reward.copies=0."
        )
