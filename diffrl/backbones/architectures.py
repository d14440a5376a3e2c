"""What the networks of Stable Diffusion v1.x and v2.x are made of: configs, built in or in a folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffrl.errors import DiffRLError

Configs = Mapping[str, Mapping[str, Any]]
"""Of each part, what its config file says."""


class Network(NamedTuple):
    """One part with weights of its own."""

    name: str
    kind: type[Any]  # that reads it with `from_pretrained`
    weights: str  # the stem of its file
    build: Callable[[Mapping[str, Any]], nn.Module]  # from its config, with random weights


NETWORKS = (
    Network("unet", UNet2DConditionModel, "diffusion_pytorch_model", UNet2DConditionModel.from_config),
    Network("vae", AutoencoderKL, "diffusion_pytorch_model", AutoencoderKL.from_config),
    Network("text_encoder", CLIPTextModel, "model", lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c))),
)

CONFIG_FILES = {part.name: f"{part.name}/config.json" for part in NETWORKS}
CONFIG_FILES["scheduler"] = "scheduler/scheduler_config.json"
"""Where a diffusers folder keeps each part's config."""

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_CLIP = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}

# The rest is as the classes, and CLIP's tokenizer, have it by default. Sources: both models' config files.
SD_V1: Configs = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": _VAE,
    "text_encoder": {
        **_CLIP,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "scheduler": {},
    "tokenizer": {},
}
"""Stable Diffusion v1.5, and 1.1 to 1.4."""

SD_V2: Configs = {
    "unet": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),  # heads at each level, whatever the name says
        "use_linear_projection": True,
    },
    "vae": _VAE | {"sample_size": 768},
    "text_encoder": {
        **_CLIP,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,  # of OpenCLIP's ViT-H/14, without its last one
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    "scheduler": {"prediction_type": "v_prediction"},
    "tokenizer": {"pad_token": "!"},
}
"""Stable Diffusion 2.1 at 768 px; 2.1-base has another `sample_size` (64) and `prediction_type`."""


def read_configs(model: str, folder: Path, default: Configs | None = None) -> Configs:
    """Return the configs in a folder of the diffusers layout.

    Args:
        model: the setting's value, for errors.
        folder: may hold weights and other things beside.
        default: what stands in for a file that is not there; without it, every file must be.

    Raises:
        DiffRLError: a file missing or damaged, or a model of another architecture, by name.
    """
    check_pipeline(model, folder)
    configs = dict(default or {})
    for name, path in CONFIG_FILES.items():
        if name in configs and not (folder / path).is_file():
            continue
        if not (folder / name).is_dir():
            raise DiffRLError(
                f"env.model={model}: no folder {name!r} in {folder}; was the download cut short? A "
                "diffusers checkpoint has unet, vae, text_encoder, tokenizer and scheduler."
            )
        configs[name] = _read(model, folder / path)
    _check(model, configs)
    return configs


def check_pipeline(model: str, folder: Path) -> None:
    """Raise DiffRLError if a `model_index.json` in `folder` says that it is of another family."""
    path = folder / "model_index.json"
    index = _read(model, path) if path.is_file() else {}
    parts = [name for name in ("text_encoder_2", "transformer", "prior") if _used(index.get(name))]
    if parts:
        kind = str(index.get("_class_name", "unknown")).removesuffix("Pipeline")
        raise DiffRLError(
            f"env.model={model}: a {kind} checkpoint (it has a {parts[0]!r}). Supported are Stable "
            "Diffusion v1.x and v2.x, and models of their layout."
        )


def _used(entry: Any) -> bool:
    """Return whether an entry of `model_index.json`, [library, class] or [null, null], names a part."""
    return bool(entry) and entry != [None, None]


def _read(model: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DiffRLError(
            f"env.model={model}: {path} is missing; was the download cut short? Run 'hf download' again."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DiffRLError(f"env.model={model}: {path} is not JSON ({error}). Download it again.") from error
    if not isinstance(read, dict):
        raise DiffRLError(f"env.model={model}: {path} holds no settings. Download it again.")
    return read


def _check(model: str, configs: Configs) -> None:
    unet, vae, text = (configs[name] for name in ("unet", "vae", "text_encoder"))
    taken, given = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latents = vae.get("latent_channels", 4)
    if (taken, given) != (latents, latents):
        raise DiffRLError(
            f"env.model={model}: its denoiser takes {taken} channels and returns {given}, its latents have "
            f"{latents}. Inpainting, depth and upscaling models (9, 5, 7) want a picture beside the "
            "prompt; give the text-to-image model."
        )
    others = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    more = [name for name in (*others, "time_cond_proj_dim") if unet.get(name)]
    if more:
        raise DiffRLError(
            f"env.model={model}: its denoiser is conditioned on more than a prompt ({more[0]}="
            f"{unet[more[0]]}), as SDXL, unCLIP and LCM are. Supported are Stable Diffusion v1.x and v2.x."
        )
    wanted, made = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if wanted != made:
        raise DiffRLError(
            f"env.model={model}: its denoiser wants prompts of width {wanted}, its text encoder makes "
            f"{made}. They are of different models."
        )
