"""Prompt lists, some of whose prompts come with a label.

Sources: DDPO's `simple_animals.txt` (45 words) and CTRL's evaluation words (8, of which 6 are among the
45), the bare word each. The held-out words are in neither list, and the emoji model knows them: for tuning.
The ImageNet animals, DDPO's 398, are the first classes of ILSVRC-2012, from a file that the user has.
"""

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path

from diffrl.errors import DiffRLError, unknown
from diffrl.rows import PROMPT, read_rows

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

_IMAGENET = ("imagenet_animals", "imagenet_animals_full")
_NUM_IMAGENET_ANIMALS = 398  # DDPO: classes 0, tench, to 397, puffer


class LabelledPrompt(str):
    """A prompt that comes with its own label y: an env asks for the two together."""

    label: tuple[int, ...]


def split_path(name: str) -> tuple[str, Path | None]:
    """Return what stands before a file's path in `name`, and the path; of a list the name, and None."""
    if name in LISTS:
        return name, None
    kind, colon, file = name.partition(":")
    return (f"{kind}:", Path(file)) if colon and kind in _IMAGENET and file else ("", Path(name))


def load_prompts(name: str, num_classes: Sequence[int] = ()) -> list[str]:
    """Return the prompts that `name` stands for.

    Args:
        name: a list's; or the path of a text file, one prompt a line; or that of a CSV with the columns
            `prompt` and, if its prompts come with labels, `label`; or `imagenet_animals:PATH`, with a file
            of ImageNet's classes: `imagenet_class_index.json`, other JSON with their names by number or
            in a list, `LOC_synset_mapping.txt`, or a line each in their order. It gives the first name of
            each; `imagenet_animals_full:PATH` all, as in DDPO.
        num_classes: of each attribute of a label.

    Raises:
        DiffRLError: neither a known name nor a readable file, a file without a prompt, a row whose label is
            unknown, a file that has not ImageNet's classes in their order.
    """
    kind, path = split_path(name)
    if path is None:
        return list(LISTS[name])
    if kind:
        return _imagenet_animals(path, full=kind == f"{_IMAGENET[1]}:")
    if path.suffix not in (".txt", ".csv") and not path.exists():
        raise unknown("prompts", name, [*LISTS, "path.txt", "path.csv", "imagenet_animals:path"])
    prompts = _labelled(path, num_classes) if path.suffix == ".csv" else _lines(path)
    if not prompts:
        raise DiffRLError(f"prompts={name}: no prompt in it. Write one per line.")
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DiffRLError(
            f"prompts={path}: cannot be read ({reason}). Give a text file with one prompt per line, or "
            f"one of {', '.join(sorted(LISTS))}."
        ) from error
    return [line for line in lines if line]


def _labelled(path: Path, num_classes: Sequence[int]) -> list[str]:
    prompts = []
    for row in read_rows(path):
        label = row.label(num_classes)
        prompt = row.get(*PROMPT)
        if not any(column in row.cells for column in PROMPT):
            raise DiffRLError(f"{row.where}: it has no 'prompt'. Name the columns in the first line.")
        if label is not None:
            prompt = LabelledPrompt(prompt)
            prompt.label = label
        prompts.append(prompt)
    return prompts


def _imagenet_animals(path: Path, *, full: bool) -> list[str]:
    lines = _lines(path)
    if path.suffix == ".json" or (lines[:1] and lines[0].startswith("{")):
        text = "".join(lines)
        try:
            index = json.loads(text) if path.suffix == ".json" else ast.literal_eval(text)
            if isinstance(index, dict):
                index = {int(number): entry for number, entry in index.items()}
                index = [index[number] for number in range(_NUM_IMAGENET_ANIMALS)]
            # imagenet_class_index.json has [synset, name]
            names = [entry if isinstance(entry, str) else entry[1] for entry in index]
            lines = [name.replace("_", " ") for name in names]
        except (ValueError, LookupError, TypeError, AttributeError, SyntaxError):
            lines = []
    names = [re.sub(r"^n\d{8}\s+", "", line) for line in lines[:_NUM_IMAGENET_ANIMALS]]
    first = [name.partition(",")[0].strip() for name in names]
    # the last goes by puffer, pufferfish and puffer fish
    if len(first) < _NUM_IMAGENET_ANIMALS or first[0] != "tench" or not first[-1].startswith("puffer"):
        raise DiffRLError(
            f"{path}: not ImageNet's classes in their order, where number 0 is tench and 397 puffer. Give "
            "imagenet_class_index.json, LOC_synset_mapping.txt, imagenet1000_clsidx_to_labels.txt, a JSON "
            "list of names, or a line for each class."
        )
    return names if full else first
