"""Prompt lists.

Sources: DDPO's `simple_animals.txt` (45 words) and CTRL's evaluation words (8, of which 6 are among the
45), the bare word each. The held-out words are in neither list, and the emoji model knows them: for tuning.
"""

from pathlib import Path

from diffrl.errors import DiffRLError, unknown

_SIMPLE_ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee
pig turkey fly llama camel bat gorilla hedgehog kangaroo
"""
_EVAL_ANIMALS = "cat dog horse monkey rabbit butterfly peacock panda"
_HELD_OUT_ANIMALS = "penguin owl elephant koala giraffe snail octopus crocodile"

LISTS: dict[str, tuple[str, ...]] = {
    "simple_animals": tuple(_SIMPLE_ANIMALS.split()),
    "eval_animals": tuple(_EVAL_ANIMALS.split()),
    "held_out_animals": tuple(_HELD_OUT_ANIMALS.split()),
    "none": ("",),
}


def load_prompts(name: str) -> list[str]:
    """Return a list by name, or the lines of a text file, one prompt each.

    Raises:
        DiffRLError: neither a known name nor a readable file, or a file without a prompt.
    """
    if name in LISTS:
        return list(LISTS[name])
    path = Path(name)
    if path.suffix != ".txt" and not path.exists():
        raise unknown("prompts", name, [*LISTS, "path.txt"])
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DiffRLError(
            f"prompts={name}: cannot be read ({reason}). Give a text file with one prompt per line, or "
            f"one of {', '.join(sorted(LISTS))}."
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise DiffRLError(f"prompts={name}: no prompt in it. Write one per line.")
    return prompts
