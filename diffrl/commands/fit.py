"""Fit and calibrate a learned reward alone."""

import argparse
from pathlib import Path

from diffrl.errors import DiffRLError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, such as dataset=FOLDER")
    parser.add_argument("--out", type=Path, help="also write the classifier to this file")


def run(options: argparse.Namespace) -> None:
    """Fit, print the report, and write the classifier if asked."""
    from diffrl import config
    from diffrl.build import Setup
    from diffrl.conflicts import is_learned
    from diffrl.learned import make_reward
    from diffrl.log import console
    from diffrl.restore import describe
    from diffrl.rewards.log_likelihood import LogLikelihood

    settings = config.load(options.words)
    if not is_learned(settings.reward):
        raise DiffRLError(
            f"reward={config.chosen(settings, 'reward')}: a black box, there is nothing to fit. "
            "Use reward=compressibility."
        )
    setup = Setup(settings)
    reward = make_reward(setup, setup.make_policy(setup.num_classes()))
    assert isinstance(reward, LogLikelihood)
    console.print(describe(reward))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        reward.save(options.out)
        console.print(f"wrote {options.out}; use it with reward.classifier={options.out}")
