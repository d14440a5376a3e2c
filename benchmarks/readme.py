"""The README's tables, from the files in `benchmarks/results/`: `python -m diffrl.benchmarks.readme`.

A table lies between `<!-- table: NAME -->` and `<!-- end -->`; whatever is between them is replaced.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from diffrl.benchmarks.summary import SPENT, first_of

_ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str, results: Path) -> str:
    """Return a README with every table written anew."""
    known = {
        "emoji": _emoji,
        "exact": _exact,
        "families": lambda results: _suite(results / "emoji.json", *SPENT),
    }

    def table(name: str) -> str:
        if name in known:
            return known[name](results)
        return _suite(results / f"{name}.json", "pictures drawn")

    return _BLOCK.sub(lambda block: f"{block[1]}{table(block[2])}\n{block[3]}", text)


def _emoji(results: Path) -> str:
    heading = [
        "command",
        "accuracy",
        "macro F1",
        "worst class",
        "prompt fidelity (before: .950)",
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
                f"{_short(log_prob)} ({_short(target)})",
                _short(width),
                _short(row.get("sampled/z_ratio")),
                f"{60 * row['minutes']:.0f}",
            ]
        )
    return _markdown(heading, rows)


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
    value, half = row.get(measure), row.get(f"{measure}_ci95")
    return f"{_short(value)} ± {_short(half)}" if half else _short(value)


def _short(value: float | None) -> str:
    """Return a number as the README writes it: .0157, 1.003, 21.3, 10, 2,012, 0, or a dash."""
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


def main() -> int:
    """Write the tables; with `--check`, say whether they are as the data say, and change nothing."""
    path = _ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = written(old, _ROOT / "benchmarks" / "results")
    if "--check" in sys.argv[1:]:
        return int(old != new)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
