"""The reward log p(y|x, c): a learned, calibrated classifier of each true measure that the label asks for.

Shapes: N pictures `[N, 3, H, W]` in [0, 1], A attributes, K classes of one, C = their product over the
attributes. Source: CTRL, arXiv:2406.12120, algorithm 1.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

from diffrl import disk
from diffrl.datasets import Batch
from diffrl.errors import DiffRLError
from diffrl.rewards.classifier import FEATURES, Classifier
from diffrl.rewards.measures import MEASURES, Measure
from diffrl.types import NO_LABEL, Context

LAYOUT = 2
"""Of the file that holds a reward; another one's is not read."""

_PROBE_TOLERANCE = 0.02  # of a measure on another machine; two CLIPs differ by far more


class ReplacedNetworksError(DiffRLError):
    """Other networks lie where those did that a classifier was fitted with."""


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
    side: int | None = None  # of the pictures, in pixels; None: not known


def of_label(log_prob: Tensor, label: Tensor) -> Tensor:
    """Return each row's entry of `log_prob` `[N, K]` for its `label` `[N]`; 0 where that is NO_LABEL."""
    own = log_prob.gather(1, label.clamp(min=0)[:, None])[:, 0]
    return torch.where(label == NO_LABEL, torch.zeros_like(own), own)


def score_of(name: str, measure: Measure, batch: Batch) -> Tensor:
    """Return the score that a data set has for each picture, or where it has none, measure it, `[B]`."""
    if name not in batch.score:
        return measure.of(batch.images)
    # CTRL's files hold its reward, minus the size
    return batch.score[name].abs() if measure.falling else batch.score[name]


class Attribute(nn.Module):
    """One number of a label: log p(y|x), and the true measure that it is about.

    Args:
        measure: of `MEASURES`.
        classifier: gives log p(y|x).
        edges: `[K - 1]`, rising: the classes of the true measure.
        report: of the fit.
        pretrained_log_prob: `[M, K]`, log p(y|x) on pictures of the pretrained policy that the
            classifier was not fitted to; from these comes log Z. None where the data were others.
        networks: where those lie that the measure stands on, by name. They are kept by their place, and
            by what they say of one picture.
    """

    edges: Tensor
    pretrained_log_prob: Tensor | None

    def __init__(
        self,
        measure: str,
        classifier: Classifier,
        edges: Tensor,
        report: FitReport,
        pretrained_log_prob: Tensor | None = None,
        networks: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.networks = measure, dict(networks or {})
        self.measure = MEASURES[measure].bind(self.networks)
        self.classifier = classifier.eval().requires_grad_(False)
        self.register_buffer("edges", edges)
        self.register_buffer("pretrained_log_prob", pretrained_log_prob)
        self.report = report

    def true_class(self, images: Tensor) -> Tensor:
        """Return the class by the true measure, never by the classifier, `[N]`, on the CPU."""
        return self.measure.class_of(self.measure.of(images).cpu(), self.edges.cpu())

    def class_of(self, batch: Batch) -> Tensor:
        """Return the class of each picture of a data set: its label, or by its score, or true, `[B]`."""
        if self.name in batch.label:
            return batch.label[self.name]
        return self.measure.class_of(score_of(self.name, self.measure, batch), self.edges.cpu())

    def facts(self) -> dict[str, Any]:
        """Return what is not a tensor."""
        features = next(name for name, kind in FEATURES.items() if type(self.classifier.features) is kind)
        facts = {
            "measure": self.name,
            "num_classes": self.classifier.num_classes,
            "features": features,
            "head": {"hidden": self.classifier.hidden, "spare": self.classifier.spare},
            "report": vars(self.report),
        }
        if self.networks:
            facts |= {"networks": self.networks, "probe": self.probe()}
        return facts

    @torch.no_grad()
    def probe(self) -> float:
        """Return the true measure of one picture, always the same: it tells networks apart."""
        ramp = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        return float(self.measure.of(ramp))


class LogLikelihood(nn.Module):
    """r(x, c, y) = log p(y|x), from the log-softmax; the strength gamma belongs to the algorithm.

    Of several attributes, independent given x: the sum of theirs. Differs from CTRL's code, log(p + 1e-6),
    whose gradient vanishes where it is needed most, and which counts compressibility twice.

    Args:
        attributes: in the label's order.
        ceiling: c in (0, 1]. The reward of each is log min(p(y|x), c): past what the classifier can tell,
            it asks for nothing more, and the KL alone moves the picture.
        joint: the label is one number, of the combination of classes; the last attribute counts fastest.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self, attributes: Sequence[Attribute], ceiling: float = 1.0, *, joint: bool = False
    ) -> None:
        super().__init__()
        self.attributes: Sequence[Attribute] = nn.ModuleList(attributes)  # type: ignore[assignment]
        self.ceiling, self.joint = ceiling, joint

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Of each attribute of the label; of a joint one, their product."""
        counts = self._counts
        return (math.prod(counts),) if self.joint else counts

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(attribute.classifier.num_classes for attribute in self.attributes)

    def split(self, label: Tensor) -> Tensor:
        """Return the class of each attribute, `[N, A]`, of labels `[N, A]` or joint ones `[N, 1]`."""
        if not self.joint:
            return label
        classes = torch.stack(torch.unravel_index(label[:, 0].clamp(min=0), self._counts), 1)
        return torch.where(label == NO_LABEL, label, classes)

    def forward(self, images: Tensor, context: Context) -> Tensor:
        """Return sum_a log min(p(y_a|x), ceiling) in nats, `[N]`; 0 for those that are NO_LABEL."""
        return self._own(images, context, self._capped)

    def log_prob(self, images: Tensor, context: Context) -> Tensor:
        """Return sum_a log p(y_a|x) in nats, `[N]`, without the ceiling."""
        return self._own(images, context, lambda log_prob: log_prob)

    def _own(self, images: Tensor, context: Context, seen: Callable[[Tensor], Tensor]) -> Tensor:
        own = [
            of_label(seen(attribute.classifier(images)), label)
            for attribute, label in zip(self.attributes, self.split(context.label).unbind(1), strict=True)
        ]
        return torch.stack(own).sum(0)

    def true_class(self, images: Tensor) -> Tensor:
        """Return the label by the true measures, never by a classifier, `[N, A]`, or `[N, 1]` if joint."""
        return self._together([attribute.true_class(images) for attribute in self.attributes])

    def draw_label(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the true classes, `[N, A]`: nothing is random about them."""
        return self.true_class(images)

    def label_of(self, batch: Batch) -> Tensor:
        """Return the label of each picture of a data set, `[B, A]` or `[B, 1]`: see `Attribute`."""
        return self._together([attribute.class_of(batch) for attribute in self.attributes])

    def _together(self, columns: Sequence[Tensor]) -> Tensor:
        """Return the labels of which `split` gives these classes."""
        classes = torch.stack(list(columns), 1)
        if not self.joint:
            return classes
        strides = [math.prod(self._counts[place + 1 :]) for place in range(len(self._counts))]
        return (classes * torch.tensor(strides)).sum(1, keepdim=True)

    def log_z(self, gamma: float) -> Tensor | None:
        """Return the Monte Carlo estimate of log E_ref[exp(gamma r)] for each label, `[C]`, nats.

        In the order of `every_label`. log Z itself is over prompts too: by Jensen it is no less than the
        mean of log Z(c), and still an upper bound of the objective averaged over prompts. The estimate is
        on average below it, by Jensen again, and far below where few pictures have all the weight
        (`log_z_ess`). Z is of the model, steps and prompts that drew the pictures the classifier was held
        against: no bound of others' objective.
        """
        weight = self._log_weights(gamma)
        return None if weight is None else weight.logsumexp(0) - math.log(len(weight))

    def log_z_ess(self, gamma: float) -> Tensor | None:
        """Return for how many pictures `log_z` stands, its effective sample size (sum w)^2 / sum w^2."""
        weight = self._log_weights(gamma)
        return None if weight is None else (2 * weight.logsumexp(0) - (2 * weight).logsumexp(0)).exp()

    def _log_weights(self, gamma: float) -> Tensor | None:
        """Return gamma r of each held-out picture under each label, `[M, C]`; None if none were kept."""
        total = torch.zeros(1, 1, device=self.attributes[0].edges.device)
        for attribute in self.attributes:
            if attribute.pretrained_log_prob is None:
                return None
            own = self._capped(attribute.pretrained_log_prob)
            total = (total[:, :, None] + own[:, None, :]).flatten(1)
        return gamma * total

    def _capped(self, log_prob: Tensor) -> Tensor:
        return log_prob.clamp(max=math.log(self.ceiling))

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file."""
        attributes = [attribute.facts() for attribute in self.attributes]
        config = {
            "layout": LAYOUT,
            "ceiling": self.ceiling,
            "joint": self.joint,
            "attributes": attributes,
        }
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        with disk.replacing(path) as draft:
            save_file(tensors, draft, metadata={"diffrl.classifier": json.dumps(config)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what `save` wrote.

        Raises:
            DiffRLError: no such file, or not a whole one of ours.
            ReplacedNetworksError: networks that are not those of the fit.
        """
        config, tensors = _read(path)
        attributes = []
        for number, facts in enumerate(config["attributes"]):
            networks = facts.get("networks", {})
            classifier = Classifier(
                facts["num_classes"], facts["features"], **facts.get("head", {}), clip=networks.get("clip")
            )
            report = facts["report"] | {"class_counts": tuple(facts["report"]["class_counts"])}
            edges = tensors[f"attributes.{number}.edges"]
            known = tensors.get(f"attributes.{number}.pretrained_log_prob")
            attribute = Attribute(facts["measure"], classifier, edges, FitReport(**report), known, networks)
            if networks and abs(attribute.probe() - facts["probe"]) > _PROBE_TOLERANCE:
                raise ReplacedNetworksError(
                    f"{path}: was fitted with other networks than lie at {' and '.join(networks.values())} "
                    "now. Put those back, or run 'diffrl fit' again."
                )
            attributes.append(attribute)
        reward = cls(attributes, config["ceiling"], joint=config.get("joint", False))
        reward.load_state_dict(tensors)
        return reward


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise DiffRLError(f"{path}: no such classifier file. 'diffrl fit' writes one.")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["diffrl.classifier"])
            if config.get("layout") != LAYOUT:
                raise ValueError(f"of layout {config.get('layout', 1)}, this version reads {LAYOUT}")
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise DiffRLError(
            f"{path}: not a whole classifier file ({error}). Delete it and run 'diffrl fit' again."
        ) from error
