"""Measures of pictures beside the reward: how much they differ, what they are like, what they show.

Shapes: n pictures `[n, 3, S, S]` in [0, 1]. BRISQUE and CLIPScore need packages or weights that not
everyone has: where they are missing, the measure is a sentence that says what to install.
"""

import math
import warnings
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffrl.rewards.clip import load_clip
from diffrl.types import to_pixels

_BATCH = 64  # pictures at a time
_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as JPEG has it
# Of the range from black to white, chosen: above shading, below outlines. At .1 little of the emoji model's
# pictures counts, and sound training alone makes it 1.5 times as much; at .05, 1.08 times
_EDGE = 0.05
_LEVELS = 8  # of a channel, 512 colours: chosen, a picture of 64 pixels a side has 8 pixels for each


def diversity(images: Tensor, groups: Sequence[Hashable]) -> float | None:
    """Return the mean distance of two pictures of the same group, 0 to 1; None where no group has two.

    The distance is the root mean square difference over pixels and channels. A group is a prompt and a
    label: a model that draws one cat only scores 0, however many animals it knows.
    """
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    flat = images.flatten(1).float()
    distances = [torch.pdist(flat[same]) for same in members.values() if len(same) > 1]
    return float(torch.cat(distances).mean()) / flat.shape[1] ** 0.5 if distances else None


def image_statistics(images: Tensor) -> dict[str, float]:
    """Return what pictures are like whatever they show, means over all of them.

    `brightness`, 0 to 1: mean luma, .299 R + .587 G + .114 B (BT.601). `saturation`, 0 to 1: mean of HSV's,
    (max - min) / max over a pixel's channels, 0 for black. `edge_density`, 0 to 1: the share of pairs of
    pixels, side by side or one above the other, whose luma differs by more than .05. `colour_entropy`, 0 to
    9 bits: Shannon's, of a picture's histogram over 8 x 8 x 8 colours.
    """
    parts = [_statistics(part.float()) for part in images.split(_BATCH)]
    return {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}


def _statistics(images: Tensor) -> dict[str, Tensor]:
    luma = torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMA))
    pairs = [luma.diff(dim=dim).flatten(1) for dim in (1, 2)]
    high, low = images.amax(1), images.amin(1)
    level = (images * _LEVELS).long().clamp(0, _LEVELS - 1)
    colour = (level[:, 0] * _LEVELS + level[:, 1]) * _LEVELS + level[:, 2]
    counts = torch.stack([torch.bincount(own.flatten(), minlength=_LEVELS**3) for own in colour])
    return {
        "edge_density": (torch.cat(pairs, 1).abs() > _EDGE).float().mean(1),
        "saturation": ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
        "brightness": luma.mean((1, 2)),
        "colour_entropy": torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1) / math.log(2),
    }


def unavailable(measure: str, clip: str | None) -> str:
    """Return why `brisque` or `clip_score` has no value here, and the remedy; "" if it has, or of others.

    Args:
        measure: name of it.
        clip: as `clip_score` takes it.
    """
    if measure == "brisque":
        try:
            import brisque  # noqa: F401
        except ImportError:
            return "not available: pip install 'diffrl[metrics]'"
    if measure == "clip_score" and clip is None:
        return "not available: give a CLIP model, a folder or a hub id, as clip=PATH"
    return ""


def brisque(images: Tensor) -> float | str:
    """Return the mean BRISQUE of the package `brisque`: lower is more natural, nominally 0 to 100.

    A flat picture has no statistics, hence no score, and is left out.

    Source: Mittal et al., IEEE TIP 21(12), 2012. Implementations differ by several points.
    """
    if why := unavailable("brisque", None):
        return why
    from brisque import BRISQUE

    class Scorer(BRISQUE):
        def scale_features(self, features: np.ndarray) -> np.ndarray:
            # some are arrays of one number, which NumPy 2.4 no longer takes for a number
            return super().scale_features([np.asarray(feature).item() for feature in features])

    scorer = Scorer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the divisions a flat picture ends in
        scores = np.array([scorer.score(picture) for picture in to_pixels(images)])
    if np.isnan(scores).all():
        return "not available: all pictures are flat"
    return float(np.nanmean(scores))


def clip_score(images: Tensor, prompts: Sequence[str], model: str | None) -> float | str:
    """Return max(100 mean cos(picture, prompt), 0), as torchmetrics defines CLIPScore.

    Args:
        images: `[n, 3, S, S]`.
        prompts: n of them.
        model: folder of a CLIP model in the layout of transformers, or a hub id.
    """
    if model is None:
        return unavailable("clip_score", model)
    with torch.no_grad():
        return max(100 * float(load_clip(model).similarity(images, prompts).mean()), 0.0)
