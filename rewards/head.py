"""LAION's head on CLIP embeddings, as it was published."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffrl.errors import DiffRLError

_LAYERS = (0, 2, 4, 6, 7)  # dropout lies between them


def read_head(path: Path, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight `[outputs, E]` and bias `[outputs]` of LAION's head on CLIP embeddings.

    Its five linear layers have no activation between them, so that they are one: their product.

    Args:
        path: where `state` is from, for errors.
        state: `layers.{0,2,4,6,7}.weight` and `.bias`, alone or beside those of a CLIP model.
    """
    if any(name.startswith("vision_model.") for name in state):  # a port to the hub brings its CLIP
        state = {name: tensor for name, tensor in state.items() if name.startswith("layers.")}
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
