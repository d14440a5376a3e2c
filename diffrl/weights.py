"""What a run has learnt, on disk: the adapters and the control. Never pickle.

`pytorch_lora_weights.safetensors` is read by stock `pipe.load_lora_weights(folder)`;
`control.safetensors` holds the label embedding, which no stock pipeline knows.
"""

import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrl import disk
from diffrl.errors import DiffRLError
from diffrl.policy import LabelEmbedding, Policy

LORA_FILE = "pytorch_lora_weights.safetensors"
CONTROL_FILE = "control.safetensors"


def save(policy: Policy, folder: Path) -> None:
    """Write both files, each whole or not at all."""
    lora = get_peft_model_state_dict(policy.unet)
    lora = {name: tensor.detach().cpu().contiguous() for name, tensor in lora.items()}
    with disk.replacing(folder / LORA_FILE) as draft:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=lora, weight_name=draft.name)
    control = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in policy.label_embedding.state_dict().items()
    }
    counts = policy.label_embedding.num_classes
    with disk.replacing(folder / CONTROL_FILE) as draft:
        save_file(control, draft, metadata={"num_classes": json.dumps(counts)})


def load(policy: Policy, folder: Path) -> None:
    """Put the weights that `save` wrote into `policy`.

    Raises:
        DiffRLError: a file missing or cut short, or weights of another shape or place.
    """
    lora = read_lora(folder)
    _check(folder / LORA_FILE, lora, get_peft_model_state_dict(policy.unet))
    set_peft_model_state_dict(policy.unet, lora)
    path = folder / CONTROL_FILE
    control = _read(path)
    _check(path, control, policy.label_embedding.state_dict())
    policy.label_embedding.load_state_dict(control)


def load_control(folder: Path, width: int) -> LabelEmbedding:
    """Return the label embedding that `save` wrote, of a denoiser whose time embedding has this width.

    Raises:
        DiffRLError: the file missing or cut short, or of another width.
    """
    path = folder / CONTROL_FILE
    tables = _read(path)
    embedding = LabelEmbedding([len(table) - 1 for _, table in sorted(tables.items())], width)
    _check(path, tables, embedding.state_dict())
    embedding.load_state_dict(tables)
    return embedding.requires_grad_(False)


def read_lora(folder: Path) -> dict[str, Tensor]:
    """Return the adapters that `save` wrote, under peft's names.

    Raises:
        DiffRLError: the file missing or cut short.
    """
    return {name.removeprefix("unet."): tensor for name, tensor in _read(folder / LORA_FILE).items()}


def load_lora(
    pipeline: StableDiffusionPipeline, path: Path, lora: dict[str, Tensor], adapter_name: str
) -> None:
    """Load a file of adapters by stock `load_lora_weights`, which leaves out in silence what does not fit.

    Args:
        pipeline: gets them.
        path: the file, in any layout that diffusers reads.
        lora: what the denoiser must hold then, under peft's names.
        adapter_name: for `pipeline.set_adapters`.

    Raises:
        DiffRLError: it does not hold that.
    """
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
        loaded = get_peft_model_state_dict(pipeline.unet, adapter_name=adapter_name)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:  # each by what does not fit
        reason = str(error).strip().partition("\n")[0]
        raise DiffRLError(f"{path}: stock diffusers cannot load it into this model ({reason}).") from error
    _check(path, loaded, lora)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DiffRLError(f"{path}: missing. Is {path.parent} a run that has saved its weights?")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DiffRLError(f"{path}: damaged or cut short ({error}). Train again.") from error


def _check(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected.keys() - found.keys():
        raise DiffRLError(f"{path}: has no {name!r}. Was it written with the same policy.targets?")
    for name, tensor in found.items():
        if name not in expected or tensor.shape != expected[name].shape:
            want = list(expected[name].shape) if name in expected else "nothing of that name"
            raise DiffRLError(
                f"{path}: {name!r} has shape {list(tensor.shape)}, the policy has {want}. "
                "Was it written with the same env.model and policy.rank?"
            )
