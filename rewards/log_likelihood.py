"""The reward log p(y|x, c): a learned, calibrated classifier of a true measure.

Shapes: N pictures `[N, 3, H, W]` in [0, 1], K classes. Source: CTRL, arXiv:2406.12120, algorithm 1.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

from diffrl.errors import DiffRLError
from diffrl.rewards.classifier import FEATURES, Classifier
from diffrl.rewards.jpeg import jpeg_kilobytes
from diffrl.types import NO_LABEL, Context


@dataclass(frozen=True)
class FitReport:
    """How good a classifier is on pictures it was not fitted to."""

    num_train: int
    num_held_out: int
    accuracy: float
    nll_before: float  # nats, at temperature 1
    nll: float  # nats, calibrated
    ece: float  # expected calibration error, 15 bins
    temperature: float
    class_counts: tuple[int, ...]


def class_of(size: Tensor, edges: Tensor) -> Tensor:
    """Return the class of each size `[N]` in kB: the number of edges it does not exceed.

    So the last class holds the smallest files, and a size on an edge belongs to the smaller side
    (CTRL: r >= -60 is class 3, with r minus the size).
    """
    return (size[:, None] <= edges.to(size)).sum(1)


def of_label(log_prob: Tensor, context: Context) -> Tensor:
    """Return each row's entry for its own label, `[N]` of `log_prob` `[N, K]`; 0 where it is NO_LABEL."""
    label = context.label[:, 0]
    own = log_prob.gather(1, label.clamp(min=0)[:, None])[:, 0]
    return torch.where(label == NO_LABEL, torch.zeros_like(own), own)


class LogLikelihood(nn.Module):
    """r(x, c, y) = log p(y|x), from the log-softmax; the strength gamma belongs to the algorithm.

    Differs from CTRL's code, log(p + 1e-6), whose gradient vanishes where it is needed most.

    Args:
        classifier: gives log p(y|x).
        edges: `[K - 1]`, kB, rising: the classes of the true measure.
        report: of the fit.
        pretrained_log_prob: `[M, K]`, log p(y|x) on pictures of the pretrained policy that the
            classifier was not fitted to; from these comes log Z. None where the data were others.
        ceiling: c in (0, 1]. The reward is log min(p(y|x), c): past what the classifier can tell, it asks
            for nothing more, and the KL alone moves the picture.
    """

    differentiable: ClassVar[bool] = True
    edges: Tensor
    pretrained_log_prob: Tensor | None

    def __init__(
        self,
        classifier: Classifier,
        edges: Tensor,
        report: FitReport,
        pretrained_log_prob: Tensor | None = None,
        ceiling: float = 1.0,
    ) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.register_buffer("edges", edges)
        self.register_buffer("pretrained_log_prob", pretrained_log_prob)
        self.report = report
        self.ceiling = ceiling
        self.num_classes: tuple[int, ...] = (classifier.num_classes,)

    def forward(self, images: Tensor, context: Context) -> Tensor:
        """Return log min(p(y|x), ceiling) in nats, `[N]`; 0 where the label is NO_LABEL."""
        return of_label(self.classifier(images).clamp(max=math.log(self.ceiling)), context)

    def measure(self, images: Tensor) -> Tensor:
        """Return the true measure, JPEG size in kB, `[N]`."""
        return jpeg_kilobytes(images)

    def true_class(self, images: Tensor) -> Tensor:
        """Return the class by the true measure, never by the classifier, `[N]`."""
        return class_of(self.measure(images), self.edges.cpu())

    def draw_label(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the true class, `[N, 1]`: nothing is random about it."""
        return self.true_class(images)[:, None]

    def log_z(self, gamma: float) -> Tensor | None:
        """Return the Monte Carlo estimate of log E_ref[exp(gamma r)] for each class, `[K]`, nats.

        The expectation is over prompts too, so by Jensen it is no less than the mean of log Z(c), and
        still an upper bound of the objective averaged over prompts.
        """
        if self.pretrained_log_prob is None:
            return None
        count = len(self.pretrained_log_prob)
        log_prob = self.pretrained_log_prob.clamp(max=math.log(self.ceiling))
        return (gamma * log_prob).logsumexp(0) - math.log(count)

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file."""
        features = next(
            name for name, kind in FEATURES.items() if isinstance(self.classifier.features, kind)
        )
        config = {
            "num_classes": self.classifier.num_classes,
            "features": features,
            "report": vars(self.report),
            "ceiling": self.ceiling,
        }
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write it at once
        save_file(tensors, draft, metadata={"diffrl.classifier": json.dumps(config)})
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what `save` wrote.

        Raises:
            DiffRLError: no such file, or not a whole one of ours.
        """
        config, tensors = _read(path)
        classifier = Classifier(config["num_classes"], config["features"])
        report = config["report"] | {"class_counts": tuple(config["report"]["class_counts"])}
        reward = cls(
            classifier,
            tensors["edges"],
            FitReport(**report),
            tensors.get("pretrained_log_prob"),
            config.get("ceiling", 1.0),  # a file from before there was one
        )
        reward.load_state_dict(tensors)
        return reward


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise DiffRLError(f"{path}: no such classifier file. 'diffrl fit' writes one.")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["diffrl.classifier"])
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise DiffRLError(
            f"{path}: not a whole classifier file ({error}). Delete it and run 'diffrl fit' again."
        ) from error
