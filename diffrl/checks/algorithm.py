"""What an algorithm must be, seen in two updates of the solvable model."""

import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffrl import config as settings
from diffrl.algorithms.base import Algorithm
from diffrl.build import Setup
from diffrl.checks import instance, raise_faults
from diffrl.errors import DiffRLError
from diffrl.rewards.closed_form import Softmax
from diffrl.run import Run
from diffrl.types import Context

_STEPS = 8  # T
_UPDATES = 4
_IMPOSSIBLE: dict[str, Any] = {"updates": -1, "batch_size": 0, "learning_rate": -1.0, "decay": "none such"}


def check_algorithm(algorithm: Any) -> None:
    """Raise DiffRLError with a line for every fault of an algorithm.

    It takes two updates of the solvable model with its own settings, three times. Looked at: an update
    moves trainable weights, no other, and not the null label's row; it leaves no gradient behind; its
    metrics are finite floats whose keys have a namespace; the same seed gives the same numbers; stopped
    after one update and resumed it gives them too; impossible settings are refused; and it needs what it
    says that it needs.

    Args:
        algorithm: an algorithm, or its class.
    """
    algorithm = instance("algo", algorithm)
    name = type(algorithm).__name__
    if not isinstance(algorithm, Algorithm):
        raise DiffRLError(f"{name}: no algorithm. Derive it from diffrl.algorithms.base.Algorithm.")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        raise_faults(name, _faults(algorithm, Path(folder)))


@dataclass
class _Score:
    """The solvable model's reward, with its gradient or without; by its type nothing need be solved."""

    differentiable: bool

    num_classes: ClassVar[tuple[int, ...]] = (2,)
    num_dims: ClassVar[int] = 1

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        return Softmax()(images if self.differentiable else images.detach(), context)

    def draw_label(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return Softmax().draw_label(images, generator)


def _faults(algorithm: Algorithm, folder: Path) -> Iterator[str]:
    yield from _settings(algorithm)
    try:
        run = _start(algorithm, folder)
        before = _weights(run)
        metrics = run.train_once()
    except Exception as error:
        box = "" if algorithm.needs_gradient else " on a black box, which needs_gradient=False promises"
        yield f"its first update fails{box}: {type(error).__name__}: {error}"
        return
    yield from _metrics(metrics)
    yield from _moved(run, before)
    if left := [name for name, p in run.policy.named_parameters() if p.grad is not None]:
        yield (
            f"a gradient is left in {left[0]} after the update, and would count in the next. Step by "
            "self.step(policy, optimizer), or call optimizer.zero_grad()."
        )
    twin = _start(algorithm, folder)
    if _differ(metrics, twin.train_once()) or not _equal(run, twin):
        yield (
            "the same seed gives other numbers. In collect() draw from its generator, in update() from "
            "PyTorch's global one, and keep nothing on the class."
        )
        return
    yield from _resumed(algorithm, run, folder)


def _settings(algorithm: Algorithm) -> Iterator[str]:
    for name, value in _IMPOSSIBLE.items():
        try:
            replace(algorithm, **{name: value})
        except DiffRLError:
            continue
        yield f"algo.{name}={value} is taken. Call super().__post_init__() in its own __post_init__."
        return


def _start(algorithm: Algorithm, folder: Path) -> Run:
    """Return a run of the solvable model before its first update; every part of it is new."""
    config = settings.load(["env=gaussian_mixture", f"env.num_steps={_STEPS}"])
    config.algo = replace(algorithm, updates=_UPDATES)
    config.reward = _Score(algorithm.needs_gradient)
    setup = Setup(config)
    return Run(setup, setup.make_policy(setup.num_classes()), config.reward, folder)


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}


def _metrics(metrics: dict[str, float]) -> Iterator[str]:
    for key, value in metrics.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            yield f"metric {key!r} is {value!r}. Return finite numbers, by float()."
        if not re.fullmatch(r"[a-z_]+(/\w+)+", key):
            yield f"metric {key!r} has no namespace. Call it rollout/..., train/... or time/..."
    if "train/skipped_steps" in metrics:
        yield "the gradient of its first update is not finite. Look for a division, root or logarithm at 0."


def _moved(run: Run, before: dict[str, Tensor]) -> Iterator[str]:
    after = _weights(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {id(parameter) for parameter in run.parameters}
    allowed = {name for name, p in run.policy.named_parameters(remove_duplicate=False) if id(p) in trained}
    if stray := sorted(moved - allowed):
        yield (
            f"an update moves {stray[0]}, which is frozen. Give the optimizer policy.lora_parameters() and "
            "policy.embedding_parameters() alone, as make_optimizer() does."
        )
    if not moved & allowed and run.config.algo.fewest_updates:
        yield "an update moves nothing. Call backward() on its loss, and then self.step(policy, optimizer)."
    for name in sorted(moved & allowed):
        if "label_embedding" in name and not torch.equal(before[name][-1], after[name][-1]):
            yield (
                f"an update moves the null label's row of {name}, which stands for no control. Train by "
                "gradients alone, with AdamW of make_optimizer(): that row has none."
            )
            break


def _differ(one: dict[str, float], other: dict[str, float]) -> bool:
    """Return whether metrics differ, seconds aside."""
    kept = [{key: value for key, value in m.items() if "seconds" not in key} for m in (one, other)]
    return kept[0] != kept[1]


def _equal(one: Run, other: Run) -> bool:
    ours, theirs = _weights(one), _weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def _resumed(algorithm: Algorithm, run: Run, folder: Path) -> Iterator[str]:
    """Stop after the first update, resume, and hold the second against the run that was not stopped."""
    try:
        run.save(folder)
        metrics = run.train_once()
        resumed = _start(algorithm, folder)
        resumed.load(folder)
        again = resumed.train_once()
    except Exception as error:
        yield (
            f"it cannot be resumed: {type(error).__name__}: {error}. state_dict() returns what JSON can "
            "hold, and load_state_dict() takes it."
        )
        return
    if _differ(metrics, again) or not _equal(run, resumed):
        yield (
            "stopped and resumed it gives other numbers. Return from state_dict() whatever it has learnt "
            "beside the weights, and take it up in load_state_dict()."
        )
