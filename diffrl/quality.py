"""Measures of pictures beside the reward: how much they differ, how natural they look, what they show.

Shapes: n pictures `[n, 3, S, S]` in [0, 1]. BRISQUE and CLIPScore need packages or weights that not
everyone has: where they are missing, the measure is a sentence that says what to install.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from diffrl.rewards.clip import load_clip

_BATCH = 64  # pictures at a time


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


def brisque(images: Tensor) -> float | str:
    """Return the mean BRISQUE of `piq`: lower is more natural, nominally 0 to 100.

    Source: Mittal et al., IEEE TIP 21(12), 2012. Implementations differ by several points.
    """
    try:
        import piq  # type: ignore[import-not-found]
    except ImportError:
        return "not available: pip install 'diffrl[metrics]'"
    scores = []
    try:
        for part in images.split(_BATCH):
            scores.append(piq.brisque(part.float().cpu(), data_range=1.0, reduction="none"))
    except Exception as error:  # no weights offline; and a flat picture has no statistics at all
        return f"not available: {' '.join(str(error).split())}"
    return float(torch.cat(scores).mean())


def clip_score(images: Tensor, prompts: Sequence[str], model: str | None) -> float | str:
    """Return max(100 mean cos(picture, prompt), 0), as torchmetrics defines CLIPScore.

    Args:
        images: `[n, 3, S, S]`.
        prompts: n of them.
        model: folder of a CLIP model in the layout of transformers, or a hub id.
    """
    if model is None:
        return "not available: give a CLIP model, a folder or a hub id, as clip=PATH"
    with torch.no_grad():
        return max(100 * float(load_clip(model).similarity(images, prompts).mean()), 0.0)
