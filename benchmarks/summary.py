"""From the records of a suite's cells to a table: means and intervals over seeds."""

import math
import statistics
from typing import Any

import numpy as np
import scipy.stats
from rich import box
from rich.table import Table

from diffrl.benchmarks.suites import Suite

SPENT = {"pictures drawn": "pictures", "network calls": "network_calls", "seconds": "seconds"}
_LEVEL = 0.95


def summarise(suite: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record a row: of every measure of the last evaluation the mean over seeds.

    `<measure>_ci95` is half the width of Student's 95% interval of that mean, null with one seed;
    `<measure>_max` is the largest of the seeds. Of accuracies, each class's own and macro F1, it is no less
    than that of all seeds' pictures: two seeds that agree by chance are no certainty. Of seconds it is the
    fewest; see `over_seeds`. A list's numbers are `<measure>/0` and so on.
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
            last = [record["points"][-1] for record in finished]
            of_pictures = _of_pictures(last)
            for name, values in _columns(last).items():
                mean, half = over_seeds(name, values)
                if name in of_pictures:
                    half = max(half or 0.0, of_pictures[name])
                summary |= {name: mean, f"{name}_ci95": half, f"{name}_max": max(values)}
        rows.append(summary)
    return rows


def bare(row: dict[str, Any], suite: Suite) -> dict[str, Any]:
    """Return a row as others read it: an evaluation's measures by their bare names.

    A column's measure that the row does not have is null.
    """
    shown = (first_of(measures, row) for measures in suite.columns.values())
    empty = {name: None for measure in shown for name in (measure, f"{measure}_ci95")}
    return {name.removeprefix("eval/"): value for name, value in (row | empty | row).items()}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of Student's 95% interval; None for a single value."""
    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(count)
    return mean, float(scipy.stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * error


def over_seeds(name: str, values: list[float]) -> tuple[float, float | None]:
    """Return a measure's mean and the half width of its interval; of any seconds the fewest, and None.

    Over seeds the work is the same: what one took longer, other work on the machine has taken.
    """
    return (min(values), None) if "seconds" in name else interval(values)


def _columns(points: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the numbers that all of the points have, by name."""
    points = [spread(point) for point in points]
    shared = [n for n, v in points[0].items() if all(isinstance(p.get(n), int | float) for p in points)]
    return {name: [point[name] for point in points] for name in shared}


def spread(point: dict[str, Any]) -> dict[str, Any]:
    """Return a point with each number of its lists under a name of its own besides."""
    lists = {name: values for name, values in point.items() if isinstance(values, list)}
    return point | {
        f"{name}/{n}": value for name, values in lists.items() for n, value in enumerate(values)
    }


def _of_pictures(points: list[dict[str, Any]]) -> dict[str, float]:
    """Return the half widths of the 95% intervals, over pictures, of what counts (asked, true) tell."""
    found = {}
    for name in points[0]:
        group, _, last = name.rpartition("/")
        if last == "confusion" and all(name in point for point in points):
            counts = np.sum([point[name] for point in points], 0)
            found[f"{group}/accuracy"] = _of_share(counts.trace(), counts.sum())
            found[f"{group}/macro_f1"] = _of_f1(counts)
            asked = zip(counts.diagonal(), counts.sum(1), strict=True)
            found |= {f"{group}/per_class/{y}": _of_share(*of) for y, of in enumerate(asked) if of[1]}
        if last == "prompt_fidelity" and all({name, f"{group}/n"} <= point.keys() for point in points):
            shares, counts = np.array([(point[name], point[f"{group}/n"]) for point in points]).T
            found[name] = _of_share(round(shares @ counts), counts.sum())
    return found


def _of_share(hits: int, count: int) -> float:
    """Return half the width of Wilson's interval, which is none of certainty where all are hits."""
    low, high = scipy.stats.binomtest(int(hits), int(count)).proportion_ci(_LEVEL, "wilson")
    return float(high - low) / 2


def _of_f1(counts: np.ndarray) -> float:
    """Return half the width of macro F1's interval by bootstrap over the pictures of a confusion."""
    pictures = np.repeat(np.arange(counts.size), counts.ravel())
    if len(pictures) < 2:
        return 0.0
    low, high = scipy.stats.bootstrap(
        (pictures,),
        lambda drawn: _macro_f1(np.bincount(drawn, minlength=counts.size).reshape(counts.shape)),
        vectorized=False,
        n_resamples=999,
        confidence_level=_LEVEL,
        method="percentile",
        random_state=0,
    ).confidence_interval
    return float(high - low) / 2


def _macro_f1(counts: np.ndarray) -> float:
    """Return macro F1 of counts `[asked, true]`, as scikit-learn does of pictures, but in microseconds."""
    return float((2 * counts.diagonal() / (counts.sum(0) + counts.sum(1)).clip(min=1)).mean())


def table(suite: Suite, rows: list[dict[str, Any]]) -> Table:
    """Return the suite's columns of each row as Markdown, mean and interval; a failure shows as one."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("method", no_wrap=True)
    for heading in ("seeds", *suite.columns, *SPENT):
        shown.add_column(heading, justify="right", no_wrap=True)
    spent = [f"spent/{name}" for name in SPENT.values()]
    for row in rows:
        cells = [_with_interval(row, first_of(measure, row)) for measure in suite.columns.values()]
        cells += [f"{row[name]:,.0f}" if name in row else "-" for name in spent]
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        shown.add_row(row["method"] + failed, str(row["n_seeds"]), *cells)
    return shown


def several(measures: str | list[str]) -> list[str]:
    """Return a column's measures, one or more, as a list."""
    return [measures] if isinstance(measures, str) else measures


def first_of(measures: str | list[str], row: dict[str, Any]) -> str:
    """Return the one measure, or the first of several that a row has."""
    named = several(measures)
    return next((measure for measure in named if measure in row), named[0])


def _with_interval(row: dict[str, Any], measure: str) -> str:
    if measure not in row:
        return "-"
    value, half = row[measure], row[f"{measure}_ci95"]
    return as_text(value, value) + ("" if half is None else f" ± {as_text(half, value)}")


def as_text(number: float, scale: float) -> str:
    """Return a number with as many digits as its column's size, `scale`, deserves."""
    digits = 0 if abs(scale) >= 100 else 1 if abs(scale) >= 10 else 3
    return f"{number:,.{digits}f}"
