"""Write one HTML page of suites and runs, with nothing from outside."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    what = "folders, or a suite's JSON"
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN_OR_SUITE", help=what)
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="(default report.html)")


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    from diffrl.benchmarks.report import write
    from diffrl.log import console

    path = write(options.sources, options.out)
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
