"""The disk: what it refuses is told in one line, with the way to go on; what it holds can be made sure."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffrl.errors import DiffRLError

_REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR,
)  # fmt: skip


@contextmanager
def told(place: Path | None = None, advice: str = "") -> Iterator[None]:
    """Say of a disk that refuses here where it was, why, and what to do; other errors pass.

    Args:
        place: named where the error names none, as that of a file which is open does not.
        advice: a sentence.

    Raises:
        DiffRLError: no room, a read-only file system, no permission, a broken disk, no folder.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number(error)
        if number not in _REFUSALS:
            raise
        where = getattr(error, "filename", None) or place
        reason = f"{where}: {os.strerror(number)}." if where else f"{os.strerror(number)}."
        raise DiffRLError(f"{reason} {advice}".rstrip()) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a draft, which takes the place of `path` in the end; after an error it is deleted.

    Whoever reads `path` meanwhile reads what was there before: a file is whole at any time.
    """
    draft = path.with_name(f".{os.getpid()}.{path.name}")  # others may write it at once
    try:
        yield draft
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # it may be what fills the disk


def probe(folder: Path) -> None:
    """Raise OSError where nothing can be written in a folder, there already or not; nothing is left."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        # its own name instead of the drawn one; a folder that can hold no files, as /proc, says ENOENT
        number = errno.EACCES if error.errno == errno.ENOENT else error.errno
        raise OSError(number, os.strerror(number or 0), str(there)) from error


def sync(path: Path) -> None:
    """Make what a file holds, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(error: SafetensorError) -> int:
    """Return the number that safetensors, which is written in Rust, has in its message alone; 0: none."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0
