"""Measures of pictures beside the reward: how much they differ, how natural they look, what they show.

Shapes: n pictures `[n, 3, S, S]` in [0, 1]. BRISQUE and CLIPScore need packages or weights that not
everyone has: where they are missing, the measure is a sentence that says what to install.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.types import to_pixels

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
        model: folder of a CLIP model in the layout of transformers.
    """
    if model is None:
        return "not available: give the folder of a CLIP model as clip=PATH"
    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(model).to(images.device)
    processor = CLIPProcessor.from_pretrained(model)
    total = 0.0
    for start in range(0, len(prompts), _BATCH):
        pictures = list(to_pixels(images[start : start + _BATCH]))
        words = list(prompts[start : start + _BATCH])
        inputs: Any = processor(
            text=words, images=pictures, return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad():
            seen = clip(**inputs.to(images.device))
        total += float(torch.cosine_similarity(seen.image_embeds, seen.text_embeds).sum())
    return max(100 * total / len(prompts), 0.0)
