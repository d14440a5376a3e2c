"""Is a component of yours what the toolkit takes it for? `check_reward`, `check_env`, `check_algorithm`.

Each says nothing if all is well, and else raises a `DiffRLError` with a line for every fault: what was
found, and how to mend it. They look at what can be seen from outside, in seconds, on a CPU.
"""

import pickle
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrl.components import as_component
from diffrl.errors import DiffRLError


def raise_faults(name: str, faults: Iterable[str]) -> None:
    """Raise DiffRLError with a line for each of the faults, if there are any."""
    found = list(faults)
    if found:
        count = f"{len(found)} fault{'s' if len(found) > 1 else ''}"
        raise DiffRLError("\n- ".join([f"{name}: {count}", *found]))


def instance(group: str, own: Any) -> Any:
    """Return an object with the default settings, where `own` is a class or a function."""
    if isinstance(own, type) or (callable(own) and hasattr(own, "__name__")):
        return as_component(group, own.__name__, own)()
    return own


def global_generators() -> bytes:
    """Return the state of the generators to be left alone: PyTorch's, NumPy's and Python's."""
    return pickle.dumps((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))


def alike(one: Tensor, other: Tensor) -> Tensor:
    """Return which scores `[N]` are the same but for the rounding of another batch size."""
    spread = one.max() - one.min()
    return (one - other).abs() <= 1e-3 * spread + 1e-5 * one.abs().max()
