"""A checkpoint in the Stable Diffusion layout: denoiser, autoencoder, text encoder, schedule.

Shapes: N pictures, C,H,W latent, pictures `[N, 3, S, S]` in [0, 1], L tokens of width E.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTokenizer
from typing_extensions import Self

from diffrl.errors import DiffRLError

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class StableDiffusion(nn.Module):
    """The frozen parts of Stable Diffusion v1.x, at any size."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.checkpointing = True  # decode: compute activations again in the backward pass
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, model: str) -> Self:
        """Return the checkpoint in float32.

        Args:
            model: a folder in the diffusers layout, or a hub id.

        Raises:
            DiffRLError: nothing there, a part missing, or a file that cannot be read.
        """
        folder = Path(model)
        if folder.is_dir():
            missing = [part for part in _PARTS if not (folder / part).is_dir()]
            if missing:
                raise DiffRLError(
                    f"env.model={model}: no folder {missing[0]!r} in it. A diffusers checkpoint has "
                    f"{', '.join(_PARTS)}."
                )
        elif folder.is_absolute() or model.count("/") != 1:
            raise DiffRLError(
                f"env.model={model}: no such folder. Give a diffusers folder or a hub id 'owner/name'."
            )
        kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDIMScheduler)
        try:
            return cls(
                *(
                    kind.from_pretrained(model, subfolder=part)
                    for kind, part in zip(
                        kinds, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"), strict=True
                    )
                )
            ).float()
        except Exception as error:  # each library has its own; all mean that it cannot be loaded
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            where = "the folder" if folder.is_dir() else "the hub and its cache (HF_HOME)"
            raise DiffRLError(
                f"env.model={model}: cannot be loaded from {where}: {reason} Download it again, or give "
                "the path of a complete diffusers folder."
            ) from error

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def image_size(self) -> int:
        """S, the side of a decoded picture in pixels."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

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

    def decode(self, latents: Tensor, slice_size: int = 16) -> Tensor:
        """Return pictures `[N, 3, S, S]` in [0, 1], `slice_size` at a time to bound the memory."""
        return torch.cat([self._decode(part) for part in latents.split(slice_size)])

    def _decode(self, latents: Tensor) -> Tensor:
        def run(latents: Tensor) -> Tensor:
            return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

        if self.checkpointing and torch.is_grad_enabled() and latents.requires_grad:
            pixels = checkpoint(run, latents, use_reentrant=False, preserve_rng_state=False)
        else:
            pixels = run(latents)
        return (pixels / 2 + 0.5).clamp(0, 1)


def fingerprint(model: str) -> str:
    """Return what identifies the checkpoint's content: a hash of its files, or the hub id itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
