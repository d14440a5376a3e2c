"""The model that `eval` and `sample` are about: a run, or the pretrained one with settings."""

import argparse
from pathlib import Path
from typing import Any

from diffrl.errors import DiffRLError

WORDS = "a folder of 'diffrl train' and guidance=..., or settings of the pretrained model"


def load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return setup, policy and reward of a run, or of the pretrained model with these settings."""
    from diffrl import config
    from diffrl.build import Setup
    from diffrl.restore import pretrained, restore

    folder, words = run_folder(options.words), options.words
    prompts = getattr(options, "prompts", None)
    if folder is None:
        words = ["algo=none", *words, *([f"eval_prompts={prompts}"] if prompts else [])]
        setup = Setup(config.load(words))
        policy, reward = pretrained(setup)
    else:
        overrides: dict[str, Any] = {"eval_prompts": prompts} if prompts else {}
        if guided := words[1:]:
            for word in guided:
                if not word.startswith(("guidance", "clip=", "eval_batch=")):
                    raise DiffRLError(
                        f"{word}: {folder} was trained with settings of its own; give guidance=..."
                    )
            asked = config.load(guided)
            named = {config.key_of(word).partition(".")[0] for word in guided}
            overrides |= {name: getattr(asked, name) for name in named}  # the run's own stay
        setup, policy, reward = restore(folder, overrides)
    policy.control_scale = options.control_scale
    return setup, policy, reward


def run_folder(words: list[str]) -> Path | None:
    """Return the folder among the words of 'eval' and 'sample', the first, if it is one."""
    if not words:
        raise DiffRLError("give the folder of a run, or settings such as env=emoji guidance=svdd.")
    return None if "=" in words[0] else Path(words[0])
