"""Stable Diffusion v1.x and v2.x as a backbone: denoiser, autoencoder, text encoder, schedule.

Shapes: N pictures, C,H,W latent, pictures `[N, 3, S, S]` in [0, 1], L tokens of width E.
"""

from collections.abc import Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from diffrl.backbones.loading import Parts, load_parts, random_parts
from diffrl.errors import DiffRLError

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # its products are rounded, see `processes.join`
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Of the denoiser's weights and activations, by name."""

_PIXELS_AT_ONCE = 512**2


class StableDiffusion(nn.Module):
    """The frozen parts of a checkpoint, at any size.

    Only the denoiser runs in half precision. The text encoder runs once a prompt; the autoencoder makes
    what is measured, is 1 call in 100, and Stable Diffusion's overflows in fp16.

    Args:
        parts: as they were read.
        precision: what the denoiser is held in, one of `PRECISIONS`.
        image_size: S; None is what the model was trained at.
    """

    def __init__(self, parts: Parts, *, precision: str = "fp32", image_size: int | None = None) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler = parts
        self.float()
        nn.Module.to(self.unet, PRECISIONS[precision])  # diffusers' own warns of nothing
        self.vae.to(memory_format=torch.channels_last)  # a quarter faster on a CPU too; the denoiser is not
        self.image_size = image_size or _trained_side(self.unet.config) * self._scale
        if self.image_size % self._scale:
            raise DiffRLError(
                f"env.image_size={image_size}: must be a multiple of {self._scale}, the side of one latent."
            )
        # pictures the autoencoder takes at a time: its activations are most of what a gradient holds
        self.slice_size = max(1, min(16, _PIXELS_AT_ONCE // self.image_size**2))
        self.checkpointing = True  # decode: compute activations again in the backward pass
        self.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, model: str, *, revision: str | None = None, random_weights: bool = False, **options: Any
    ) -> Self:
        """Return the checkpoint.

        Args:
            model: see `load_parts`.
            revision: see `load_parts`.
            random_weights: read its architecture alone; see `random_parts`.
            options: of the class.

        Raises:
            DiffRLError: nothing there, a part missing, or a file that cannot be read.
        """
        return cls(random_parts(model) if random_weights else load_parts(model, revision), **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move, as every module does; on a GPU weights become channels-last, as convolutions like it."""
        super().to(*args, **kwargs)
        if self.unet.device.type == "cuda":
            super().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        side = self.image_size // self._scale
        return self.unet.config.in_channels, side, side

    @property
    def _scale(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """(L, E) of `encode_prompts`."""
        return self.tokenizer.model_max_length, self.text_encoder.config.hidden_size

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the text encoder's last hidden states, `[len(prompts), L, E]`."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents `[N, C, H, W]` of pictures: drawn with `generator`, or without one their mean."""
        latents = []
        for part in images.split(self.slice_size):
            law = self.vae.encode(2 * part - 1).latent_dist
            latents.append(law.mean if generator is None else law.sample(generator))
        return self.vae.config.scaling_factor * torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures `[N, 3, S, S]` in [0, 1], `slice_size` at a time."""
        return torch.cat([self._decode(part) for part in latents.split(self.slice_size)])

    def _decode(self, latents: Tensor) -> Tensor:
        def run(latents: Tensor) -> Tensor:
            return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

        if self.checkpointing and torch.is_grad_enabled() and latents.requires_grad:
            pixels = checkpoint(run, latents, use_reentrant=False, preserve_rng_state=False)
        else:
            pixels = run(latents)
        return (pixels / 2 + 0.5).clamp(0, 1)


def _trained_side(unet: Any) -> int:
    """Return the side of the latents by the denoiser's config, of old ones as diffusers' pipeline has it.

    Its converter wrote 32 instead of 64 into every one before version 0.9.
    """
    size = unet.sample_size
    if not isinstance(size, int):
        return max(size)
    made_by = Version(getattr(unet, "_diffusers_version", "0.9"))
    return 64 if size < 64 and Version(made_by.base_version) < Version("0.9") else size
