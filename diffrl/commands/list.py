"""Show what can be chosen: algorithms, envs, rewards, presets, suites, prompt lists."""

import argparse
from collections.abc import Iterator, Sequence

from diffrl.errors import DiffRLError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Take nothing."""


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from rich.markup import escape
    from rich.table import Table

    from diffrl import config
    from diffrl.benchmarks.suites import suites
    from diffrl.envs.prompts import LISTS
    from diffrl.log import console

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("choice", no_wrap=True)
    table.add_column("what it is")
    for group, known in config.GROUPS.items():
        for name, kind in known.items():
            table.add_row(f"{group}={name}", escape((kind.__doc__ or "").splitlines()[0]))
        for name, line in _installed(group):
            table.add_row(f"{group}={name}", escape(line))
    table.add_row("reward=FILE.py:NAME", "A function (images, context) -> [N] of yours, or a class.")
    table.add_row("reward=\\[NAME,...]", "Several rewards, weighed by reward.weights=[1,...].")
    table.add_row("reward=surrogate\\[NAME]", "A differentiable stand-in that learns another reward.")
    table.add_row("algo=FILE.py:NAME", "An algorithm of yours, a class.")
    table.add_row("env=FILE.py:NAME", "The settings of an env of yours, a class.")
    for name, line in config.experiments().items():
        table.add_row(f"+experiment={name}", line)
    for name, path in suites().items():
        table.add_row(f"suite={name}", path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    for name, words in LISTS.items():
        table.add_row(f"prompts={name}", _words(words))
    table.add_row("prompts=PATH.txt", "one prompt per line")
    table.add_row("prompts=PATH.csv", "the column prompt and, if they come with labels, label")
    table.add_row("prompts=imagenet_animals:PATH", "ImageNet's 398 animals, from a file of its classes")
    console.print(table)


def _words(words: Sequence[str]) -> str:
    if not any(words):
        return "the empty prompt alone"
    return f"{len(words)} words: {', '.join(words[:5])}" + (", ..." if len(words) > 5 else "")


def _installed(group: str) -> Iterator[tuple[str, str]]:
    """Yield name and first line of what installed packages add to a group, or why it cannot be had."""
    from diffrl.components import component, installed

    for name in installed(group):
        try:
            yield name, str(component(group, name).__doc__).splitlines()[0]
        except DiffRLError as error:
            yield name, str(error)
