"""A checkpoint in one file, in the layout of the original code (CompVis's, Stability's).

Names are converted by diffusers; the networks' configs are built in, so that nothing is looked up.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from diffrl.backbones.architectures import NETWORKS, SD_V1, SD_V2, Configs, read_configs
from diffrl.errors import DiffRLError
from diffrl.foreign_weights import read_weights

_OPEN_CLIP = "cond_stage_model.model."
_DENOISER = "model.diffusion_model."
_AVERAGED = "model_ema.diffusion_model"  # then the name without its dots
_OTHERS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "control_model.": "ControlNet",
    "lora_": "LoRA",
}
"""What the beginning of a weight's name gives away."""


def read_file(model: str, path: Path) -> tuple[dict[str, nn.Module], Configs]:
    """Return the networks of `path`, with the dtype they have there, and the configs they were built from.

    Configs beside the file, as in the hub's repositories (`unet/config.json` and so on), go before the
    built-in ones: those of v1.5, or of 2.1 at 768 px where the text encoder is OpenCLIP's.
    Of a denoiser that is there twice, the average over its training is taken, as in the hub's folders.

    Raises:
        DiffRLError: no whole file, a pickle with more than tensors, another architecture, a weight that is
            missing, has another shape or no place.
    """
    weights = _tensors(model, path)
    for prefix, kind in _OTHERS.items():
        if any(name.startswith(prefix) for name in weights):
            raise DiffRLError(
                f"env.model={model}: a {kind} file ({prefix!r} in it). Supported are whole checkpoints of "
                "Stable Diffusion v1.x and v2.x."
            )
    if not any(name.startswith(_DENOISER) for name in weights):
        raise DiffRLError(
            f"env.model={model}: no weight begins with {_DENOISER!r}, as in a checkpoint of the original "
            "layout. Of the diffusers layout, give the folder."
        )
    second = any(name.startswith(_OPEN_CLIP) for name in weights)
    default = dict(SD_V2 if second else SD_V1)
    if (first := weights.get(_DENOISER + "input_blocks.0.0.weight")) is not None:
        default["unet"] = {**default["unet"], "in_channels": first.shape[1]}  # not 4: refused by its name
    configs = read_configs(model, path.parent, default)
    if second and configs["scheduler"] is SD_V2["scheduler"]:
        warnings.warn(
            f"env.model={model}: read as Stable Diffusion 2.x of 768 px, which predicts v. A base model, "
            "of 512 px, predicts noise, and the weights do not tell: put unet/config.json and "
            "scheduler/scheduler_config.json beside it, or give the folder of the diffusers layout.",
            stacklevel=2,
        )
    weights = _averaged(model, weights)
    networks: dict[str, nn.Module] = {}
    for part in NETWORKS:
        with init_empty_weights(include_buffers=False):
            network = part.build(configs[part.name])
        converted = _converted(part.name, network, weights, second)
        _fill(model, part.name, network, converted)
        if part.name == "unet":
            _check_all_read(model, weights, [converted[name] for name in network.state_dict()])
        networks[part.name] = network
    return networks, configs


def _tensors(model: str, path: Path) -> dict[str, Tensor]:
    found = read_weights(path, f"env.model={model}")
    found = found.get("state_dict", found)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _averaged(model: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the denoiser's averages, if there are any, in the place of its last ones."""
    if not any(name.startswith(_AVERAGED) for name in weights):
        return weights
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("model_ema.")}
    for name in kept:
        if name.startswith(_DENOISER):
            average = _AVERAGED + name.removeprefix(_DENOISER).replace(".", "")
            if average not in weights:
                raise DiffRLError(
                    f"env.model={model}: it has averages of some of the denoiser's weights (model_ema.*), "
                    f"and none of {name!r}. Give the whole file, or one without averages."
                )
            kept[name] = weights[average]
    return kept


def _converted(part: str, network: Any, weights: dict[str, Tensor], second: bool) -> Mapping[str, Tensor]:
    if part == "unet":
        return convert_ldm_unet_checkpoint(weights, network.config)
    if part == "vae":
        return convert_ldm_vae_checkpoint(weights, network.config)
    text = (
        convert_open_clip_checkpoint(network, weights, _OPEN_CLIP)
        if second
        else convert_ldm_clip_checkpoint(weights)
    )
    if hasattr(network, "text_model"):  # transformers 4
        return text
    return {name.removeprefix("text_model."): tensor for name, tensor in text.items()}


def _fill(model: str, part: str, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, empty in network.state_dict().items():
        if name not in weights:
            raise DiffRLError(f"env.model={model}: no weights for {part} {name!r}: another architecture.")
        if weights[name].shape != empty.shape:
            raise DiffRLError(
                f"env.model={model}: {part} {name!r} has shape {list(weights[name].shape)}, not "
                f"{list(empty.shape)}: another architecture. Put its config.json files beside it."
            )
    network.load_state_dict(weights, strict=False, assign=True)


def _check_all_read(model: str, weights: Mapping[str, Tensor], read: Sequence[Tensor]) -> None:
    """Raise DiffRLError if the denoiser has weights that are not among those `read`."""
    known = {id(tensor) for tensor in read}  # the conversion moves the denoiser's, and copies none
    for name, tensor in weights.items():
        if name.startswith(_DENOISER) and id(tensor) not in known:
            raise DiffRLError(
                f"env.model={model}: the denoiser has no place for {name!r}: another architecture, as "
                "unCLIP is. Supported are Stable Diffusion v1.x and v2.x, and models of their layout."
            )
