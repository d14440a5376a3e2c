"""Measure a run: accuracy by the true measure, KL, cost."""

import argparse
import json

from diffrl.commands.chosen_model import WORDS, load
from diffrl.errors import DiffRLError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", nargs="*", metavar="RUN | key=value", help=WORDS)
    parser.add_argument("-n", type=int, default=512, help="pictures (default 512)")
    parser.add_argument("--seed", type=int, default=42, help="of noise and prompts (default 42)")
    parser.add_argument("--prompts", help="a list or file to take instead of the run's")
    parser.add_argument("--control-scale", type=float, default=1.0, help="strength (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    from diffrl import memory
    from diffrl.evaluate_mixture import table
    from diffrl.log import console
    from diffrl.restore import measure
    from diffrl.rewards.closed_form import ClosedForm
    from diffrl.tables import show

    if options.n < 1:
        raise DiffRLError(f"-n {options.n}: must be 1 or more.")
    setup, policy, reward = load(options)
    with memory.told("eval_batch", setup.config.eval_batch):
        measures = measure(setup, policy, reward, options.n, options.seed)
    if options.json:
        print(json.dumps(measures))
    elif isinstance(reward, ClosedForm):
        console.print(table(measures))
    else:
        show(measures, reward)
