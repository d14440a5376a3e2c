"""Draw pictures with a run's policy."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from diffrl.commands.chosen_model import WORDS, load, run_folder
from diffrl.errors import DiffRLError

_LONGEST = 80  # bytes of a prompt in a file's name, which holds a label and a number too, 255 in all


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", nargs="*", metavar="RUN | key=value", help=WORDS)
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--label", default="", help="the control, such as 3, or 1,0 of two (default: none)")
    parser.add_argument("-n", type=int, default=8, help="pictures (default 8)")
    parser.add_argument("--control-scale", type=float, default=1.0, help="strength (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", type=Path, help="folder to write to (default RUN/samples, or samples)")


def run(options: argparse.Namespace) -> None:
    """Draw, write a picture each and their grid."""
    import torch
    from PIL import Image

    from diffrl import memory
    from diffrl.algorithms.guidance.base import Unguided
    from diffrl.draw import draw
    from diffrl.evaluate import label_name, measures_of
    from diffrl.log import console, grid
    from diffrl.rewards.closed_form import ClosedForm
    from diffrl.rewards.log_likelihood import LogLikelihood
    from diffrl.types import NO_LABEL, to_pixels

    if options.n < 1:
        raise DiffRLError(f"-n {options.n}: must be 1 or more.")
    setup, policy, reward = load(options)
    if isinstance(reward, ClosedForm):
        raise DiffRLError(f"{options.words[0]}: its model draws points, not pictures; use 'diffrl eval'.")
    label = _label(options.label, len(reward.num_classes))
    asked = any(y != NO_LABEL for y in label.tolist())
    if not asked and reward.num_classes and not isinstance(setup.config.guidance, Unguided):
        raise DiffRLError("no --label: guidance asks for a label, or it has nothing to go by.")
    actor = setup.guide(policy, reward, options.n)
    with memory.told("-n", options.n):
        images = draw(actor, options.prompt, label, options.seed)
    folder = options.out or (run_folder(options.words) or Path()) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(options.prompt)
    stem += f"-label{label_name(label)}" if len(label) else ""
    for number, pixels in enumerate(to_pixels(images)):
        Image.fromarray(pixels).save(folder / f"{stem}-{number:02d}.png")
    across = 8
    rows = list(images.split(across))
    rows[-1] = torch.cat([rows[-1], rows[-1].new_ones(len(rows[0]) - len(rows[-1]), *rows[0].shape[1:])])
    grid(rows, [""] * len(rows)).save(folder / f"{stem}.png")
    of_class = ""
    if asked and isinstance(reward, LogLikelihood):
        hits = int((reward.true_class(images) == label).all(1).sum())
        of_class = f", {hits} of true class {label_name(label)}"
    spans = []
    for measure in measures_of(reward):
        values = measure.of(images).tolist()
        spans.append(f"{min(values):.2f} to {max(values):.2f} {measure.unit or measure.title}")
    console.print(f"{folder / stem}.png: {options.n} pictures, {', '.join(spans)}{of_class}")


def _stem(prompt: str) -> str:
    """Return what the names of a prompt's pictures begin with: of a long one its begin and a hash."""
    name = prompt.replace(" ", "-").replace("/", "-")
    if len(name.encode()) > _LONGEST:
        begin = name.encode()[:_LONGEST].decode(errors="ignore")
        name = f"{begin}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return name or "empty"


def _label(text: str, attributes: int) -> Any:
    """Return the label that `--label` asks for, `[attributes]`; NO_LABEL throughout if it is empty."""
    import torch

    from diffrl.types import NO_LABEL

    if not text:
        return torch.full((attributes,), NO_LABEL)
    if not attributes:
        raise DiffRLError(f"--label {text}: this run has no labels, its reward has no classes.")
    numbers = text.split(",")
    if len(numbers) != attributes or not all(number.lstrip("-").isdecimal() for number in numbers):
        example = ",".join("0" * attributes)
        raise DiffRLError(f"--label {text}: not {attributes} number(s); give them as --label {example}.")
    return torch.tensor([int(number) for number in numbers])
