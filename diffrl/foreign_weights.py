"""Weights that others have published: read, and nothing in them run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffrl.errors import DiffRLError, first_line


def read_weights(path: Path, name: str | None = None) -> dict[str, Any]:
    """Return the tensors of a `.safetensors` file, or of one of `torch.save`, on the CPU.

    Args:
        path: of the file.
        name: what errors call it, such as the setting that gave it; None: its path.

    Raises:
        DiffRLError: no such file, a damaged one, or one that holds more than tensors.
    """
    name = name or str(path)
    if not path.is_file():
        raise DiffRLError(f"{name}: no such file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DiffRLError(
            f"{name}: damaged, or it holds more than tensors, and nothing in it was run. Save its "
            "state_dict alone."
        ) from error
    except Exception as error:  # a cut archive raises what its reader trips over
        raise DiffRLError(f"{name}: damaged or cut short ({first_line(error)}). Get it again.") from error
    if not isinstance(stored, Mapping):
        raise DiffRLError(f"{name}: holds a {type(stored).__name__}, not a state_dict.")
    return dict(stored)
