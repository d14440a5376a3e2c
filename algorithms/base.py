"""What every algorithm is: settings, a way to collect episodes, a way to learn from them.

Shapes: N envs, T steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from diffrl import processes
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.types import Trajectory

SKIPPED = "train/skipped_steps"  # the metric: so many of an update's steps had no finite gradient


@dataclass
class Algorithm(ABC):
    """A dataclass whose fields are its settings: constructing it is configuring it."""

    updates: int = 280  # rounds of collecting and learning
    batch_size: int = 16  # pictures an update
    micro_batch_size: int = 16  # pictures at a time; gradients of a batch's micro-batches add up
    learning_rate: float = 3e-4  # of the LoRA weights
    embedding_learning_rate: float = 5e-2  # of the label embedding
    weight_decay: float = 1e-4  # AdamW's
    beta2: float = 0.999  # AdamW's memory of squared gradients; less of it forgets a steep beginning sooner
    max_grad_norm: float = 5.0  # of LoRA and embedding jointly
    decay: str = "linear"  # of both learning rates, to 0 after `updates`: linear or constant
    warmup: int = 0  # updates over which both rise first, linearly: AdamW's first steps are its least known
    average: float = 0.0  # the last share of the updates whose weights' mean is the result; 0: the last's

    group_size = 1  # pictures in a row that share prompt and label; a setting where it is of use
    fewest_updates: ClassVar[int] = 1
    needs_gradient: ClassVar[bool]
    needs_labels: ClassVar[bool] = False  # a true one of each picture
    needs_noise: ClassVar[bool]  # eta > 0: a log-probability or a KL is asked for
    restraint: ClassVar[str] = "Lower algo.learning_rate, or train for fewer updates."  # if it is hacked

    def __post_init__(self) -> None:
        least = {"updates": self.fewest_updates, "batch_size": 1, "micro_batch_size": 1}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be {fewest} or more.")
        if self.batch_size % self.micro_batch_size:
            raise DiffRLError(
                f"algo.batch_size={self.batch_size}: algo.micro_batch_size={self.micro_batch_size} does "
                "not divide it; make one a multiple of the other."
            )
        for name in ("learning_rate", "embedding_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise DiffRLError(f"algo.{name}={getattr(self, name)}: must be positive.")
        if not 0 < self.beta2 < 1:
            raise DiffRLError(f"algo.beta2={self.beta2}: must be between 0 and 1, and neither.")
        check_choice("algo.decay", self.decay, ("linear", "constant"))
        if self.warmup < 0:
            raise DiffRLError(f"algo.warmup={self.warmup}: must be 0 or more.")
        if not 0 <= self.average <= 1:
            raise DiffRLError(f"algo.average={self.average}: must be between 0 and 1.")

    def target_gamma(self, num_dims: int) -> float | None:
        """Return gamma of the law p_ref p(y|x, c)^gamma / Z that this objective leads to.

        None: it leads to no such law. A latent has `num_dims` numbers.
        """
        return None

    @abstractmethod
    def collect(self, env: DenoisingVectorEnv, policy: Policy, generator: torch.Generator) -> Trajectory:
        """Return one micro-batch of episodes."""

    @abstractmethod
    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Take one optimiser step and return its metrics.

        `trajectories` is lazy: each micro-batch is collected when it is asked for, so that an algorithm
        that back-propagates through it holds one graph at a time. They are this process's part of the
        update's pictures; metrics are about all of them. What is drawn here is drawn from the global
        generator, which every process has in the same state: it is about all pictures too.
        """

    def make_optimizer(self, policy: Policy) -> Optimizer:
        """Return AdamW over the trainable parameters, LoRA and embedding each at its own rate."""
        groups = [
            {"params": policy.lora_parameters(), "lr": self.learning_rate},
            {"params": policy.embedding_parameters(), "lr": self.embedding_learning_rate},
        ]
        return AdamW(groups, betas=(0.9, self.beta2), weight_decay=self.weight_decay)

    def rate(self, update: int) -> float:
        """Return the factor on both learning rates at an update, counted from 0."""
        rising = min((update + 1) / (self.warmup + 1), 1.0)
        return rising * (1.0 if self.decay == "constant" else 1 - update / max(self.updates, 1))

    def averaged(self, update: int) -> bool:
        """Return whether the weights after an update, counted from 0, belong to the mean."""
        return update >= (1 - self.average) * self.updates

    def state_dict(self) -> dict[str, Any]:
        """Return what has been learnt beside the weights and decides later updates, in JSON's types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        assert not state

    def step(self, policy: Policy, optimizer: Optimizer) -> dict[str, float]:
        """Sum the processes' gradients, clip, step, and return the norms before clipping.

        A gradient that is not finite is dropped: no step is taken, and `train/skipped_steps` says so.
        """
        lora, embedding = policy.lora_parameters(), policy.embedding_parameters()
        processes.sum_gradients([*lora, *embedding])
        norms = {
            "train/grad_norm_lora": nn.utils.get_total_norm([p.grad for p in lora if p.grad is not None]),
            "train/grad_norm_embedding": nn.utils.get_total_norm(
                [p.grad for p in embedding if p.grad is not None]
            ),
        }
        found = {name: float(norm) for name, norm in norms.items()}
        if not all(math.isfinite(norm) for norm in found.values()):
            optimizer.zero_grad()
            return {SKIPPED: 1.0}
        nn.utils.clip_grad_norm_([*lora, *embedding], self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return found


def resized(algo: Any, size: int, **others: int) -> Any:
    """Return an algorithm whose update is one micro-batch of `size` pictures, learnt from in one piece.

    Args:
        algo: is left as it is.
        size: pictures.
        others: settings to change besides; an algorithm that has no such setting goes without.
    """
    one = {"batch_size": size, "micro_batch_size": size, "group_size": 1, "minibatches": 1}
    known = {field.name for field in fields(algo)}
    return replace(algo, **{name: value for name, value in (one | others).items() if name in known})


def anneal(optimizer: Optimizer, share: float) -> None:
    """Set the learning rates to where they are after a share of an update, on a line to the next one's.

    For an update of many steps: in one alone, a data set's, they would never fall.
    """
    for group in optimizer.param_groups:
        if "rates" in group:  # this update's and the next one's, of `Run`
            this, following = group["rates"]
            group["lr"] = this + share * (following - this)


def over_steps(seen: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return what `Algorithm.step` says of an update's steps: the last norms, and how many were skipped."""
    merged: dict[str, float] = {}
    for step in seen:
        skipped = merged.get(SKIPPED, 0.0) + step.get(SKIPPED, 0.0)
        merged |= step | ({SKIPPED: skipped} if skipped else {})
    return merged


def batches(items: Tensor, size: int) -> Iterator[Tensor]:
    """Yield `items` in batches of at most `size`; none if there are none."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def dealt(items: Tensor, number: int) -> list[Tensor]:
    """Return `items` dealt at random into `number` minibatches, each with one of every `number` neighbours.

    So the interval of them that a process holds is shared out evenly as well: in each minibatch every
    process has as much to do as the others, and what is drawn does not depend on how many they are.
    """
    rounds = -(-len(items) // number)
    hands = torch.rand(rounds, number).argsort(1) + number * torch.arange(rounds)[:, None]
    return [items[hand[hand < len(items)]] for hand in hands.unbind(1)]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise DiffRLError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise DiffRLError(f"{name}={value}: must be one of {', '.join(allowed)}.")
