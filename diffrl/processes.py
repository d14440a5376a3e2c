"""The processes that share one run, through accelerate: which part is ours, and what all must know.

An update's pictures are numbered, and each process holds an interval of the numbers, in the order of the
ranks. Losses are divided by the number of all, gradients and metrics are summed: so the result is that of
one process alone, however many there are. One process goes through the same lines.
"""

import atexit
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

_LONGEST_WAIT = timedelta(hours=6)  # for the first one's evaluation

T = TypeVar("T")


def join(device: torch.device, *, tf32: bool) -> torch.device:
    """Meet the others that `accelerate launch` or torchrun started, and return our own device.

    A GPU is PyTorch's current one from here on. With `tf32` it rounds the factors of float32 products and
    convolutions to 10 bits: several times as fast, but two ways to the same picture come to differ by what
    is rounded, which many guided steps magnify.
    """
    begun = PartialState._shared_state != {}
    state = PartialState(cpu=device.type == "cpu", timeout=_LONGEST_WAIT)
    if state.num_processes > 1 and not begun:
        atexit.register(_leave)  # else its threads may end the process with an abort
    device = device if state.num_processes == 1 else state.device
    if device.type == "cuda":
        if device.index is not None:  # else it is the current one
            torch.cuda.set_device(device)  # of which clock and memory are asked
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    return device


@contextmanager
def together() -> Iterator[None]:
    """Let an error end us at once: taking leave waits for the others, who may be waiting for our part."""
    try:
        yield
    except Exception:
        atexit.unregister(_leave)
        raise


def _leave() -> None:
    PartialState().destroy_process_group()


def count() -> int:
    """Return how many share the run."""
    return PartialState().num_processes


def is_first() -> bool:
    """Return whether we are the one that writes, evaluates and reports."""
    return PartialState().is_main_process


def wait() -> None:
    """Return when all have come here."""
    PartialState().wait_for_everyone()


def led() -> AbstractContextManager[None]:
    """Return a context that the others enter when the first one has left it; all must come to it."""
    return PartialState().main_process_first()


def part(number: int) -> range:
    """Return which of `number` things, numbered from 0, are ours; the first ranks may have one more."""
    ours = torch.arange(number).tensor_split(count())[PartialState().process_index].tolist()
    return range(ours[0], ours[-1] + 1) if ours else range(0)


def place(number: int) -> slice:
    """Return which of all pictures are the `number` that we hold."""
    start = sum(gather_object([number])[: PartialState().process_index])
    return slice(start, start + number)


def among(samples: Tensor, ours: slice) -> Tensor:
    """Return the positions in `samples`, numbers of pictures, of those that are ours."""
    return ((samples >= ours.start) & (samples < ours.stop)).nonzero()[:, 0]


def gathered(values: Sequence[T]) -> list[T]:
    """Return the values of all, in the order of the ranks; each may have another number of them."""
    return gather_object(list(values))


def joined(values: Tensor, dim: int = 0) -> Tensor:
    """Return the tensors of all, one behind the other along `dim`, without a graph."""
    parts = gather_object([values.detach().cpu()])
    return torch.cat(parts, dim).to(values)


def summed(metrics: dict[str, float]) -> dict[str, float]:
    """Return the sum over all of each metric, where one that somebody lacks counts as 0."""
    total: dict[str, float] = {}
    for ours in gather_object([metrics]):
        for name, value in ours.items():
            total[name] = total.get(name, 0.0) + value
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by the sum over all; who has none counts as 0, and none stays none.

    Differs from DistributedDataParallel, whose hooks expect one forward pass of the wrapped module for each
    backward pass: here a chain of steps, the reference, and at times no step of ours at all lie between.
    """
    if count() == 1:
        return
    parameters = list(parameters)
    device = parameters[0].device
    known = reduce(torch.tensor([p.grad is not None for p in parameters], device=device).int(), "sum")
    for parameter, somewhere in zip(parameters, known.tolist(), strict=True):
        if somewhere:
            ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(ours, "sum")
