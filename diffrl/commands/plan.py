"""Predict a run's time and memory before it runs."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for 'train'")


def run(options: argparse.Namespace) -> None:
    """Print a line a stage, and the whole."""
    from rich.table import Table

    from diffrl import config
    from diffrl.log import console
    from diffrl.plan import plan

    stages = plan(config.load(options.words))
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    seconds = [stage.seconds for stage in stages]
    whole = "not timed" if None in seconds else _time(sum(s for s in seconds if s is not None))
    footers = {
        "stage": "whole run",
        "times": "",
        "network calls": f"{sum(stage.calls for stage in stages):,.0f}",
        "time": whole,
        "peak memory": f"{max(stage.memory for stage in stages) / 1e9:.2f} GB",
    }
    for heading, footer in footers.items():
        table.add_column(heading, footer, justify="left" if heading == "stage" else "right")
    for stage in stages:
        time = "not timed" if stage.seconds is None else _time(stage.seconds)
        row = (f"{stage.times:,.4g}", f"{stage.calls:,.0f}", time, f"{stage.memory / 1e9:.2f} GB")
        table.add_row(stage.name, *row)
    console.print(table)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {rest:02} s"
        if minutes
        else f"{seconds:.1f} s"
    )
