"""Running out of memory: told in one line, with the smaller number that goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import torch

from diffrl.errors import DiffRLError

# PyTorch has a class for it where its own allocator on a GPU has no more, and none for the CPU's allocator,
# the driver, as where other processes fill the device, and cuBLAS and cuDNN, which want memory of their own
_SAID = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def is_exhausted(error: BaseException) -> bool:
    """Return whether `error` is that of a device, or of the machine, without memory left."""
    of_a_kind = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return of_a_kind or any(words in str(error) for words in _SAID)


@contextmanager
def told(
    setting: str, value: int, folder: Path | None = None, *, of: int = 0, group: int = 1
) -> Iterator[None]:
    """Say of memory that runs out here how to go on with less.

    Args:
        setting: how many pictures are held at a time; the memory grows with it.
        value: its own.
        folder: of the run, which goes on from its last checkpoint; None where there is none yet.
        of: what it must divide.
        group: what must divide it.

    Raises:
        DiffRLError: memory has run out.
    """
    fewer = [size for size in range(group, value // 2 + 1, group) if of % size == 0]
    if not fewer:
        least = "One picture" if group == 1 else f"A group of {group} pictures"
        fix = (
            f"{least} at a time is the least. What else takes less, in a run of another name=: "
            "env.precision=bf16, fewer layers in policy.targets, and for a chain of steps, as of ctrl and "
            "reward_backprop, env.checkpointing=true."
        )
    else:
        fix = f"Take fewer at a time: {setting}={fewer[-1]}"
        if folder is not None:
            go_on = f"diffrl train --resume {quote(str(folder))}"
            fix = f"Go on with fewer at a time: {go_on} {setting}={fewer[-1]}"
    with advised(f"{setting}={value}", fix):
        yield


@contextmanager
def advised(word: str, fix: str) -> Iterator[None]:
    """Say of memory that runs out here which setting it is about, and what to do.

    Raises:
        DiffRLError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        first = [f"{line.rstrip('.')}." for line in str(error).splitlines()[:1]]
        raise DiffRLError(" ".join([f"{word}: out of memory.", *first, fix])) from error
