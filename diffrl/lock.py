"""One process at a time writes to a run: a lock in its folder, free again however the process ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from diffrl import processes
from diffrl.errors import DiffRLError

LOCK_FILE = ".lock"
"""Its name in the folder; it stays there, and says nothing."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, whatever it is renamed to; of several processes that share a run, the first one does.

    Raises:
        DiffRLError: another process holds it.
    """
    if not processes.is_first():
        yield
        return
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DiffRLError(
            f"{folder}: another process trains it at this moment. Let it finish, or stop it first."
        ) from error
    try:
        yield
    finally:
        lock.release()
