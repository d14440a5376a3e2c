"""Classifier files: ours, and those that CTRL's authors have published.

Theirs holds `model_state_dict`, of a residual CNN on pictures of 512 px (compressibility) or of LAION's
head on CLIP embeddings (aesthetic score), and `scaler`, one temperature. Both have a logit to spare.
Source: github.com/zhaoyl18/CTRL.
"""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

import torch
from torch import Tensor, nn

from diffrl.errors import DiffRLError
from diffrl.foreign_weights import read_weights
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.head import read_head
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.rewards.measures import MEASURES


def load_reward(
    paths: Sequence[str],
    asked: Mapping[str, int],
    networks: Mapping[str, str],
    edges: Mapping[str, Sequence[float]],
) -> LogLikelihood:
    """Return the reward that lies in `paths`.

    Args:
        paths: one `.safetensors` file of ours, or one of CTRL's `.pth` files a measure, in their order.
        asked: the number of classes of each measure, in the label's order.
        networks: where those lie that a measure stands on, by name.
        edges: those asked for, of each measure of which some are.

    Raises:
        DiffRLError: no such file, not a classifier's, not one file a measure, other classes or edges.
    """
    given = ",".join(paths)
    if len(paths) == 1 and Path(paths[0]).suffix == ".safetensors":
        reward = LogLikelihood.load(Path(paths[0]))
    elif len(paths) == len(asked):
        reward = LogLikelihood(
            [_attribute(Path(path), name, networks) for path, name in zip(paths, asked, strict=True)]
        )
    else:
        raise DiffRLError(
            f"reward.classifier={given}: {len(paths)} file(s), {len(asked)} measure(s); give one "
            f".safetensors of 'diffrl fit', or one .pth each of {', '.join(asked)}."
        )
    known = [(attribute.name, attribute.classifier.num_classes) for attribute in reward.attributes]
    if known != list(asked.items()):
        has, wants = (" and ".join(f"{n} classes of {m}" for m, n in c) for c in (known, asked.items()))
        raise DiffRLError(
            f"reward.classifier={given}: it knows {has}, this reward has {wants}. Choose the reward and "
            "the number of classes that it was fitted for."
        )
    for attribute in reward.attributes:
        own = attribute.edges.cpu()
        wanted = torch.tensor(edges.get(attribute.name, own.tolist()))
        if not torch.allclose(own, wanted):
            raise DiffRLError(
                f"reward.classifier={given}: its edges of {attribute.name} are {own.tolist()}, "
                f"reward.edges asks for {wanted.tolist()}. Leave them out, or run 'diffrl fit' with them."
            )
    return reward


def _attribute(path: Path, name: str, networks: Mapping[str, str]) -> Attribute:
    if not path.is_file():
        raise DiffRLError(f"{path}: no such classifier file. 'diffrl fit' writes one.")
    stored, measure, residual = read_weights(path), MEASURES[name], name == "compressibility"
    try:
        state, temperature = stored["model_state_dict"], stored["scaler"]["temperature"]
        num_logits = len(state["fc.bias" if residual else "layers.7.bias"])
    except (KeyError, TypeError) as error:
        raise DiffRLError(
            f"{path}: not one of CTRL's classifiers of {name}, {error} is missing."
        ) from error
    edges = measure.published.get(num_logits - 1)
    if edges is None:
        known = " or ".join(str(count + 1) for count in measure.published) or "none of them"
        raise DiffRLError(f"{path}: has {num_logits} logits; CTRL's classifiers of {name} have {known}.")
    networks = {key: networks[key] for key in measure.networks}
    features = "residual" if residual else "clip"
    clip = networks.get("clip")
    classifier = Classifier(num_logits - 1, features, hidden=None, spare=1, clip=clip)
    if residual:
        _fold(path, state, classifier)
    else:
        _put(path, classifier.head[0], *read_head(path, state))
    classifier.temperature.copy_(temperature.squeeze())
    report = FitReport(0, 0, nan, nan, nan, nan, float(temperature), ())  # theirs, not ours, to know
    return Attribute(name, classifier, torch.tensor(edges), report, networks=networks)


def _fold(path: Path, state: Mapping[str, Tensor], classifier: Classifier) -> None:
    """Put the residual CNN into `classifier`, each batch norm, as in evaluation, into its convolution."""
    pairs = {"conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2"), "shortcut": ("shortcut.0", "shortcut.1")}
    try:
        for number, block in enumerate(classifier.features.blocks, 1):
            for name, (conv, norm) in pairs.items():
                kernel, mean, variance, scale, shift = (
                    state[f"layer{number}.{key}"]
                    for key in (
                        f"{conv}.weight",
                        f"{norm}.running_mean",
                        f"{norm}.running_var",
                        f"{norm}.weight",
                        f"{norm}.bias",
                    )
                )
                folded = nn.utils.fuse_conv_bn_weights(kernel, None, mean, variance, 1e-5, scale, shift)
                _put(path, block[name], *folded)
        _put(path, classifier.head[0], state["fc.weight"], state["fc.bias"])
    except KeyError as error:
        raise DiffRLError(f"{path}: not CTRL's residual CNN, {error} is missing.") from error


def _put(path: Path, layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    want, found = list(layer.weight.shape), list(weight.shape)  # type: ignore[arg-type]
    if want != found:
        raise DiffRLError(f"{path}: a layer has shape {found}; of one of CTRL's classifiers it is {want}.")
    layer.load_state_dict({"weight": weight, "bias": bias})
