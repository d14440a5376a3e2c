"""Weights that others have published: read, and nothing in them run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffrl.errors import DiffRLError


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors of a `.safetensors` file, or of one of `torch.save`, on the CPU.

    Raises:
        DiffRLError: no such file, a damaged one, or one that holds more than tensors.
    """
    if not path.is_file():
        raise DiffRLError(f"{path}: no such file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DiffRLError(
            f"{path}: damaged, or it holds more than tensors, and nothing in it was run. Save its "
            "state_dict alone."
        ) from error
    except Exception as error:  # a cut archive raises what its reader trips over
        raise DiffRLError(
            f"{path}: damaged or cut short ({str(error).splitlines()[0]}). Get it again."
        ) from error
    if not isinstance(stored, Mapping):
        raise DiffRLError(f"{path}: holds a {type(stored).__name__}, not a state_dict.")
    return dict(stored)


_LAYERS = (0, 2, 4, 6, 7)  # dropout lies between them


def read_head(path: Path, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight `[outputs, E]` and bias `[outputs]` of LAION's head on CLIP embeddings.

    Its five linear layers have no activation between them, so that they are one: their product.

    Args:
        path: where `state` is from, for errors.
        state: `layers.{0,2,4,6,7}.weight` and `.bias`.
    """
    names = {f"layers.{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")}
    if state.keys() != names:
        stray = sorted(state.keys() ^ names)[0]
        raise DiffRLError(
            f"{path}: not a linear head on CLIP embeddings, {stray!r} is "
            f"{'missing' if stray in names else 'no part of one'}. Give one with layers 0, 2, 4, 6, 7, as "
            "LAION's sac+logos+ava1-l14-linearMSE.pth."
        )
    weight, bias = state["layers.0.weight"].double(), state["layers.0.bias"].double()
    for layer in _LAYERS[1:]:
        own = state[f"layers.{layer}.weight"].double()
        weight, bias = own @ weight, own @ bias + state[f"layers.{layer}.bias"].double()
    return weight.float(), bias.float()
