"""The tables of the pages, from `benchmarks/results/`: `python -m diffrl.benchmarks.readme`.

The pages are the README and those of `docs/`. A table lies between `<!-- table: NAME -->` and
`<!-- end -->`; whatever is between them is replaced.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from diffrl.benchmarks.summary import SPENT, first_of

_ROOT = Path(__file__).resolve().parents[1]
_SINGLE = ("two_labels_by_hand", "layers_one_label", "layers_two_labels")
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str, results: Path) -> str:
    """Return a page with every table written anew."""
    known = {
        "headline": _headline,
        "emoji": _emoji,
        "exact": _exact,
        "families": lambda results: _suite(results / "emoji.json", *SPENT),
    }
    known |= {name: partial(_single, name=name) for name in _SINGLE}

    def table(name: str) -> str:
        if name in known:
            return known[name](results)
        return _suite(results / f"{name}.json", "pictures drawn")

    return _BLOCK.sub(lambda block: f"{block[1]}{table(block[2])}\n{block[3]}", text)


def _headline(results: Path) -> str:
    """Return of each method its cost and the measures of the main suites that a reader asks for first.

    Those of two controls at once are left out as long as there are none.
    """
    one, both = (
        {row["method"]: row for row in _read(results / f"{suite}.json")["rows"]}
        for suite in ("compressibility", "multitask")
    )
    heading = ["", "calls a picture", "seconds a picture", "accuracy", "fidelity", "KL (nats)"]
    heading += ["2 x 2: both right", "size", "colour", "fidelity"] if both else []
    lines = []
    for method, row in one.items():
        line = [
            method,
            _short(row.get("eval/nfe_per_image")),
            _short(row.get("eval/seconds_per_image")),
            _with_interval(row, "eval/accuracy"),
            _with_interval(row, "eval/prompt_fidelity"),
            _short(row.get("eval/kl_nats")),
        ]
        if both:
            other = both.get(method, {})
            line += [
                _with_interval(other, "eval/accuracy"),
                _short(other.get("eval/compressibility/accuracy")),
                _short(other.get("eval/colourfulness/accuracy")),
                _with_interval(other, "eval/prompt_fidelity"),
            ]
        lines.append(line)
    return _markdown(heading, lines)


def _emoji(results: Path) -> str:
    heading = [
        "command",
        "accuracy",
        "macro F1",
        "worst class",
        "prompt fidelity",
        "KL, nats",
    ]
    rows = []
    for path in [*sorted(results.glob("emoji-ctrl-seed*.json")), results / "emoji-full.json"]:
        found = _read(path)
        values = (found["accuracy"], found["macro_f1"], min(found["per_class"]), found["prompt_fidelity"])
        command, kl = found["command"].split(";")[0], f"{found['kl_nats']:,.0f}"
        rows.append([f"`{command}`", *map(_short, values), kl])
    return _markdown(heading, rows)


def _exact(results: Path) -> str:
    heading = [
        "",
        "gap, nats",
        "worst",
        "to the best Gaussian",
        "worst",
        "total variation",
        "worst",
        "E log p (target)",
        "width",
        "Zhat / Z",
        "s a cell",
    ]
    rows = []
    for row in _read(results / "exact.json")["rows"]:
        log_prob, target, width = (
            row.get(first_of([f"exact/{name}", f"sampled/{name}"], row))
            for name in ("log_prob", "target_log_prob", "width")
        )
        rows.append(
            [
                row["method"],
                *_mean_and_worst(row, "exact/gap_nats"),
                *_mean_and_worst(row, "exact/gap_gaussian_nats"),
                *_mean_and_worst(row, "exact/tv"),
                "-" if log_prob is None else f"{_short(log_prob)} ({_short(target)})",
                _short(width),
                _short(row.get("sampled/z_ratio")),
                f"{60 * row['minutes']:.0f}",
            ]
        )
    return _markdown(heading, rows)


def _single(results: Path, name: str) -> str:
    """Return runs of one seed each, by their titles."""
    table = _read(results / "layers.json")["tables"][name]
    measures = ("accuracy", "prompt_fidelity", "kl_nats")
    rows = [[run["title"], *(_short(run[name]) for name in measures)] for run in table["runs"]]
    return _markdown([table["heading"], table["accuracy"], "fidelity", "KL (nats)"], rows)


def _suite(path: Path, *spent: str) -> str:
    """Return a suite's columns in which any row has a number, then what its cells have `spent`.

    Each class's own are left to the report.
    """
    result = _read(path)
    rows = result["rows"]
    shown = {
        title: measure
        for title, measure in result["settings"]["columns"].items()
        if "/per_class/" not in measure and any(row.get(first_of(measure, row)) is not None for row in rows)
    }
    lines = []
    for row in rows:
        cells = [_with_interval(row, first_of(measure, row)) for measure in shown.values()]
        cells += [_short(row.get(f"spent/{SPENT[title]}")) for title in spent]
        lines.append([row["method"], str(row["n_seeds"]), *cells])
    return _markdown(["", "seeds", *shown, *spent], lines)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mean_and_worst(row: dict[str, Any], measure: str) -> tuple[str, str]:
    return _short(row.get(measure)), _short(row.get(f"{measure}_max"))


def _with_interval(row: dict[str, Any], measure: str) -> str:
    """Return a number with its interval's half, to as many decimals; a narrow column breaks before it."""
    value, half = row.get(measure), row.get(f"{measure}_ci95")
    if value is None or not half:
        return _short(value)
    text = _short(value)
    _, point, decimals = text.partition(".")
    whole = not point and abs(value) < 100  # by chance
    width = _short(half) if whole else f"{half:,.{len(decimals)}f}"
    return f"{text} ±\N{NO-BREAK SPACE}{width.removeprefix('0') if point else width}"


def _short(value: float | None) -> str:
    """Return a number as the pages write it: .0157, 1.003, 21.3, 10, 2,012, 0, or a dash."""
    if value is None:
        return "-"
    if abs(value) >= 100 or (value == round(value) and abs(value) != 1):
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    text = f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pages(root: Path) -> list[Path]:
    """Return the pages that may have tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main() -> int:
    """Write the tables; with `--check`, say whether they are as the data say, and change nothing."""
    same = True
    for path in pages(_ROOT):
        old = path.read_text(encoding="utf-8")
        new = written(old, _ROOT / "benchmarks" / "results")
        same &= old == new
        if "--check" not in sys.argv[1:] and old != new:
            path.write_text(new, encoding="utf-8")
    return int("--check" in sys.argv[1:] and not same)


if __name__ == "__main__":
    sys.exit(main())
