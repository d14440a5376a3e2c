"""Check that env, algorithm, reward and precision are numerically sound."""

import argparse
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for 'train'")


def run(options: argparse.Namespace) -> None:
    """Print each check with its value; exit with 1 if one is not sound."""
    from rich.table import Table

    from diffrl import config
    from diffrl.doctor import examine
    from diffrl.log import console

    findings = examine(config.load(options.words))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "check", "found"):
        table.add_column(heading)
    for finding in findings:
        mark = "[green]ok[/]" if finding.sound else "[bold red]bad[/]"
        table.add_row(mark, finding.check, finding.value)
    console.print(table)
    for finding in findings:
        if not finding.sound:
            console.print(f"[bold red]{finding.check}[/]: {finding.advice}")
    if not all(finding.sound for finding in findings):
        sys.exit(1)
