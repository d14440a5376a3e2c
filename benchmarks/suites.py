"""What a suite is: rows of settings, some seeds each, and which measures of them are shown.

A suite is a YAML file of `diffrl/conf/suite/`, or any file of that form.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from diffrl import config
from diffrl.errors import DiffRLError, unknown


@dataclass(frozen=True)
class Suite:
    """What is compared, and which of its measures are shown.

    Raises:
        DiffRLError: a value of the wrong form.
    """

    rows: dict[str, list[str]]  # `key=value` words of each method
    columns: dict[str, Any]  # measures of the table, by heading; of a list, the first that a row has
    settings: list[str] = field(default_factory=list)  # words of every row
    seeds: int = 3  # 0, 1, ...
    curve: dict[str, Any] = field(default_factory=dict)  # the one measure that is drawn, by its name
    # over a setting instead of what was spent: {its heading: {line: setting}}; the rows named "LINE, ..."
    # are its points, and several measures may be drawn
    against: dict[str, dict[str, str]] = field(default_factory=dict)
    # a setting's values to try first, by row: {row: {setting: [values]}}; a trial's seed is no cell's
    tune: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    tune_settings: list[str] = field(default_factory=list)  # words of every trial besides
    tune_by: str = "eval/accuracy"  # the value where this measure is the largest is the row's
    # those that come as near to it are as good; of them it is the one where `tune_then` is the largest
    tune_margin: float = 0.0
    tune_then: Any = ""  # a measure; of a list, the first that a trial has
    # where no value comes above this, as with an accuracy at chance, the reward's mean tells which are as
    # good: those within a standard error of the largest
    tune_least: float | None = None
    quick: dict[str, list[str]] = field(default_factory=dict)  # words of a row with --quick; `all` of each

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(("rows", "columns", "curve", "against", "tune", "quick"), dict)
        for name, kind in {**kinds, "settings": list, "tune_settings": list}.items():
            if not isinstance(getattr(self, name), kind):
                wanted = "a list of key=value words" if kind is list else "a mapping"
                raise DiffRLError(f"{name}: {getattr(self, name)!r} is not {wanted}.")
        for name in ("rows", "quick"):
            for row, words in getattr(self, name).items():
                if not isinstance(words, list):
                    raise DiffRLError(f"{name}: {row}: {words!r} is not a list of key=value words.")
        for row in (*self.tune, *(row for row in self.quick if row != "all")):
            if row not in self.rows:
                raise unknown("row", row, self.rows)
        for row, grid in self.tune.items():
            values = list(grid.values()) if isinstance(grid, dict) else []
            if len(values) != 1 or not isinstance(values[0], list) or not values[0]:
                raise DiffRLError(f"tune: {row}: {grid!r} is not one setting with a list of values.")
        if len(self.curve) > 1 and not self.against:
            raise DiffRLError(f"curve: {list(self.curve)} are {len(self.curve)} measures; give one.")
        self.lines()
        if not isinstance(self.seeds, int) or self.seeds < 1:
            raise DiffRLError(f"seeds: {self.seeds!r} must be a whole number, 1 or more.")

    def lines(self) -> dict[str, dict[str, float]]:
        """Return of each line in `against` its rows, and what they give its setting.

        Raises:
            DiffRLError: not one heading, a line without a row, a row without a number.
        """
        if not self.against:
            return {}
        if len(self.against) > 1 or not all(isinstance(lines, dict) for lines in self.against.values()):
            raise DiffRLError(f"against: {self.against!r} is not one heading with its lines.")
        ((_, settings),) = self.against.items()
        found = {}
        for line, setting in settings.items():
            rows = [row for row in self.rows if row == line or row.startswith(f"{line},")]
            if not rows:
                raise DiffRLError(
                    f"against: no row is {line!r} or begins with '{line},'; the rows are {list(self.rows)}."
                )
            found[line] = {row: self._number(row, setting) for row in rows}
        return found

    def _number(self, row: str, setting: str) -> float:
        words = [word.lstrip("+") for word in (*self.settings, *self.rows[row])]
        words = [word for word in words if word.startswith(f"{setting}=")]
        try:
            return float(words[-1].partition("=")[2])
        except (IndexError, ValueError):
            said = words[-1] if words else f"no {setting}="
            raise DiffRLError(f"against: {row}: {said} instead of a number for {setting}.") from None

    def candidates(self, row: str) -> list[str]:
        """Return the `key=value` words that a row is tuned over."""
        return [f"{key}={value}" for key, values in self.tune[row].items() for value in values]


@dataclass(frozen=True)
class Cell:
    """One row of a suite with one seed."""

    row: str
    seed: int
    words: list[str]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.]+", "-", self.row) + f"-seed{self.seed}"


def suites() -> dict[str, Path]:
    """Return the suites that come with diffrl, by name."""
    return {path.stem: path for path in sorted((config.CONF / "suite").glob("*.yaml"))}


def load(name: str) -> Suite:
    """Return the suite of that name, or of that YAML file.

    Its key `base` names another one, which gives every key that it has not itself.

    Raises:
        DiffRLError: no such suite or file, a key that no suite has, a value of the wrong form.
    """
    path = suites().get(name, Path(name))
    if not path.is_file():
        raise unknown("suite", name, suites())
    try:
        stored = _read(path)
        for key in ("rows", "columns"):
            if not stored.get(key):
                raise DiffRLError(f"{key}: missing or empty.")
        return Suite(**stored)
    except (DiffRLError, yaml.YAMLError) as error:
        raise DiffRLError(f"{path}: not a suite: {' '.join(str(error).split())}") from error


def _read(path: Path) -> dict[str, Any]:
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(stored, dict):
        raise DiffRLError(f"{type(stored).__name__} instead of a mapping.")
    known = ["base", *(each.name for each in fields(Suite))]
    for key in stored:
        if key not in known:
            raise unknown("key", key, known)
    if (base := stored.pop("base", None)) is None:
        return stored
    if not isinstance(base, str) or base not in suites():
        raise unknown("base", base, suites())
    return _read(suites()[base]) | stored
