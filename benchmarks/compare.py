"""Suites: rows of settings, some seeds each, every cell a training run in a process of its own.

A suite is a YAML file of `diffrl/conf/suite/`, or any file of that form. Each cell has a folder, so that a
suite goes on where it stopped: a cell that is done for the same settings is not run again.
"""

import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import yaml
from PIL import Image
from rich import box
from rich.table import Table

from diffrl import __version__, config, run
from diffrl.build import check
from diffrl.errors import DiffRLError, unknown
from diffrl.log import console, progress
from diffrl.plot import Line, learning

SPENT = {"pictures drawn": "pictures", "network calls": "network_calls", "seconds": "seconds"}
_CELL_FILE = "cell.json"
_LEVEL = 0.95


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
    curve: dict[str, str] = field(default_factory=dict)  # the one measure that is drawn, by its name

    def __post_init__(self) -> None:
        for name, kind in (("rows", dict), ("columns", dict), ("settings", list), ("curve", dict)):
            if not isinstance(getattr(self, name), kind):
                wanted = "a list of key=value words" if kind is list else "a mapping"
                raise DiffRLError(f"{name}: {getattr(self, name)!r} is not {wanted}.")
        for row, words in self.rows.items():
            if not isinstance(words, list):
                raise DiffRLError(f"rows: {row}: {words!r} is not a list of key=value words.")
        if len(self.curve) > 1:
            raise DiffRLError(f"curve: {list(self.curve)} are {len(self.curve)} measures; give one.")
        if not isinstance(self.seeds, int) or self.seeds < 1:
            raise DiffRLError(f"seeds: {self.seeds!r} must be a whole number, 1 or more.")


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

    Raises:
        DiffRLError: no such suite or file, a key that no suite has, a value of the wrong form.
    """
    path = suites().get(name, Path(name))
    if not path.is_file():
        raise unknown("suite", name, suites())
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise DiffRLError(f"{type(stored).__name__} instead of a mapping.")
        known = [each.name for each in fields(Suite)]
        for key in stored:
            if key not in known:
                raise unknown("key", key, known)
        for key in ("rows", "columns"):
            if not stored.get(key):
                raise DiffRLError(f"{key}: missing or empty.")
        return Suite(**stored)
    except (DiffRLError, yaml.YAMLError) as error:
        raise DiffRLError(f"{path}: not a suite: {' '.join(str(error).split())}") from error


def compare(
    suite: Suite, folder: Path, *, words: list[str], seeds: int | None = None, jobs: int = 2
) -> list[dict[str, Any]]:
    """Run every cell that is not done yet, and return the records of all, in the suite's order.

    Args:
        suite: what to run.
        folder: holds a folder of each cell, and is made if it is not there.
        words: further settings of every cell; none that a row or a cell sets itself.
        seeds: instead of the suite's own number.
        jobs: cells at a time; they share the cores.
    """
    own = {"seed", "name", "root", *(_key(word) for row in suite.rows.values() for word in row)}
    for word in words:
        if _key(word) in own:
            raise DiffRLError(
                f"{word}: the suite sets {_key(word)} itself; change it in a suite of your own."
            )
    cells = [
        Cell(row, seed, [*suite.settings, *chosen, *words, f"seed={seed}"])
        for row, chosen in suite.rows.items()
        for seed in range(seeds or suite.seeds)
    ]
    wanted = {cell.name: _settings(cell, folder) for cell in cells}  # before an hour is spent on the first
    if len(wanted) < len(cells):
        names = [cell.name for cell in cells]
        twice = [cell.row for cell in cells if names.count(cell.name) > 1]
        raise DiffRLError(f"rows: {' and '.join(map(repr, dict.fromkeys(twice)))} name the same folder.")
    records = {cell.name: _finished(cell, folder, wanted[cell.name]) for cell in cells}
    todo = [cell for cell in cells if records[cell.name] is None]
    folder.mkdir(parents=True, exist_ok=True)
    if done := len(cells) - len(todo):
        console.print(f"{done} of {len(cells)} cells are done already, in {folder}")
    context = multiprocessing.get_context("forkserver")  # a server imports once, each cell is its fork
    context.set_forkserver_preload(["diffrl.run"])
    threads = max((os.cpu_count() or 1) // jobs, 1)
    origin = provenance() | {"jobs": jobs, "threads": threads}
    with ThreadPoolExecutor(jobs) as pool, progress("cells", len(todo)) as bar:

        def finish(cell: Cell) -> None:
            process = context.Process(target=_run, args=(cell, folder, origin), daemon=True)
            process.start()
            process.join()
            if process.exitcode:
                why = f"exit code {process.exitcode}; see {folder / cell.name}.log"
                console.print(f"[bold red]{cell.name} failed[/]: {why}")
            bar.advance(note=cell.name)

        list(pool.map(finish, todo))
    for cell in todo:
        failure = {"row": cell.row, "seed": cell.seed, "failed": True}
        records[cell.name] = _finished(cell, folder, wanted[cell.name]) or failure
    return [record for record in records.values() if record]


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _settings(cell: Cell, folder: Path) -> config.Config:
    """Return what a cell trains with; mistakes of settings that contradict each other show here."""
    settings = config.load(cell.words)
    settings.root, settings.name = str(folder), cell.name
    check(settings)
    return settings


def _run(cell: Cell, folder: Path, origin: dict[str, Any]) -> None:
    """Train one cell; what it prints, its traceback too, goes to a file beside its folder."""
    with (folder / f"{cell.name}.log").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(origin["threads"])
    shutil.rmtree(folder / cell.name, ignore_errors=True)  # one that was stopped on its way
    begin = time.perf_counter()
    trained = run.train(_settings(cell, folder))
    record = asdict(cell) | {
        "command": shlex.join(["diffrl", "train", *cell.words]),
        "minutes": (time.perf_counter() - begin) / 60,
        "points": list(_points(trained)),
    }
    unfinished = trained / (_CELL_FILE + ".tmp")
    unfinished.write_text(json.dumps(record | origin))
    unfinished.rename(trained / _CELL_FILE)


def _points(trained: Path) -> Iterator[dict[str, Any]]:
    """Yield what a run's evaluations measured, with what had been spent on training by then."""
    for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        if any(name.startswith(("eval/", "exact/", "sampled/")) for name in metrics):
            yield metrics


def _finished(cell: Cell, folder: Path, wanted: config.Config) -> dict[str, Any] | None:
    """Return the record of a cell that has run to its end; None if not, or if its record is cut short.

    Raises:
        DiffRLError: it ran to its end with other settings (presets count) or by another version.
    """
    path = folder / cell.name
    try:
        record = json.loads((path / _CELL_FILE).read_text(encoding="utf-8"))
        if config.read(path / run.CONFIG_FILE) == wanted and record["version"] == __version__:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        return None
    except DiffRLError:
        pass  # settings that this version does not have
    raise DiffRLError(
        f"{path}: a finished run of other settings or another version. Give another --root, or delete it."
    )


def provenance() -> dict[str, str]:
    """Return what a number depends on besides its settings: versions, commit, hardware."""
    home = Path(__file__).resolve().parent
    git = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12"]
    found = (
        subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "version": __version__,
        "commit": found.stdout.strip() if found and not found.returncode else "not a checkout",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "hardware": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
    }


def summarise(suite: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record a row: of every measure of the last evaluation the mean over seeds.

    `<measure>_ci95` is half the width of Student's 95% interval of that mean, null with one seed;
    `<measure>_max` the largest of the seeds.
    """
    rows = []
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        finished = [record for record in mine if "points" in record]
        summary = {
            "suite": suite,
            "method": row,
            "n_seeds": len(finished),
            "failed": len(mine) - len(finished),
        }
        if finished:
            summary |= {"minutes": statistics.mean(record["minutes"] for record in finished)}
            for name, values in _columns([record["points"][-1] for record in finished]).items():
                mean, half = interval(values)
                summary |= {name: mean, f"{name}_ci95": half, f"{name}_max": max(values)}
        rows.append(summary)
    return rows


def interval(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of Student's 95% interval; None for a single value."""
    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(count)
    return mean, float(scipy.stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * error


def _columns(points: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the numbers that all of the points have, by name."""
    shared = [n for n, v in points[0].items() if all(isinstance(p.get(n), int | float) for p in points)]
    return {name: [point[name] for point in points] for name in shared}


def table(suite: Suite, rows: list[dict[str, Any]]) -> Table:
    """Return the suite's columns of each row as Markdown, mean and interval; a failure shows as one."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("method", no_wrap=True)
    for heading in (*suite.columns, *SPENT):
        shown.add_column(heading, justify="right", no_wrap=True)
    spent = [f"spent/{name}" for name in SPENT.values()]
    for row in rows:
        cells = [_with_interval(row, _first(measure, row)) for measure in suite.columns.values()]
        cells += [f"{row[name]:,.0f}" if name in row else "-" for name in spent]
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        shown.add_row(row["method"] + failed, *cells)
    return shown


def _first(measures: str | list[str], row: dict[str, Any]) -> str:
    """Return the one measure, or the first of several that a row has."""
    several = [measures] if isinstance(measures, str) else measures
    return next((measure for measure in several if measure in row), several[0])


def _with_interval(row: dict[str, Any], measure: str) -> str:
    if measure not in row:
        return "-"
    value, half = row[measure], row[f"{measure}_ci95"]
    form = ",.0f" if abs(value) >= 100 else ".3f"
    return f"{value:{form}}" + ("" if half is None else f" ± {half:{form}}")


def draw(suite: Suite, records: list[dict[str, Any]]) -> Image.Image:
    """Return the suite's measure against what was spent, one panel a currency, one line a row."""
    (name, measure), *_ = suite.curve.items()
    panels: dict[str, list[Line]] = {}
    for heading, currency in SPENT.items():
        for row in suite.rows:
            runs = [r["points"] for r in records if r["row"] == row and "points" in r]
            if not runs:
                continue
            steps = list(zip(*runs, strict=True))  # of the same settings: evaluated at the same updates
            middle, half = zip(*(interval([p[measure] for p in step]) for step in steps), strict=True)
            spent = [statistics.mean(p[f"spent/{currency}"] for p in step) for step in steps]
            band = [h or 0.0 for h in half]
            panels.setdefault(heading, []).append(Line(row, spent, list(middle), band))
    return learning(panels, name)


def report(name: str, suite: Suite, records: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Write `<name>.json` and, if the suite has a curve, `<name>.png`; return the rows.

    Raises:
        DiffRLError: a column or the curve is a measure that no cell has.
    """
    rows = summarise(name, records)
    out.mkdir(parents=True, exist_ok=True)
    stored = {"suite": name, "settings": asdict(suite), "rows": rows, "cells": records}
    (out / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    known = {measure for row in rows for measure in row}
    if any(row["n_seeds"] for row in rows):
        for measures in (*suite.columns.values(), *suite.curve.values()):
            several = [measures] if isinstance(measures, str) else measures
            if not known & set(several):
                raise unknown("measure", several[0], [m for m in known if "/" in m])
        if suite.curve:
            draw(suite, records).save(out / f"{name}.png")
    return rows
