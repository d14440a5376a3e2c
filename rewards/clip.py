"""CLIP: pictures and words in one space.

Shapes: N pictures `[N, 3, S, S]` in [0, 1], E the width of the space. Source: arXiv:2103.00020.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from diffrl.errors import DiffRLError, first_line

VIT_L_14 = "openai/clip-vit-large-patch14"
"""The model that LAION's aesthetic score stands on, and torchmetrics' CLIPScore."""

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 64  # pictures at a time
_WANTED = ["*.json", "*.txt", "*.safetensors"]


class CLIP:
    """A frozen CLIP model, in float32.

    It is no module, so that its weights are part of no reward's file. Pictures are embedded where they are;
    those on the CPU on a GPU, where there is one. Words are embedded on the CPU, once each.

    Args:
        source: a folder in the layout of transformers, or a hub id.
    """

    def __init__(self, source: str) -> None:
        here = Path(source).is_dir()
        try:
            # in one request: transformers asks for each file, six times where there is no network
            folder = source if here else snapshot_download(source, allow_patterns=_WANTED)
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # each library has its own; all mean that it cannot be loaded
            where = "the folder" if here else "the hub and its cache (HF_HOME)"
            raise DiffRLError(
                f"clip={source}: cannot be loaded from {where}: {first_line(error).rstrip('.')}. Give the "
                f"folder of a CLIP model in the layout of transformers, or a hub id such as {VIT_L_14}."
            ) from error
        self._model.requires_grad_(False).eval().float()
        self._prompts: dict[str, Tensor] = {}  # embedded so far

    @property
    def width(self) -> int:
        """Return E."""
        return self._model.config.projection_dim

    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings of `images`, of length 1, `[N, E]`, with their gradient.

        Pictures are resized to the model's side (224 for ViT-L/14) by the antialiased bicubic filter, as by
        CLIP's own preprocessing, which rounds to 8 bits besides.
        """
        return torch.cat([self._embed(part) for part in images.split(_BATCH)])

    def _embed(self, images: Tensor) -> Tensor:
        at_hand = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = at_hand if images.device.type == "cpu" else images.device
        vision, project = (
            part.to(device) for part in (self._model.vision_model, self._model.visual_projection)
        )
        side = vision.config.image_size
        pixels = images.to(device, torch.float32)
        # the filter overshoots at edges, and no picture does
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        embeds = project(vision(pixel_values=normalise(pixels)).pooler_output)
        return F.normalize(embeds, dim=1).to(images.device)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of `prompts`, of length 1, `[len(prompts), E]`, on the CPU."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]:
            tokens = self._tokenizer(new, padding=True, truncation=True, return_tensors="pt")
            embeds = self._model.text_projection(self._model.text_model(**tokens).pooler_output)
            self._prompts |= zip(new, F.normalize(embeds, dim=1), strict=True)
        return torch.stack([self._prompts[prompt] for prompt in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each picture and its prompt, `[N]`, with its gradient."""
        return (self.embed_images(images) * self.embed_prompts(prompts).to(images.device)).sum(1)


def normalise(images: Tensor) -> Tensor:
    """Return `images` less the mean of CLIP's data, in its standard deviations, by channel."""
    mean, std = (images.new_tensor(numbers)[:, None, None] for numbers in (_MEAN, _STD))
    return (images - mean) / std


@cache
def load_clip(source: str) -> CLIP:
    """Return the model, the same one to all who ask for it."""
    return CLIP(source)
