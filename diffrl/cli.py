"""The `diffrl` command. Its subcommands lie in `diffrl/commands`."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from diffrl import disk
from diffrl.envs.registration import register_envs
from diffrl.errors import DiffRLError

_COMMANDS = (
    "train", "plan", "fit", "doctor", "eval", "sample", "export", "demo", "compare", "report",
    "import-ctrl", "list", "completion",
)  # fmt: skip
_EPILOG = """\
settings are Hydra's key=value words, after any command that takes them:
  diffrl train                                      ctrl on the emoji model, in minutes, on a laptop
  diffrl train algo.gamma=5000 seed=1 name=strong   any setting by its name
  diffrl train +experiment=emoji_full               a preset; 'diffrl list' shows them
  diffrl train env=sd15 prompts=my_words.txt        Stable Diffusion v1.5, your prompts
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake in what was asked."""
    whole = parser()
    options, rest = whole.parse_known_args(argv)
    if options.command is None:
        whole.print_help()
        return 0
    try:
        if rest and not hasattr(options, "words"):
            raise DiffRLError(f"{rest[0]}: no such option of 'diffrl {options.command}'; see --help.")
        options.words = [*getattr(options, "words", []), *rest]
        _quieten()
        register_envs()
        with disk.told():
            options.run(options)
    except DiffRLError as error:
        print(f"diffrl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffrl: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="diffrl",
        description="RL fine-tuning of diffusion models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND")
    for name in _COMMANDS:
        command = importlib.import_module(f"diffrl.commands.{name.replace('-', '_')}")
        line = str(command.__doc__).partition("\n")[0].rstrip(".")
        subparser = subparsers.add_parser(
            name, help=line[0].lower() + line[1:], description=f"{line}.", conflict_handler="resolve"
        )
        subparser.set_defaults(run=command.run)
        command.arguments(subparser)
    return whole


def commands(whole: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    (action,) = (one for one in whole._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def _quieten() -> None:
    """Keep the libraries' advice (missing torchvision, progress of loading) off the screen."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
