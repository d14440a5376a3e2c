"""LAION's aesthetic score: how much people would like a picture, 1 to 10, of a CLIP embedding.

Shapes: N pictures `[N, 3, S, S]` in [0, 1], E = 768 the width of CLIP ViT-L/14.
Source: github.com/christophschuhmann/improved-aesthetic-predictor; DDPO, arXiv:2305.13301, section 5.2.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from huggingface_hub import hf_hub_download
from torch import Tensor

from diffrl.errors import DiffRLError, first_line
from diffrl.foreign_weights import read_weights
from diffrl.rewards.clip import VIT_L_14, load_clip
from diffrl.rewards.head import read_head
from diffrl.types import Context

_SUFFIX = r"\.(?:pth|pt|bin|safetensors)"
_ON_HUB = re.compile(rf"(\w[\w.-]*/(?![^/]*{_SUFFIX}$)[\w.-]+)(?:/(.+{_SUFFIX}))?")  # head.pth is no NAME


@dataclass
class Aesthetic:
    """LAION's aesthetic score of the picture, differentiable: about 5.5 for Stable Diffusion v1.5."""

    clip: str = VIT_L_14  # hub id, or a folder in the layout of transformers
    mlp: str | None = None  # LAION's sac+logos+ava1-l14-linearMSE.pth: path, or the hub's OWNER/NAME[/FILE]

    differentiable: ClassVar[bool] = True
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        find_mlp(self.mlp)

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return the score, `[N]`."""
        return aesthetic_score(images, self.clip, str(self.mlp))


def find_mlp(mlp: str | None) -> Path:
    """Return the file of the score's weights, fetched if need be.

    Args:
        mlp: a path, or a file of a repository on the hub, OWNER/NAME/FILE; FILE is by default what
            transformers writes, model.safetensors.

    Raises:
        DiffRLError: there is none.
    """
    if mlp is not None and Path(mlp).is_file():
        return Path(mlp)
    missing = "the aesthetic score needs it" if mlp is None else "no such file"
    if found := _ON_HUB.fullmatch(mlp or ""):
        try:
            return Path(hf_hub_download(found[1], found[2] or "model.safetensors"))
        except Exception as error:  # of many kinds: no network, no such repository or file
            missing += f", nor one on the hub ({first_line(error)})"
    raise DiffRLError(
        f"reward.mlp={'null' if mlp is None else mlp}: {missing}. Give the path of "
        "sac+logos+ava1-l14-linearMSE.pth (github.com/christophschuhmann/improved-aesthetic-predictor), or "
        "OWNER/NAME[/FILE] of one on the hub."
    )


def aesthetic_score(images: Tensor, clip: str, mlp: str) -> Tensor:
    """Return the score of each picture, `[N]`, by the networks at `clip` and `mlp`.

    One preprocessing, `CLIP.embed_images`, for reward and evaluation alike: that of DDPO up to 8 bits.
    Differs from CTRL's code, which resizes without antialiasing: its scores are off by about .05.
    """
    model, (weight, bias) = load_clip(clip), _head(mlp)
    if weight.shape != (1, model.width):
        raise DiffRLError(
            f"reward.mlp={mlp}: maps {weight.shape[1]} numbers to {len(weight)}; it must map the "
            f"{model.width} of reward.clip={clip} to 1. LAION's goes with {VIT_L_14}."
        )
    return model.embed_images(images) @ weight[0].to(images.device) + bias[0].to(images.device)


@cache
def _head(mlp: str) -> tuple[Tensor, Tensor]:
    path = find_mlp(mlp)
    return read_head(path, read_weights(path))
