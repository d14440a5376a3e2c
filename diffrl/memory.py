"""Running out of memory: told in one line, with the smaller number that goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import torch

from diffrl.errors import DiffRLError


def is_exhausted(error: BaseException) -> bool:
    """Return whether `error` is that of a device, or of the machine, without memory left."""
    # on a CPU PyTorch has no class for it
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def told(setting: str, value: int, folder: Path | None = None, *, of: int = 0) -> Iterator[None]:
    """Say of memory that runs out here how to go on with less.

    Args:
        setting: how many pictures are held at a time; the memory grows with it.
        value: its own.
        folder: of the run, which goes on from its last checkpoint; None where there is none yet.
        of: what it must divide.

    Raises:
        DiffRLError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        reason = " ".join([f"{setting}={value}: out of memory.", *str(error).splitlines()[:1]])
        if value == 1:
            fix = (
                "One picture at a time is the least; use env.precision=bf16, or for a chain of steps, as "
                "of ctrl and reward_backprop, env.checkpointing=true."
            )
        else:
            less = max(size for size in range(1, value // 2 + 1) if of % size == 0)
            fix = f"Take fewer at a time: {setting}={less}"
            if folder is not None:
                go_on = f"diffrl train --resume {quote(str(folder))}"
                fix = f"Go on with fewer at a time: {go_on} {setting}={less}"
        raise DiffRLError(f"{reason} {fix}") from error
