"""Step 1 of CTRL: fit p(y|x) to labelled pictures, calibrate it on the held-out part.

Shapes: M pictures `[M, 3, H, W]` in [0, 1] or uint8, K classes.
Source: CTRL, arXiv:2406.12120, algorithm 1 and appendix; temperature scaling, arXiv:1706.04599.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.errors import DiffRLError
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.log_likelihood import Attribute, FitReport
from diffrl.rewards.measures import MEASURES

HELD_OUT = 0.2  # CTRL: an 80/20 split
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 60, 64, 3e-3, 1.0  # chosen: held-out NLL on emoji


def fit_attribute(
    measure: str,
    images: Tensor,
    edges: Sequence[float] | None,
    num_classes: int,
    *,
    features: str,
    seed: int,
    from_pretrained: bool,
    networks: Mapping[str, str] | None = None,
) -> Attribute:
    """Label `images` by their true measure, fit and calibrate p(y|x), and return both.

    Args:
        measure: of `MEASURES`.
        images: `[M, 3, S, S]`, uint8 or float in [0, 1].
        edges: K - 1 of them, rising; None: such that the K classes hold equally many pictures.
        num_classes: K.
        features: see `Classifier`.
        seed: of the fit. The same seed holds out the same pictures, whatever the measure.
        from_pretrained: they were drawn from the pretrained policy, so log Z follows from them.
        networks: where those lie that the measure stands on, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    networks = networks or {}
    true = MEASURES[measure].bind(networks)
    values = torch.cat([true.of(as_float(part)) for part in images.split(256)])
    if edges is None:
        bounds = values.quantile(torch.arange(1, num_classes) / num_classes)
    else:
        bounds = torch.tensor(edges)
    label = true.class_of(values, bounds)
    counts = label.bincount(minlength=num_classes)
    if len(images) < 10 * num_classes or int(counts.min()) < 5:
        raise DiffRLError(
            f"{measure}: {len(images)} pictures with {counts.tolist()} a class are too few to fit "
            f"{num_classes} classes: give at least 5 of each class and 10 a class overall, or other edges."
        )
    classifier, report, held_out = fit_classifier(
        images, label, num_classes, features=features, generator=generator, clip=networks.get("clip")
    )
    with torch.no_grad():
        log_prob = torch.cat([classifier(as_float(images[i])) for i in held_out.split(128)])
    return Attribute(measure, classifier, bounds, report, log_prob if from_pretrained else None, networks)


def fit_classifier(
    images: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    features: str,
    generator: torch.Generator,
    clip: str | None = None,
) -> tuple[Classifier, FitReport, Tensor]:
    """Return the classifier, its report, and the indices of the held-out pictures.

    Args:
        images: uint8 or float, as drawn.
        label: `[M]`, the class by the true measure.
        features: see `Classifier`; fixed features are computed once, learned ones at every step.
        generator: of the split and the order of the batches.
        clip: of "clip" features, their model.
    """
    order = torch.randperm(len(images), generator=generator)
    held_out, train = order.split([round(HELD_OUT * len(order)), len(order) - round(HELD_OUT * len(order))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        classifier = Classifier(num_classes, features, clip=clip)
    with torch.no_grad():
        every = torch.cat([classifier.features(as_float(part)) for part in images.split(128)])
    learned = any(True for _ in classifier.features.parameters())
    classifier.standardise(every[train])

    def logits(index: Tensor) -> Tensor:
        inputs = classifier.features(as_float(images[index])) if learned else every[index]
        return classifier.logits(inputs)

    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * max(len(train) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for batch in shuffled.split(BATCH)[: max(len(train) // BATCH, 1)]:
            optimizer.zero_grad()
            F.cross_entropy(logits(batch), label[batch]).backward()
            optimizer.step()
            schedule.step()
    classifier.eval().requires_grad_(False)
    with torch.no_grad():
        held_logits = torch.cat([logits(batch) for batch in held_out.split(128)])
    truth = label[held_out]
    classifier.temperature.fill_(calibrate(held_logits, truth))
    log_prob = (held_logits / classifier.temperature).log_softmax(1)
    report = FitReport(
        num_train=len(train),
        num_held_out=len(held_out),
        accuracy=float((log_prob.argmax(1) == truth).float().mean()),
        nll_before=float(F.cross_entropy(held_logits, truth)),
        nll=float(F.nll_loss(log_prob, truth)),
        ece=expected_calibration_error(log_prob.exp(), truth),
        temperature=float(classifier.temperature),
        class_counts=tuple(label.bincount(minlength=num_classes).tolist()),
    )
    return classifier, report, held_out


def check_ceiling(ceiling: float, num_classes: int) -> None:
    """Raise DiffRLError unless a ceiling of p(y|x) lies above chance, and at 1 at most."""
    if not 1 / num_classes < ceiling <= 1:
        raise DiffRLError(
            f"reward.ceiling={ceiling}: must be at most 1, and more than chance, 1/{num_classes}."
        )


def as_float(images: Tensor) -> Tensor:
    """Return pictures in [0, 1] from uint8 or float ones."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


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
