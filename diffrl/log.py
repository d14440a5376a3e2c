"""Where a run's numbers and pictures go: `metrics.jsonl`, TensorBoard, the terminal."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from typing_extensions import Self

from diffrl import processes
from diffrl.types import to_pixels

METRICS_FILE = "metrics.jsonl"
console = Console(highlight=False)

_WIDEST = 1000  # characters


def print_wide(table: Table) -> None:
    """Print a table whole, however narrow the terminal: its lines may wrap, its cells are not cut."""
    whole = Console(width=_WIDEST).measure(table).maximum
    Console(width=max(console.width, whole)).print(table)


def evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what a run's evaluations measured so far, with what had been spent on training by then."""
    path = folder / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            metrics = json.loads(line)
        except ValueError:  # cut off: the run was killed as it wrote it, or is writing it now
            return
        if any(name.startswith(("eval/", "exact/", "sampled/")) for name in metrics):
            yield metrics


class RunLog:
    """Writes one line of JSON an update, the same numbers as TensorBoard events, and pictures.

    Args:
        folder: of the run.
        size: bytes of `metrics.jsonl` that stay; what a resumed run had written after its checkpoint goes.
        update: of that checkpoint.
    """

    def __init__(self, folder: Path, size: int = 0, update: int = 0) -> None:
        self.folder, self._writes = folder, processes.is_first()
        if not self._writes:  # of several processes, one does
            return
        self._metrics = (folder / METRICS_FILE).open("a+b")
        if (found := self.size()) < size:
            self._metrics.seek(0)
            size = self._metrics.read().rfind(b"\n") + 1  # its whole lines
            name = self._metrics.name
            console.print(f"[bold yellow]{name}[/]: {found} bytes, it was cut; its end is lost.")
        self._metrics.truncate(size)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1 if size else None)

    def __enter__(self) -> Self:
        self._hook, threading.excepthook = threading.excepthook, self._hear
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._writes:
                self._metrics.close()
                self._events.close()
        finally:
            threading.excepthook = self._hook

    def _hear(self, died: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread, and raises in ours, at its next write, what went wrong there
        if not isinstance(died.exc_value, OSError):
            self._hook(died)

    def write(self, update: int, metrics: dict[str, Any]) -> None:
        """Record the metrics after an update; lists go to `metrics.jsonl` only."""
        if not self._writes:
            return
        self._metrics.write((json.dumps({"update": update} | metrics) + "\n").encode())
        self._metrics.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, update)

    def size(self) -> int:
        """Return how many bytes `metrics.jsonl` has, all of which survive a loss of power."""
        if not self._writes:
            return 0
        os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def picture(self, update: int, name: str, picture: Image.Image) -> Path:
        """Save a picture as `pictures/<name>-<update>.png` and as a TensorBoard image."""
        path = self.folder / "pictures" / f"{name}-{update:04d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        self._events.add_image(name, np.asarray(picture), update, dataformats="HWC")
        return path


@contextmanager
def progress(description: str, total: int) -> Iterator["Bar"]:
    """Show a bar with the last metrics and the time left; plain lines where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield Bar(bars, description, total)


class Bar:
    """One line of progress."""

    def __init__(self, bars: Progress, description: str, total: int) -> None:
        self._bars, self._description, self._total = bars, description, total
        self._task = bars.add_task(description, total=total, note="")
        self._done = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move on by `count` and show `note`."""
        before, self._done = self._done, min(self._done + count, self._total)
        self._bars.update(self._task, completed=self._done, note=note)
        tenth = max(self._total // 10, 1)
        if not console.is_terminal and (self._done // tenth > before // tenth):
            console.print(f"{self._description} {self._done}/{self._total} {note}".rstrip())


def grid(rows: Sequence[Tensor], names: Sequence[str], columns: Sequence[str] = ()) -> Image.Image:
    """Return pictures as a grid with a name beside each row and a word above each column.

    Args:
        rows: of `[M, 3, S, S]` in [0, 1], the same M each.
        names: one a row.
        columns: one a column, or none.
    """
    side = rows[0].shape[-1]
    zoom = max(1, 128 // side)
    cell, gap = side * zoom, 4
    font = ImageFont.load_default(size=15)
    left = 12 + max(int(font.getlength(line)) for name in names for line in name.split("\n"))
    top = 24 if columns else gap
    size = (left + len(rows[0]) * (cell + gap), top + len(rows) * (cell + gap))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, word in enumerate(columns):
        pen.text((left + column * (cell + gap) + cell / 2, 4), word, "black", font, anchor="ma")
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + number * (cell + gap)
        pen.multiline_text((6, y + cell / 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(to_pixels(row)):
            tile = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (cell + gap), y))
    return canvas
