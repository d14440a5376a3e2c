"""Train a policy; writes runs/NAME."""

import argparse
from pathlib import Path

from diffrl.errors import DiffRLError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    every = "train every combination of settings given with commas, through hydra/launcher=..."
    settings = "this, then every setting of what is chosen: 'diffrl train algo=ddpo env=sd15 --help'"
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings; see 'diffrl list'")
    parser.add_argument("-h", "--help", action="store_true", help=settings)
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument("-m", "--multirun", action="store_true", help=every)
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace) -> None:
    """Train, go on with a run, or sweep."""
    if options.help:
        options.parser.print_help()
        from diffrl import help

        help.show(options.words)
        return
    from diffrl import config, train

    if options.resume is not None:
        if options.multirun:
            raise DiffRLError(f"--resume {options.resume} -m: it is one run, not several.")
        train.resume(options.resume, options.words)
    elif options.multirun:
        config.sweep(options.words, train.train)
    else:
        train.train(config.load(options.words))
