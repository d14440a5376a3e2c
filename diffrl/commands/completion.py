"""Print the script that completes commands, options, choices and settings in a shell.

It is made once and asks nothing of Python afterwards: a key press is answered at once.
"""

import argparse

# bash would take algo=ddpo for three words, and set a blank behind the = of a setting
_BASH = """\
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
_diffrl() {
  _shtab_diffrl
  if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o filenames -F _diffrl diffrl"""

# zsh does not find the function of a script that is eval'ed
_ZSH = "compdef _shtab_diffrl diffrl"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("shell", choices=("bash", "zsh"), help='for its start-up file: eval "$(...)"')


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    from dataclasses import fields

    import shtab

    from diffrl import cli, config
    from diffrl.policy import LoRA

    words = [f"{group}={name}" for group, known in config.GROUPS.items() for name in known]
    words += [f"+experiment={name}" for name in config.experiments()]
    parts: dict[str, list[type]] = {"": [config.Config], "policy.": [LoRA]}
    parts |= {f"{group}.": list(known.values()) for group, known in config.GROUPS.items()}
    settings = [
        f"{part}{one.name}=" for part, kinds in parts.items() for kind in kinds for one in fields(kind)
    ]
    words += [word for word in dict.fromkeys(settings) if word[:-1] not in (*config.GROUPS, "policy")]
    whole = cli.parser()
    for command in cli.commands(whole).values():
        for action in command._actions:
            if "key=value" in str(action.metavar):
                action.choices = words
    print(shtab.complete(whole, options.shell))
    print(_BASH if options.shell == "bash" else _ZSH)
