"""JPEG size: the true measure of compressibility, a black box.

Shapes: N pictures `[N, 3, H, W]` in [0, 1].
Source: DDPO, arXiv:2305.13301, section 5.1; CTRL, arXiv:2406.12120, section 6.
"""

import io
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffrl.types import Context, to_pixels

QUALITY = 95  # DDPO and CTRL


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Return the size of each picture in kB (1000 bytes) as a JPEG of quality 95, 4:2:0, `[N]`.

    Examples:
        >>> flat, noise = torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)
        >>> sizes = jpeg_kilobytes(torch.stack([flat, noise]))
        >>> sizes.shape, bool(sizes[0] < sizes[1])
        (torch.Size([2]), True)
    """
    sizes = []
    for picture in to_pixels(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


@dataclass
class Jpeg:
    """Minus the JPEG size in kB: small files are good."""

    differentiable: ClassVar[bool] = False
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return minus the size in kB, `[N]`."""
        return -jpeg_kilobytes(images).to(images.device)


@dataclass
class JpegIncompressible:
    """The JPEG size in kB: large files are good."""

    differentiable: ClassVar[bool] = False
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return the size in kB, `[N]`."""
        return jpeg_kilobytes(images).to(images.device)
