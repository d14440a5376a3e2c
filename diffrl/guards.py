"""Guards against reward hacking: which evaluation was best, when to stop, when to warn in words.

They look at what an evaluation measures beside the reward, on noise that no update has seen and, with
`eval_prompts`, on prompts of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffrl.errors import DiffRLError, unknown

_PICTURES = ("reward_mean", "prompt_fidelity", "clip_score", "diversity", "kl_nats", "brisque")
_LABELS = ("accuracy", "macro_f1", "mean_logp")
_EXACT = ("gap_nats", "gap_gaussian_nats", "tv", "log_prob", "kl_nats")
_SAMPLED = ("log_prob",)
_LOWER_IS_BETTER = {"kl_nats", "brisque", "gap_nats", "gap_gaussian_nats", "tv"}

# Chosen on the emoji model (benchmarks/results/emoji.json). Over the pretrained model's, prompt fidelity is
# .86 or more where training is sound (80 updates of CTRL .95, 280 of them .87, RWR .86), and .25 to .60
# where the reward was hacked. CLIPScore lies near 30 for the right word and near 20 for a wrong one.
_LEAST = {"prompt_fidelity": 0.75, "clip_score": 0.85, "diversity": 0.5}
"""A measure that is below this share of the pretrained model's has fallen."""

_WIDEST = {"edge_density": 2.0, "saturation": 2.0, "brightness": 2.0, "colour_entropy": 2.0}
"""An image statistic is suspect above this factor of the pretrained model's, or below one over it."""

# Chosen: after 280 updates of CTRL on the emoji model the claim is .72 and the truth .67 (gamma 300), or
# .77 and .75 (gamma 750), of 256 pictures; before them .24 and .24.
_CLAIM = 0.2
"""So much more than true may a classifier claim of its labels, beyond what it did at first."""

_BLIND = 0.5
"""Chosen: so many standard deviations of the true rewards may a surrogate claim above their mean."""

_SURE = 2.0  # standard errors by which the reward has to rise: of noise alone, one evaluation in forty


class Guards:
    """What a run remembers of its evaluations.

    Args:
        metric: name in `metrics.jsonl` of the one by which the best evaluation is known; None: no best.
        patience: evaluations in a row without a better one after which it is time to stop; None: never.
        restraint: what a user can do against reward hacking with this algorithm, in words.
    """

    def __init__(self, metric: str | None, patience: int | None, restraint: str) -> None:
        self.metric, self.patience, self.restraint = metric, patience, restraint
        self.best: float | None = None
        self.best_update = 0
        self.stale = 0  # evaluations since the best one
        self.reference: dict[str, float] = {}  # what the first evaluation measured: the pretrained model
        self.sounding: list[str] = []  # what is out of bounds, so that it is told of once

    def judge(self, update: int, measures: Mapping[str, Any], *, last: bool = False) -> tuple[str, bool]:
        """Remember an evaluation; return the warning that it deserves, or "", and whether that is new.

        Args:
            update: after which it was.
            measures: of it.
            last: of the weights that are kept, on more pictures: it is held against no other.

        Raises:
            DiffRLError: the metric of the best is not among the measures.
        """
        if not last:
            self._compare(update, measures)
        numbers = {name: value for name, value in measures.items() if isinstance(value, int | float)}
        if not self.reference:
            self.reference = numbers
        found = suspicions(self.reference, numbers)
        new = not found.keys() <= set(self.sounding)
        self.sounding = list(found)
        return (_words(self.reference, numbers, found, self.restraint) if found else ""), new

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.stale >= self.patience

    def keeps(self, update: int) -> bool:
        """Return whether the weights of this evaluation are the run's: the best's, or each one's."""
        return self.metric is None or self.best_update == update

    def said(self) -> str:
        """Return in words whose weights the run has, if not the last update's, and why it stopped."""
        if self.best is None:
            return ""
        why = f"no better for {self.patience} evaluations, ended; " if self.exhausted else ""
        return f"{why}weights of update {self.best_update}, {self.metric} {self.best:.4g}; "

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in JSON's types."""
        names = ("best", "best_update", "stale", "reference", "sounding")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        vars(self).update(state)

    def _compare(self, update: int, measures: Mapping[str, Any]) -> None:
        if self.metric is None:
            return
        value = measures.get(self.metric)
        if self.metric not in measures or isinstance(value, list):
            known = [name for name, found in measures.items() if not isinstance(found, list)]
            raise unknown("keep_best", self.metric, known)
        if value is None and self.best is not None:  # it had one before; see `evaluate_mixture`
            self.stale += 1
            return
        if not isinstance(value, int | float):
            raise DiffRLError(f"keep_best={self.metric}: {value or 'it has no value with these settings.'}")
        sign = -1 if self.metric.rpartition("/")[2] in _LOWER_IS_BETTER else 1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_update, self.stale = float(value), update, 0
        else:
            self.stale += 1


def check_metric(metric: str, *, pictures: bool, labels: bool, exact: bool) -> None:
    """Raise DiffRLError unless an evaluation has this metric and one value of it is better than another.

    Args:
        metric: as it is named in `metrics.jsonl`; an attribute of the label in it is not looked at.
        pictures: whether the model draws them, and not points.
        labels: whether the reward is log p(y|x).
        exact: whether the model is solved, where it draws points.
    """
    kind, names = ("eval", _PICTURES + _LABELS * labels) if pictures else ("sampled", _SAMPLED)
    if exact and not pictures:
        kind, names = "exact", _EXACT
    asked, _, name = metric.partition("/")
    if asked != kind or name.rpartition("/")[2] not in names:
        raise unknown("keep_best", metric, [f"{kind}/{name}" for name in names])


def suspicions(reference: Mapping[str, float], measures: Mapping[str, float]) -> dict[str, str]:
    """Return what is out of bounds although, or because, the reward rose: by name, in words.

    What the training reward claims beyond the truth is, whether or not the true reward rose.

    Args:
        reference: measures of the pretrained model, under the names of `metrics.jsonl`.
        measures: of the policy.
    """
    first, now = (
        {name.removeprefix("eval/"): value for name, value in found.items()}
        for found in (reference, measures)
    )
    if "reward_mean" not in now:
        return {}
    return _false_claims(first, now) | (_side_effects(first, now) if _rose(first, now) else {})


def _false_claims(first: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """Return where what is trained on, a classifier or a surrogate, says more than the true measure."""
    found = {}
    if "claimed_accuracy" in first and "claimed_accuracy" in now:
        before, after = (measured["claimed_accuracy"] - measured["accuracy"] for measured in (first, now))
        if after - max(before, 0) > _CLAIM:
            found["claimed_accuracy"] = (
                f"the classifier claims {now['claimed_accuracy']:.2f} of the labels and the true measure "
                f"finds {now['accuracy']:.2f}"
            )
    claimed, true = now.get("claimed_reward", -math.inf), now["reward_mean"]
    spread = max(first["reward_std"], now["reward_std"])
    if spread > 0 and claimed - true > _BLIND * spread:
        found["claimed_reward"] = f"the surrogate claims {claimed:.3g} and the true reward is {true:.3g}"
    return found


def _side_effects(first: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """Return what has fallen or changed although the reward says nothing of it."""
    found = {}
    for name, least in _LEAST.items():
        if name in first and name in now and now[name] < least * first[name]:
            found[name] = f"{_title(name)} fell from {first[name]:.3g} to {now[name]:.3g}"
    for name, widest in _WIDEST.items():
        if first.get(name, 0) > 0 and name in now:
            factor = now[name] / first[name]
            if not 1 / widest <= factor <= widest:
                found[name] = f"{_title(name)} is {factor:.2g} times the pretrained model's"
    return found


def _rose(first: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Return whether the mean reward is higher by more than its noise."""
    variance = sum(measured["reward_std"] ** 2 / measured["n"] for measured in (first, now))
    return now["reward_mean"] - first["reward_mean"] > _SURE * variance**0.5


def _words(
    reference: Mapping[str, float], measures: Mapping[str, float], found: Mapping[str, str], restraint: str
) -> str:
    name = "eval/reward_mean"
    rise = f"reward went from {reference[name]:.3g} to {measures[name]:.3g}"
    return f"{rise}, but {' and '.join(found.values())}: this looks like reward hacking. {restraint}"


def _title(name: str) -> str:
    return name.replace("_", " ").replace("clip score", "CLIPScore")
