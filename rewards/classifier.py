"""Networks that classify pictures: p(y|x) for the rewards, p(c|x) for prompt fidelity.

Shapes: N pictures `[N, 3, H, W]` in [0, 1], H and W multiples of 16; K classes.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrl.errors import DiffRLError
from diffrl.rewards.clip import load_clip, normalise
from diffrl.rewards.measures import PUBLISHED_SIZE, opponents


class ConvFeatures(nn.Module):
    """Four strided convolutions and a global average: `[N, 3, H, W]` to `[N, 128]`.

    Differs from CTRL's classifier (a residual CNN with batch norm): group norm, so that a picture's
    score depends neither on its batch nor on a train/eval mode.
    """

    size = 128

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of `images`, `[N, 128]`."""
        return self.layers(2 * images - 1).mean((2, 3))


class BlockDCTFeatures(nn.Module):
    """What JPEG looks at, differentiably: `[N, 3, H, W]` to `[N, 384]`.

    For each of 3 x 64 coefficients c of the 8 x 8 block DCT of Y, Cb, Cr (chroma halved), in steps of the
    quantiser, the mean over blocks of the bits of its magnitude, log(1 + (c/s)^2) / 2, at two softnesses
    s. They are far above the step that decides the size, on purpose: at s = 1/2 the classifier is a
    little better (.915 against .902 on emoji), but its gradient is about invisible noise; with s = 1
    besides, a policy obeys as well and loses prompt fidelity.

    Differs from CTRL's classifier, a residual CNN on pixels: with 2,000 pictures it is far more accurate,
    and has no texture blind spot to exploit. Source of the transform: ITU-T T.81, A.3.3 and annex K.1,
    tables scaled to quality 95 as libjpeg does.
    """

    size = 384
    kernels: Tensor
    steps: Tensor
    ycbcr: Tensor

    def __init__(self) -> None:
        super().__init__()
        n = torch.arange(8, dtype=torch.float64)
        basis = torch.cos((2 * n[None] + 1) * n[:, None] * math.pi / 16) / 2
        basis[0] /= math.sqrt(2)
        kernels = torch.einsum("ux,vy->uvxy", basis, basis).reshape(64, 1, 8, 8)
        luma, chroma = (torch.tensor(table, dtype=torch.float64) for table in (_LUMA, _CHROMA))
        steps = torch.stack([luma, chroma, chroma]) * 0.1  # quality 95: 200 - 2 * 95 per cent
        steps = (steps + 0.5).floor().clamp(min=1)
        ycbcr = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
        self.register_buffer("kernels", kernels.float(), persistent=False)
        self.register_buffer("steps", steps.float()[:, None, :, None, None], persistent=False)
        self.register_buffer("ycbcr", torch.tensor(ycbcr), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of `images`, `[N, 384]`."""
        planes = torch.einsum("kc,nchw->knhw", self.ycbcr, 255 * images)
        planes = planes - torch.tensor([128.0, 0, 0], device=images.device).view(3, 1, 1, 1)
        features = []
        for number, plane in enumerate(planes):
            if number:
                plane = F.avg_pool2d(plane, 2)
            coefficients = F.conv2d(plane[:, None], self.kernels, stride=8) / self.steps[number]
            for softness in (4, 16):
                features.append((coefficients / softness).square().log1p().mean((2, 3)) / 2)
        return torch.cat(features, 1)


class ColourFeatures(nn.Module):
    """What colourfulness is made of, differentiably: `[N, 3, H, W]` to `[N, 6]`.

    Of each opponent plane mean and standard deviation over the picture, and both planes' joint ones.
    """

    size = 6

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of `images`, `[N, 6]`."""
        planes = opponents(images).flatten(2)
        mean, variance = planes.mean(2), planes.var(2, correction=0)
        # 1: a step of 8 bits, without which a picture of one colour would have no derivative
        lengths = [(square.sum(1, keepdim=True) + 1).sqrt() for square in (mean.square(), variance)]
        return torch.cat([mean, (variance + 1).sqrt(), *lengths], 1)


class MixedFeatures(nn.Module):
    """What most rewards look at: `[N, 3, H, W]` to `[N, 438]`.

    Textures (`BlockDCTFeatures`), colours (`ColourFeatures`), and the whole picture at 4 x 4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([BlockDCTFeatures(), ColourFeatures()])
        self.size = BlockDCTFeatures.size + ColourFeatures.size + 3 * 4 * 4

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of `images`, `[N, 438]`."""
        coarse = F.adaptive_avg_pool2d(images, 4).flatten(1)
        return torch.cat([*(part(images) for part in self.parts), coarse], 1)


class ClipFeatures(nn.Module):
    """CLIP's embedding, of length 1: `[N, 3, H, W]` to `[N, E]`. Its weights stay outside of this module.

    Args:
        clip: folder or hub id.
    """

    def __init__(self, clip: str) -> None:
        super().__init__()
        self.clip = load_clip(clip)
        self.size = self.clip.width

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of `images`, `[N, E]`."""
        return self.clip.embed_images(images)


class ResidualFeatures(nn.Module):
    """The body of the residual CNN that CTRL's authors have published: `[N, 3, 512, 512]` to `[N, 256]`.

    Each of three blocks is relu(conv(relu(conv(x))) + shortcut(x)). Its batch norms are part of the
    convolutions here: trained, they are nothing else.
    """

    size = 256

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for (narrow, wide), stride in zip(pairwise((3, 64, 128, self.size)), (1, 2, 2), strict=True):
            block = {
                "conv1": nn.Conv2d(narrow, wide, 3, stride, 1),
                "conv2": nn.Conv2d(wide, wide, 3, 1, 1),
                "shortcut": nn.Conv2d(narrow, wide, 1, stride),
            }
            self.blocks.append(nn.ModuleDict(block))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of `images`, `[N, 256]`."""
        if images.shape[-2:] != (PUBLISHED_SIZE, PUBLISHED_SIZE):
            raise DiffRLError(
                f"reward.classifier: CTRL's own reads pictures of {PUBLISHED_SIZE} px, these have "
                f"{images.shape[-1]}. Use env=sd15, or leave reward.classifier out to fit one."
            )
        hidden = normalise(images)
        for block in self.blocks:
            inner = block["conv2"](F.relu(block["conv1"](hidden)))  # type: ignore[index]
            hidden = F.relu(inner + block["shortcut"](hidden))  # type: ignore[index]
        return hidden.mean((2, 3))


FEATURES: dict[str, type[Any]] = {
    "dct": BlockDCTFeatures,
    "colour": ColourFeatures,
    "mixed": MixedFeatures,
    "cnn": ConvFeatures,
    "clip": ClipFeatures,
    "residual": ResidualFeatures,
}


class Classifier(nn.Module):
    """Calibrated log p(y|x) over K classes.

    Args:
        num_classes: K.
        features: "dct" (for anything about compression), "colour", "mixed" (both, and the coarse picture),
            "clip", "cnn" (for anything else), or "residual" (a published one).
        hidden: width of the head's one hidden layer; None: it is linear.
        spare: logits of classes that no picture has, as CTRL's authors' heads have one. They count in the
            softmax and are not returned.
        clip: of "clip" features, their model.
    """

    shift: Tensor
    scale: Tensor
    temperature: Tensor

    def __init__(
        self,
        num_classes: int,
        features: str = "cnn",
        hidden: int | None = 64,
        *,
        spare: int = 0,
        clip: str | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.hidden, self.spare = num_classes, hidden, spare
        self.features: Any = FEATURES[features](clip) if features == "clip" else FEATURES[features]()
        size, logits = self.features.size, num_classes + spare
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("temperature", torch.ones(()))
        self.head = (
            nn.Sequential(nn.Linear(size, logits))
            if hidden is None
            else nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, logits))
        )

    def standardise(self, features: Tensor) -> None:
        """Make the head see zero mean and unit variance on `features` `[N, F]`."""
        self.shift.copy_(features.mean(0))
        spread = features.std(0, correction=min(len(features) - 1, 1))  # one picture has none
        self.scale.copy_(spread.clamp(min=1e-3))

    def logits(self, features: Tensor) -> Tensor:
        """Return logits `[N, K + spare]` of features `[N, F]`, before the temperature."""
        return self.head((features - self.shift) / self.scale)

    def forward(self, images: Tensor) -> Tensor:
        """Return log p(y|x) for every class, `[N, K]`, in nats."""
        log_prob = (self.logits(self.features(images)) / self.temperature).log_softmax(1)
        return log_prob[:, : self.num_classes]


# fmt: off
_LUMA = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]
_CHROMA = [
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
]
# fmt: on
