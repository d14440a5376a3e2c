"""Offline data sets: pictures with, where their files tell them, prompts, labels and scores.

A data set is a folder, of one of three kinds:
- with `metadata.csv` or `metadata.jsonl`: a row a picture. Columns, by name: `file_name` (or `img_path`),
  `text` (`caption`, `prompt`), `label`, `score`; all but the first may be missing.
- with `AVA.txt` and a folder `images`: AVA's own list. Its votes are no score of a measure: what CTRL calls
  aesthetic is LAION's score, by which AVA's pictures are labelled as any others are.
- of pictures alone.

A picture's class is its `label`; else its score's, between the reward's edges; else its true measure's. A
column `aes_score` is about the measure whose name begins with `aes`, and `score` about the reward's, if it
has one alone, in the unit of the reward's edges. Where there is a label or a score, every row must have it.

Shapes: M pictures of side S in a data set, B of them in a batch.
Sources of the columns: AVA, Murray, Marchesotti and Perronnin, CVPR 2012; Hugging Face's image folders; the
files of CTRL, arXiv:2406.12120.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffrl.errors import DiffRLError
from diffrl.rows import PROMPT, Row, read_rows

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_AVA_PICTURES = ("images", "image")
READ_BATCH = 32  # pictures in memory at a time while a classifier is fitted
_DRAW_BATCH = 16  # smaller, so that workers share what little is drawn at once


@dataclass(frozen=True)
class Example:
    """One picture of a data set."""

    image: Tensor | None  # [3, S, S], uint8; None: the file cannot be read
    prompt: str | None = None
    label: Mapping[str, int] = field(default_factory=dict)  # the class, by measure; empty: not told
    score: Mapping[str, float] = field(default_factory=dict)  # likewise


@dataclass(frozen=True)
class Batch:
    """B pictures of a data set: pairs (x, y) and triplets (x, c, y) alike."""

    index: Tensor  # where they stand in the data set, [B]
    images: Tensor  # [B, 3, S, S] in [0, 1]
    prompts: list[str | None]
    label: dict[str, Tensor]  # [B], int64, by measure; those that are not told are missing
    score: dict[str, Tensor]  # [B], likewise


class Pictures(Protocol):
    """What can be streamed: a `PictureFiles`, or a tensor `[M, 3, S, S]`, uint8 or float in [0, 1]."""

    @property
    def shape(self) -> Sequence[int]:
        """(M, 3, S, S)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example | Tensor: ...


@dataclass(frozen=True)
class Entry:
    """Where a picture lies, and what its data set tells of it."""

    path: str
    prompt: str | None
    label: dict[str, int]
    score: dict[str, float]


class PictureFiles(Dataset[Example]):
    """Pictures in files, each read when it is asked for.

    Args:
        entries: M of them.
        side: S; pictures are resized to it, whatever their shape, as CTRL does.
        workers: processes that read; 0: this one.
    """

    def __init__(self, entries: Sequence[Entry], side: int, workers: int = 0) -> None:
        self.entries, self.side, self.workers = entries, side, workers
        self.unreadable: set[int] = set()  # the indices that `stream` has met so far

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(M, 3, S, S)."""
        return len(self.entries), 3, self.side, self.side

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry, size = self.entries[index], (self.side, self.side)
        image = None
        try:
            with Image.open(entry.path) as picture:
                pixels = np.array(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))
            image = torch.from_numpy(pixels).permute(2, 0, 1)
        except Exception:  # each decoder has its own; all mean that it is not a whole picture
            pass
        return Example(image, entry.prompt, entry.label, entry.score)

    def fingerprint(self) -> str:
        """Return a hash of what the entries tell and of each file's name, size and time of change."""
        return self._digest(lambda entry, file: (file and (file.st_size, file.st_mtime_ns), entry.label))

    def content(self) -> str:
        """Return a hash of what can be learnt: all that the entries tell, and each file's name and size.

        Not of its time of change: a copy of the data set has the same.
        """
        return self._digest(lambda entry, file: (file and file.st_size, entry.prompt, entry.label))

    def _digest(self, known: Callable[[Entry, os.stat_result | None], tuple[Any, ...]]) -> str:
        """Return a hash of each entry's file name and score, and of what is `known` of it and its file."""
        digest = hashlib.sha256(str(self.side).encode())
        for entry in self.entries:
            path = Path(entry.path)
            file = path.stat() if path.is_file() else None
            digest.update(repr((path.name, *known(entry, file), entry.score)).encode())
        return digest.hexdigest()


def stream(data: Pictures, order: Tensor, size: int) -> Iterator[Batch]:
    """Yield the pictures at the places `order`, `size` at a time, those that cannot be read left out.

    Raises:
        DiffRLError: not one picture of the data set can be read.
    """
    parts = order.split(size)
    loader: DataLoader[Any] = DataLoader(
        data,  # type: ignore[arg-type] # a tensor is a data set too
        batch_sampler=[part.tolist() for part in parts],
        collate_fn=_batch,
        # a worker that gets no part would be started for nothing
        num_workers=min(data.workers, len(parts)) if isinstance(data, PictureFiles) else 0,
        generator=torch.Generator(),  # of the workers' seeds, or it would draw from the global one
    )
    for part, batch in zip(parts, loader, strict=True):
        if isinstance(data, PictureFiles):
            data.unreadable |= set(part.tolist()) - set(part[batch.index].tolist())
            if len(data.unreadable) == len(data):
                raise DiffRLError(
                    f"{data.entries[0].path}: not a whole picture, nor is any other of the {len(data)} of "
                    "the data set."
                )
        if len(batch.index):
            images = batch.images / 255 if batch.images.dtype == torch.uint8 else batch.images
            yield replace(batch, index=part[batch.index], images=images)


def draw(data: Pictures, count: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield `count` pictures in all, each uniform among those that can be read, with replacement."""
    device = generator.device
    while count:
        order = torch.randint(len(data), (count,), generator=generator, device=device).cpu()
        for batch in stream(data, order, _DRAW_BATCH):
            count -= len(batch.index)
            yield batch


def _batch(items: Sequence[Example | Tensor]) -> Batch:
    examples = [Example(item) if isinstance(item, Tensor) else item for item in items]
    whole = [example for example in examples if example.image is not None]
    images = [example.image for example in whole if example.image is not None]

    def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in (rows[0] if rows else ())}

    return Batch(
        index=torch.tensor([n for n, e in enumerate(examples) if e.image is not None], dtype=torch.int64),
        images=torch.stack(images) if images else torch.empty(0),
        prompts=[example.prompt for example in whole],
        label=columns([example.label for example in whole]),
        score=columns([example.score for example in whole]),
    )


def read(
    folder: Path, measures: Sequence[str], num_classes: Sequence[int]
) -> tuple[list[Entry], list[str]]:
    """Return what a folder holds, no picture opened yet, and what should be told of it.

    Args:
        folder: of one of the three kinds above.
        measures: the names of the reward's, in the order of a label's attributes.
        num_classes: of each.

    Raises:
        DiffRLError: no such folder, one of another kind, a row that does not parse, is incomplete or leads
            outside the folder.
    """
    if not folder.is_dir():
        raise DiffRLError(f"dataset={folder}: no such folder. Give a folder of pictures.")
    lists = [name for name in _READERS if (folder / name).is_file()]
    if len(lists) > 1:
        raise DiffRLError(f"dataset={folder}: it has {' and '.join(lists)}; keep one.")
    if not lists:
        return _entries(folder, _pictures(folder), measures, num_classes)
    rows, folder, notes = _READERS[lists[0]](folder / lists[0])
    entries, said = _entries(folder, rows, measures, num_classes)
    return entries, notes + said


def some(entries: list[Entry], count: int, seed: int) -> list[Entry]:
    """Return `count` of the entries, drawn by `seed`, in their order; all where there are no more."""
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))
    return [entries[place] for place in sorted(order[:count].tolist())]


def _entries(
    folder: Path, rows: Sequence[Row], measures: Sequence[str], num_classes: Sequence[int]
) -> tuple[list[Entry], list[str]]:
    labels = [row.label(num_classes) if measures else None for row in rows]
    if any(labels) and None in labels:
        raise DiffRLError(f"{rows[labels.index(None)].where}: it has no label, and other rows have one.")
    columns = dict.fromkeys(name for row in rows for name in row.cells)
    scored = {} if any(labels) else _score_columns(columns, measures)
    root = folder.resolve()
    entries = [
        Entry(
            path=_inside(root, row),
            prompt=row.get(*PROMPT) or None,
            label=dict(zip(measures, label, strict=True)) if label else {},
            score={measure: row.number(column) for measure, column in scored.items()},
        )
        for row, label in zip(rows, labels, strict=True)
    ]
    return entries, [f"classes of {name} are by the column {c!r}" for name, c in scored.items()]


def _score_columns(names: Mapping[str, None], measures: Sequence[str]) -> dict[str, str]:
    """Return the column that scores each measure, by measure."""
    found = {measures[0]: "score"} if len(measures) == 1 and "score" in names else {}
    for name in names:
        stem, tail = name[: -len("_score")], name[-len("_score") :]
        if stem and tail == "_score":
            found |= {measure: name for measure in measures if measure.startswith(stem)}
    return found


def _inside(root: Path, row: Row) -> str:
    """Return the path of a row's picture: no row may lead out of its data set."""
    name = row.get("file_name", "img_path")
    if not name:
        raise DiffRLError(f"{row.where}: it has no 'file_name'.")
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root):
            return str(path)
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
        pass
    raise DiffRLError(f"{row.where}: {name!r} leads outside {root}. Only pictures inside it are read.")


def _pictures(folder: Path) -> list[Row]:
    """Return a row for each picture of a folder that has no list."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    stray = [name for name in names if Path(name).suffix.lower() not in _SUFFIXES]
    if not names:
        raise DiffRLError(f"dataset={folder}: the folder is empty. Put {', '.join(_SUFFIXES)} into it.")
    if stray:
        raise DiffRLError(
            f"dataset={folder}: {stray[0]!r} is not a picture ({len(stray)} of {len(names)} entries are "
            f"not). Keep only {', '.join(_SUFFIXES)} files in it, or add one of {', '.join(_READERS)}."
        )
    return [Row(f"dataset={folder}", {"file_name": name}) for name in names]


def _table(path: Path) -> tuple[list[Row], Path, list[str]]:
    return read_rows(path), path.parent, []


def _ava(path: Path) -> tuple[list[Row], Path, list[str]]:
    """Return AVA's rows: index, image id, 10 counts of votes, three more; only the id is of use."""
    folder = next((path.parent / name for name in _AVA_PICTURES if (path.parent / name).is_dir()), None)
    if folder is None:
        raise DiffRLError(
            f"{path}: no folder 'images' beside it. Put AVA's pictures there, each as <image id>.jpg."
        )
    rows, bad = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            image, *votes = (int(word) for word in line.split()[1:12])
            if len(votes) != 10 or min(votes) < 0:
                raise ValueError
        except ValueError:
            bad.append(number)
            continue
        rows.append(Row(f"{path}, line {number}", {"file_name": f"{image}.jpg"}))
    if len(bad) >= len(rows):
        raise DiffRLError(
            f"{path}: {len(bad)} of {len(lines)} lines are not AVA's (index, image id, 10 counts of votes, "
            f"...), the first is line {(bad or [1])[0]}."
        )
    lost = [f"{len(bad)} of {len(lines)} lines do not parse and are left out, the first is line {bad[0]}"]
    return rows, folder, lost if bad else []


_READERS: dict[str, Callable[[Path], tuple[list[Row], Path, list[str]]]] = {
    "metadata.csv": _table,
    "metadata.jsonl": _table,
    "AVA.txt": _ava,
}
