"""Train every row of a suite, some seeds each, and show them together."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffrl.errors import DiffRLError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    what = "suite=NAME (see 'diffrl list') and settings of every row; 'verify' trains a finished cell anew"
    parser.add_argument("words", nargs="*", metavar="key=value", help=what)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, no tuning, smaller runs: a first look, no result"
    )
    parser.add_argument("--seeds", type=int, help="seeds a row (default: the suite's)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="cells at a time, sharing the cores (default 2)"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/compare"), help="holds the cells' runs")
    parser.add_argument("--out", type=Path, help="folder of the result (default: that of the cells)")
    parser.add_argument("--json", action="store_true", help="print one JSON record a row")


def run(options: argparse.Namespace) -> None:
    """Train what is not done yet, write the result and show it."""
    from diffrl.benchmarks import forks

    forks.server()  # it imports while we do
    from diffrl.benchmarks import compare, result, suites, summary
    from diffrl.log import console, print_wide

    chosen = [word for word in options.words if word.startswith("suite=")]
    if len(chosen) != 1:
        raise DiffRLError(f"give one suite, as suite=NAME; known: {', '.join(suites.suites())}.")
    for option in ("seeds", "jobs"):
        if (count := getattr(options, option)) is not None and count < 1:
            raise DiffRLError(f"--{option} {count}: must be 1 or more.")
    words = [word for word in options.words if word not in (*chosen, "verify")]
    path = chosen[0].removeprefix("suite=")
    console.stderr = options.json  # standard output is the records alone
    suite, name = suites.load(path), Path(path).stem
    name += "-quick" if options.quick else ""
    folder = options.root / name
    out = options.out or folder
    earlier = result.read(out / f"{name}.json")
    if "verify" in options.words:
        _verify(compare.read(folder, earlier[0]), suite, folder)
        return
    records, trials = compare.compare(
        suite,
        folder,
        words=words,
        seeds=options.seeds,
        jobs=options.jobs,
        quick=options.quick,
        earlier=earlier,
        save=lambda cells, trials: result.store(name, suite, cells, trials, out),
    )
    rows = result.finish(name, suite, records, trials, out)
    if options.json:
        for row in rows:
            print(json.dumps(summary.bare(row, suite)))
    else:
        print_wide(summary.table(suite, rows))
        console.print(f"{out}/{name}.json has every number")
    if any(row["failed"] for row in rows) or any("points" not in trial for trial in trials):
        sys.exit(1)


def _verify(records: list[dict[str, Any]], suite: Any, folder: Path) -> None:
    import random

    from diffrl.benchmarks.compare import verify
    from diffrl.log import console

    wrong = verify(suite, folder, records, random.randrange(1 << 30))
    for line in wrong:
        console.print(f"[bold red]differs[/]: {line}")
    if wrong:
        sys.exit(1)
    console.print("every column lies where it was")
