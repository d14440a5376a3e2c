"""Make a run of a checkpoint that CTRL's authors have published."""

import argparse
import shlex
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    what = "with pytorch_lora_weights and class_embedding.pth"
    chosen = "reward.classifier=PATH.pth, and others over +experiment=ctrl_paper"
    parser.add_argument("source", type=Path, metavar="DIR", help=what)
    parser.add_argument("words", nargs="*", metavar="key=value", help=chosen)


def run(options: argparse.Namespace) -> None:
    """Write the run's folder."""
    from diffrl.import_ctrl import import_checkpoint
    from diffrl.log import console

    folder = import_checkpoint(options.source, options.words)
    console.print(f"[bold]{folder}[/]: next, diffrl eval {shlex.quote(str(folder))}")
