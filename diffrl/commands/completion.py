"""Print the script that completes commands, options and choices in a shell.

It is made once and asks nothing of Python afterwards: a key press is answered at once.
"""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("shell", choices=("bash", "zsh"), help='for its start-up file: eval "$(...)"')


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    from diffrl import cli, config

    words = [f"{group}={name}" for group, known in config.GROUPS.items() for name in known]
    words += [f"+experiment={name}" for name in config.experiments()]
    whole = cli.parser()
    for command in cli.commands(whole).values():
        for action in command._actions:
            if "key=value" in str(action.metavar):
                action.choices = words
    print(shtab.complete(whole, options.shell))
    # bash would take algo=ddpo for three words, zsh does not find the function of a script that is eval'ed
    print(
        {"bash": "COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}", "zsh": "compdef _shtab_diffrl diffrl"}[
            options.shell
        ]
    )
