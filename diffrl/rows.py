"""Rows of a CSV or JSON-lines file: columns are found by name, in any order, and a mistake by its line.

A label of several attributes is one column, `1;0` (or a JSON list), or a column each: `label1`, `label2`.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from diffrl.errors import DiffRLError

PROMPT = ("prompt", "text", "caption")
"""The names that a column of prompts may have."""


@dataclass(frozen=True)
class Row:
    """One line of a file."""

    where: str  # file and line, as errors name it
    cells: dict[str, str]  # by column, in lower case

    def get(self, *names: str) -> str:
        """Return the cell of the first of these columns that the row has; empty where it has none."""
        return next((self.cells[name] for name in names if name in self.cells), "")

    def number(self, name: str) -> float:
        """Return a cell as a finite number."""
        try:
            value = float(self.get(name))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DiffRLError(f"{self.where}: {name}={self.get(name)!r} is not a number.")
        return value

    def label(self, num_classes: Sequence[int]) -> tuple[int, ...] | None:
        """Return the label, a class of each attribute of so many classes; None where the row has none."""
        columns = [f"label{number + 1}" for number in range(len(num_classes))]
        said = self.get("label") or ";".join(self.get(column) for column in columns)
        if not said.strip(";"):
            return None
        try:
            label = tuple(int(word) for word in said.split(";"))
        except ValueError:
            raise DiffRLError(
                f"{self.where}: label={said!r} is not a whole number, or several as 1;0."
            ) from None
        if len(label) != len(num_classes):
            raise DiffRLError(
                f"{self.where}: label={said!r} has {len(label)} number(s), a label of this reward has "
                f"{len(num_classes)}."
            )
        for own, count in zip(label, num_classes, strict=True):
            if not 0 <= own < count:
                raise DiffRLError(
                    f"{self.where}: label={said!r} is unknown; this reward has labels 0 to {count - 1}."
                )
        return label


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a `.csv` with a header, or of a `.jsonl` with one object a line.

    Raises:
        DiffRLError: a file that cannot be read or has no row, a line that does not parse.
    """
    parse = _json_lines if path.suffix == ".jsonl" else _csv_lines
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [
                Row(f"{path}, line {line}", {str(k).strip().lower(): _text(v) for k, v in cells.items()})
                for line, cells in parse(file, path)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text of lines"
        raise DiffRLError(f"{path}: cannot be read ({reason}).") from error
    if not rows:
        raise DiffRLError(f"{path}: no row in it.")
    return rows


def _csv_lines(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, skipinitialspace=True)
    for cells in reader:
        if None in cells:
            raise DiffRLError(
                f"{path}, line {reader.line_num}: more cells than columns. Put double quotes round a text "
                "with commas."
            )
        yield reader.line_num, cells


def _json_lines(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            cells = json.loads(text)
        except ValueError:
            cells = None
        if not isinstance(cells, dict):
            raise DiffRLError(f"{path}, line {line}: not a JSON object.")
        yield line, cells


def _text(value: Any) -> str:
    """Return a cell as it would stand in a CSV."""
    if isinstance(value, list):
        return ";".join(map(_text, value))
    return "" if value is None else str(value).strip()
