"""Check that env, algorithm, reward and precision are numerically sound."""

import argparse
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for 'train'")


def run(options: argparse.Namespace) -> None:
    """Print each check with its value; exit with 1 if one is not sound."""
    from rich.markup import escape
    from rich.table import Table

    from diffrl import config
    from diffrl.doctor import examine
    from diffrl.log import console

    findings = examine(config.load(options.words))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "check", "found"):
        table.add_column(heading)
    marks = {True: "[green]ok[/]", False: "[bold red]bad[/]", None: "[dim]-[/]"}
    for finding in findings:
        table.add_row(marks[finding.sound], finding.check, finding.value)
    console.print(table)
    bad = [finding for finding in findings if finding.sound is False]
    for finding in bad:
        console.print(f"[bold red]{finding.check}[/]: {escape(finding.advice)}")
    if bad:
        sys.exit(1)
