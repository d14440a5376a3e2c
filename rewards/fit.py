"""Step 1 of CTRL: fit p(y|x) to labelled pictures, calibrate it on the held-out part.

Shapes: M pictures `[M, 3, S, S]` that can be read, F features, K classes.
Source: CTRL, arXiv:2406.12120, algorithm 1 and appendix; temperature scaling, arXiv:1706.04599.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl import datasets
from diffrl.datasets import Pictures
from diffrl.errors import DiffRLError
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.copies import altered
from diffrl.rewards.log_likelihood import Attribute, FitReport, score_of
from diffrl.rewards.measures import MEASURES, Measure

HELD_OUT = 0.2  # CTRL: an 80/20 split
EPOCHS, BATCH, LEARNING_RATE = 60, 64, 3e-3  # chosen: held-out NLL on emoji
FEWEST = 10  # pictures a class overall; a class of its own may have half
_DECAY = 35.0  # AdamW's weight decay times sqrt(pictures learnt from): best at 1,200 (1.0) and 26,000 (.2)


def fit_attribute(
    measure: str,
    images: Pictures,
    edges: Sequence[float] | None,
    num_classes: int,
    *,
    features: str,
    seed: int,
    from_pretrained: bool,
    networks: Mapping[str, str] | None = None,
    copies: int = 0,
    rehearsal: bool = False,
) -> Attribute:
    """Fit and calibrate p(y|x) on labelled pictures, and return it with the true measure.

    The pictures are streamed: once, or if the features learn, once more every epoch.

    Args:
        measure: of `MEASURES`.
        images: a data set, or a tensor `[M, 3, S, S]`. A picture's class is the label that the data set
            has for it, else its score's, else its true measure's.
        edges: K - 1 of them, rising; None: such that the K classes hold equally many pictures, or as many
            as have that label.
        num_classes: K.
        features: see `Classifier`.
        seed: of the fit. The same seed holds out the same pictures, whatever the measure.
        from_pretrained: they were drawn from the pretrained policy, so log Z follows from them.
        networks: where those lie that the measure stands on, by name.
        copies: altered ones of each picture that is learnt from, labelled by the true measure too; see
            `diffrl.rewards.copies`. The held-out pictures have none.
        rehearsal: the classes are dealt at random, equally many pictures to each, whatever these show; so
            any few tell what a fit costs, and what shape it gives.
    """
    generator = torch.Generator().manual_seed(seed)
    networks = networks or {}
    order = torch.randperm(len(images), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        classifier = Classifier(num_classes, features, clip=networks.get("clip"))
    true = MEASURES[measure].bind(networks)
    seen = _read(images, true, measure, classifier)
    label = seen.label
    bounds = _edges(true, seen, num_classes) if edges is None else torch.tensor(edges)
    if rehearsal:
        label = torch.randperm(len(seen.place), generator=generator) % num_classes
    elif label is None:
        label = true.class_of(seen.score, bounds)
    counts = label.bincount(minlength=num_classes)
    if len(label) < FEWEST * num_classes or int(counts.min()) < FEWEST // 2:
        raise DiffRLError(
            f"{measure}: {len(label)} pictures with {counts.tolist()} a class are too few to fit "
            f"{num_classes} classes: give at least {FEWEST // 2} of each class and {FEWEST} a class "
            "overall, or other edges."
        )
    if copies and seen.own:
        raise DiffRLError(
            f"reward.copies={copies}: the data set has its own {measure} for each picture, and none for "
            "altered ones; leave its labels and scores out, or take reward.copies=0."
        )
    held_out, train = _split(order, seen.place)
    if copies:
        more = _copies(classifier, images, seen.place[train], copies, true, bounds, generator)
        train = torch.cat([train, len(label) + torch.arange(len(more[1]))])
        seen.features, label = torch.cat([seen.features, more[0]]), torch.cat([label, more[1]])
    report, log_prob = _fit(classifier, images, seen, label, held_out, train, generator)
    if rehearsal:
        classifier.temperature.fill_(1)  # by what chance has dealt it may come to 0 or to infinity
    return Attribute(measure, classifier, bounds, report, log_prob if from_pretrained else None, networks)


@dataclass
class _Seen:
    """What stays in memory of the M pictures."""

    place: Tensor  # of each in the data set, [M]
    features: Tensor  # [M, F], then of the copies
    score: Tensor  # of the data set, or measured, [M]
    label: Tensor | None  # of the data set, [M]
    own: bool  # labels, or scores, are the data set's


def _read(images: Pictures, true: Measure, measure: str, classifier: Classifier) -> _Seen:
    place, features, scores, labels = [], [], [], []
    own = False
    with torch.no_grad():
        for batch in datasets.stream(images, torch.arange(len(images)), datasets.READ_BATCH):
            place.append(batch.index)
            features.append(classifier.features(batch.images))
            scores.append(score_of(measure, true, batch))
            labels += [batch.label[measure]] if measure in batch.label else []
            own |= measure in {*batch.label, *batch.score}
    label = torch.cat(labels) if labels else None
    return _Seen(torch.cat(place), torch.cat(features), torch.cat(scores), label, own)


def _split(order: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the M pictures are held out, and which are learnt from, in a random order.

    Args:
        order: of the data set, at random; the first that can be read are held out.
        place: of the M pictures in the data set.
    """
    order = _rows(place, len(order))[order]
    order = order[order >= 0]
    held_out, train = order.split([round(HELD_OUT * len(order)), len(order) - round(HELD_OUT * len(order))])
    return held_out, train


def _rows(place: Tensor, count: int) -> Tensor:
    """Return which of the M pictures each of `count` in the data set is, -1 for one that cannot be read."""
    row = torch.full((count,), -1)
    row[place] = torch.arange(len(place))
    return row


def _copies(
    classifier: Classifier,
    images: Pictures,
    place: Tensor,
    count: int,
    true: Measure,
    edges: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return features and true classes of `count` altered copies of each picture, `[N, F]` and `[N]`."""
    features, labels = [], []
    with torch.no_grad():
        for batch in datasets.stream(images, place.repeat(count), datasets.READ_BATCH):
            pictures = altered(batch.images, generator)
            features.append(classifier.features(pictures))
            labels.append(true.class_of(true.of(pictures), edges))
    return torch.cat(features), torch.cat(labels)


def _edges(true: Measure, seen: _Seen, num_classes: int) -> Tensor:
    """Return edges between which lie as many pictures as have each label, or equally many, `[K - 1]`."""
    shares = torch.arange(1, num_classes) / num_classes
    if seen.label is not None:
        counts = seen.label.bincount(minlength=num_classes)
        shares = (counts.flip(0) if true.falling else counts).cumsum(0)[:-1] / len(seen.label)
    return seen.score.quantile(shares)


def _fit(
    classifier: Classifier,
    images: Pictures,
    seen: _Seen,
    label: Tensor,
    held_out: Tensor,
    train: Tensor,
    generator: torch.Generator,
) -> tuple[FitReport, Tensor]:
    """Train and calibrate a classifier.

    Args:
        classifier: with fixed features, which have been computed, or learned ones, for which the pictures
            are read again at every step.
        images: as in `fit_attribute`.
        seen: of them.
        label: `[M]`, then of the copies.
        held_out: rows of `label`.
        train: rows of `label`, of copies too.
        generator: of the order of the batches.

    Returns:
        The report, and log p(y|x) on the held-out pictures, `[~M / 5, K]`.
    """
    row = _rows(seen.place, len(images))
    learned = any(parameter.requires_grad for parameter in classifier.features.parameters())
    classifier.standardise(seen.features[train])

    def logits(rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows, `size` at a time, and their logits."""
        if learned:
            for batch in datasets.stream(images, seen.place[rows], size):
                yield row[batch.index], classifier.logits(classifier.features(batch.images))
        else:
            for part in rows.split(size):
                yield part, classifier.logits(seen.features[part])

    descend(
        classifier,
        train,
        logits,
        lambda predicted, part: F.cross_entropy(predicted, label[part]),
        generator,
    )
    rows, parts = zip(*logits(held_out, 2 * BATCH), strict=True)
    held_logits, truth = torch.cat(parts), label[torch.cat(rows)]
    classifier.temperature.fill_(calibrate(held_logits, truth))
    log_prob = (held_logits / classifier.temperature).log_softmax(1)
    report = FitReport(
        num_train=len(seen.place) - len(held_out),
        num_held_out=len(held_out),
        accuracy=float((log_prob.argmax(1) == truth).float().mean()),
        nll_before=float(F.cross_entropy(held_logits, truth)),
        nll=float(F.nll_loss(log_prob, truth)),
        ece=expected_calibration_error(log_prob.exp(), truth),
        temperature=float(classifier.temperature),
        class_counts=tuple(label[: len(seen.place)].bincount(minlength=classifier.num_classes).tolist()),
        side=images.shape[-1],
    )
    return report, log_prob


def descend(
    network: Classifier,
    rows: Tensor,
    predict: Callable[[Tensor, int], Iterator[tuple[Tensor, Tensor]]],
    loss: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
) -> None:
    """Train `network` on `rows` of the data, and freeze it.

    Args:
        network: is trained in place.
        rows: numbers of what is learnt from, `[M]`.
        predict: yields of some rows so many at a time, and what the network says of them.
        loss: of what it says and the rows that it is about.
        generator: of the order.
    """
    decay = _DECAY / math.sqrt(len(rows))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=decay)
    num_batches = max(len(rows) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * num_batches)
    for _ in range(EPOCHS):
        shuffled = rows[torch.randperm(len(rows), generator=generator)][: num_batches * BATCH]
        for part, predicted in predict(shuffled, BATCH):
            optimizer.zero_grad()
            loss(predicted, part).backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)


def check_ceiling(ceiling: float, num_classes: int) -> None:
    """Raise DiffRLError unless a ceiling of p(y|x) lies above chance, and at 1 at most."""
    if not 1 / num_classes < ceiling <= 1:
        raise DiffRLError(
            f"reward.ceiling={ceiling}: must be at most 1, and more than chance, 1/{num_classes}."
        )


def calibrate(logits: Tensor, label: Tensor) -> float:
    """Return the temperature T that minimises the NLL of softmax(logits / T) on `label`, by LBFGS."""
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = logits.detach().double()
    optimizer = torch.optim.LBFGS([log_t], lr=0.5, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), label)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp())


def expected_calibration_error(probability: Tensor, label: Tensor, bins: int = 15) -> float:
    """Return sum over bins of (share of pictures) |accuracy - mean confidence|.

    Bins of equal width in the top probability. Source: arXiv:1706.04599, eq. 3.
    """
    confidence, predicted = probability.max(1)
    correct = (predicted == label).double()
    slot = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.scatter_add_(0, slot, correct - confidence.double())
    return float(gap.abs().sum() / len(label))
