"""One HTML file of suites and runs: tables, curves, confusion, pictures, commands; nothing from outside.

A suite is read from the JSON that `diffrl compare` writes, a run from its folder; all runs of a page are
the rows of one table.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from diffrl import __version__, disk
from diffrl.benchmarks.charts import charts
from diffrl.benchmarks.suites import Cell, Suite
from diffrl.benchmarks.summary import SPENT, as_text, first_of, several, summarise
from diffrl.errors import DiffRLError
from diffrl.log import METRICS_FILE, evaluations
from diffrl.restore import CONFIG_FILE, settings_of
from diffrl.settings_file import command

_TEMPLATE = Path(__file__).with_suffix(".html")
_WIDEST = 1100  # pixels of a picture grid
_OF_SEVERAL = (
    "Mean over seeds and half the width of Student's 95% interval; of accuracies and fidelity no less than "
    "Wilson's of the pictures, of macro F1 than their bootstrap's; of seconds the fewest."
)
_OF_A_RUN: dict[str, str | list[str]] = {
    "reward": "eval/reward_mean",
    "accuracy": "eval/accuracy",
    "macro F1": "eval/macro_f1",
    "KL (nats)": ["eval/kl_nats", "exact/kl_nats"],
    "fidelity": "eval/prompt_fidelity",
    "gap (nats)": "exact/gap_nats",
    "TV": "exact/tv",
}


def write(sources: list[Path], out: Path) -> Path:
    """Write the report of suites (their JSON, or the folder it lies in) and runs (their folders) to `out`.

    One that is given twice is there once.

    Raises:
        DiffRLError: a source that is neither, or half written.
    """
    found = [each for source in sources for each in _results(source)]
    unique = {each.resolve(): each for each in found}.values()
    runs = [each for each in unique if _is_run(each)]
    suites = [_section(*_read(each)) for each in unique if each not in runs]
    sections = suites + ([_section(*_of_runs(runs))] if runs else [])
    page = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    names = ", ".join(section["name"] for section in sections)
    html = page.render(title=f"diffrl: {names}", origin=f"diffrl {__version__}", suites=sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(out) as draft:
        draft.write_text(html, encoding="utf-8")
    return out


def _is_run(source: Path) -> bool:
    return source.is_dir() and (source / METRICS_FILE).is_file()


def _results(source: Path) -> list[Path]:
    """Return the runs and suites that a source is of: itself, or of a folder of results each of them."""
    if _is_run(source) or not source.is_dir():
        return [source]
    return [path for path in sorted(source.glob("*.json")) if _may_be_suite(path)] or [source]


def _may_be_suite(path: Path) -> bool:
    """Return whether a JSON file is a suite's result, or one that is cut short."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True  # so that it is named
    return isinstance(stored, dict) and {"suite", "settings", "cells"} <= stored.keys()


def _of_runs(runs: list[Path]) -> tuple[str, Suite, list[dict[str, Any]], Path]:
    """Return what `_read` does, of runs: a row each, by its name, or if two are called alike its path."""
    names = [run.resolve().name for run in runs]
    records: list[dict[str, Any]] = []
    for run, name in zip(runs, names, strict=True):
        record: dict[str, Any] = {
            "row": name if names.count(name) == 1 else str(run),
            "seed": 0,
            "command": command(settings_of(run)) if (run / CONFIG_FILE).is_file() else "",
            "folder": str(run.resolve()),
            "minutes": 0.0,
            "points": list(evaluations(run)),
        }
        if not record["points"]:
            raise DiffRLError(f"{run}: no evaluation in its {METRICS_FILE} yet; let it train on.")
        records.append(record)
    known = [set(record["points"][-1]) for record in records]
    columns = {name: m for name, m in _OF_A_RUN.items() if any(each & set(several(m)) for each in known)}
    # one line a run, of the control if all have one
    judged = next((name for name in ("accuracy", "reward") if name in columns), None)
    curve: dict[str, Any] = {judged: columns[judged]} if judged and len(runs) > 1 else {}
    suite = Suite(rows={r["row"]: [] for r in records}, columns=columns, seeds=1, curve=curve)
    return names[0] if len(runs) == 1 else "runs", suite, records, runs[0].parent


def _read(path: Path) -> tuple[str, Suite, list[dict[str, Any]], Path]:
    """Return name, suite, records of its cells, and the folder where their runs may lie."""
    if not path.is_file():
        raise DiffRLError(f"{path}: neither a run nor a suite's result; 'diffrl compare' writes NAME.json.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        suite, records = Suite(**stored["settings"]), stored["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise DiffRLError(
            f"{path}: not a whole result of 'diffrl compare' ({error}). Run it again."
        ) from error
    return stored["suite"], suite, records, path.parent


def _section(name: str, suite: Suite, records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    rows = summarise(name, records)
    headings = ["seeds", *suite.columns, *SPENT]
    measures = [*suite.columns.values(), *(f"spent/{key}" for key in SPENT.values())]
    first = {row["method"]: _first_seed(records, row["method"]) for row in rows}
    seeds = max((row["n_seeds"] for row in rows), default=0)
    about = _OF_SEVERAL if seeds > 1 else "One seed."
    return {
        "name": name,
        "about": " ".join([about, *_origins(records)]),
        "headings": headings,
        "rows": [
            {
                "name": row["method"],
                "failed": row["failed"],
                "cells": [_plain(row["n_seeds"]), *(_cell(row, m) for m in measures)],
            }
            for row in rows
        ],
        "figures": [
            {"title": chart.title, "svg": Markup(chart.svg()), "caption": chart.caption}
            for chart in charts(suite, records, rows)
        ],
        "confusions": [
            _confusion(method, record["points"][-1])
            for method, record in first.items()
            if record and "eval/confusion" in record["points"][-1]
        ],
        "pictures": _pictures(records, folder),
        "commands": [
            {"name": method, "command": record["command"]}
            for method, record in first.items()
            if record and record["command"]
        ],
    }


def _origins(records: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each version and hardware that numbers are of, with the commits."""
    commits: dict[str, list[str]] = {}
    for record in records:
        if "commit" in record:
            where = f"diffrl {record['version']} on {record['hardware']}"
            commits.setdefault(where, []).append(record["commit"])
    return [f"Measured by {where}, at {', '.join(dict.fromkeys(at))}." for where, at in commits.items()]


def _first_seed(records: list[dict[str, Any]], method: str) -> dict[str, Any] | None:
    return next((r for r in records if r["row"] == method and "points" in r), None)


def _plain(count: int) -> dict[str, Any]:
    return {"value": count, "text": str(count), "margin": ""}


def _cell(row: dict[str, Any], measures: str | list[str]) -> dict[str, Any]:
    measure = first_of(measures, row)
    value = row.get(measure)
    if value is None:
        return {"value": None, "text": "-", "margin": ""}
    half = row[f"{measure}_ci95"]
    return {
        "value": value,
        "text": as_text(value, value),
        "margin": as_text(half, value) if half else "",
    }


def _confusion(method: str, point: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's counts, with the share of each in its row, and the names of the labels."""
    counts = point["eval/confusion"]
    rows = [[{"count": n, "share": round(n / max(sum(row), 1), 3)} for n in row] for row in counts]
    labels = point.get("eval/labels", list(range(len(counts))))
    return {"name": method, "labels": labels, "rows": list(zip(labels, rows, strict=True))}


def _pictures(records: list[dict[str, Any]], folder: Path) -> list[dict[str, str]]:
    """Return the last picture of each method, of its first seed whose run's folder is at hand."""
    found: dict[str, Path] = {}
    for record in records:
        run = folder / record.get("folder", Cell(record["row"], record["seed"], []).name)
        pictures = sorted((run / "pictures").glob("*.png"), key=_update_of)
        if pictures and "points" in record:
            found.setdefault(record["row"], pictures[-1])
    return [{"name": method, "data": _embedded(path)} for method, path in found.items()]


def _update_of(picture: Path) -> int:
    """Return after which update a run drew a picture; -1 of one that it did not draw."""
    number = picture.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _embedded(path: Path) -> str:
    """Return a picture as a data URI, no wider than it will be shown."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
        shown.thumbnail((_WIDEST, 10 * _WIDEST))
        shown.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
