"""A suite's result on disk: `<name>.json`, whole at any time, and `<name>.png`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffrl import disk
from diffrl.benchmarks.charts import charts
from diffrl.benchmarks.suites import Suite
from diffrl.benchmarks.summary import several, spread, summarise
from diffrl.errors import unknown
from diffrl.log import console


def finish(
    name: str, suite: Suite, records: list[dict[str, Any]], trials: list[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """Write `<name>.json` and, if there is anything to draw, `<name>.png`; return the rows.

    Raises:
        DiffRLError: a column or the curve is a measure that no cell has.
    """
    rows = store(name, suite, records, trials, out)
    # a null, or a sentence that says what is not installed, is a measure too: it shows as "-"
    last = [record["points"][-1] for record in records if "points" in record]
    known = {measure for point in last for measure in spread(point)}
    if any(row["n_seeds"] for row in rows):
        for measures in (*suite.columns.values(), *suite.curve.values()):
            if not known & set(several(measures)):
                raise unknown("measure", several(measures)[0], [m for m in known if "/" in m])
        for chart in charts(suite, records, rows)[:1]:
            chart.picture().save(out / f"{name}.png")
    return rows


def store(
    name: str, suite: Suite, records: list[dict[str, Any]], trials: list[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """Write the records so far to `<name>.json`, and return their rows."""
    rows = summarise(name, records)
    stored = {"suite": name, "settings": asdict(suite), "rows": rows, "cells": records}
    stored |= {"trials": trials} if trials else {}
    out.mkdir(parents=True, exist_ok=True)
    with disk.replacing(out / f"{name}.json") as draft:
        draft.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return rows


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of cells and of trials in a suite's result; none where there is no whole one.

    One that is not whole is kept beside, under another name: the next cell's record takes its place.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result["cells"], result.get("trials", [])
    except FileNotFoundError:
        return [], []
    except (ValueError, KeyError, TypeError) as error:
        aside = path.replace(path.with_name(f"{path.name}.damaged"))
        why = f"not a whole result ({type(error).__name__}: {error}), now {aside.name}"
        console.print(f"[bold yellow]{path}[/]: {why}. Cells whose folders are there count as done.")
        return [], []
