"""A run's numbers and its last grid, as the pages show them: `python -m diffrl.benchmarks.record RUN NAME`.

It writes NAME.json and NAME.png to benchmarks/results/ (`--out`), where `benchmarks.readme` finds them:

    diffrl train name=mine && python -m diffrl.benchmarks.record runs/mine emoji-ctrl-seed0
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffrl import settings_file
from diffrl.benchmarks.provenance import provenance
from diffrl.errors import DiffRLError
from diffrl.log import evaluations
from diffrl.restore import measure, restore, settings_of


def record(run: Path, name: str, out: Path, *, num_pictures: int = 512, command: str | None = None) -> Path:
    """Measure a finished run as `diffrl eval` does, and write its numbers and its last grid.

    Args:
        run: its folder.
        name: of both files.
        out: their folder.
        num_pictures: to measure.
        command: that trained it, if there is a shorter one than all settings that are no defaults.

    Returns:
        The file of numbers.

    Raises:
        DiffRLError: no such run, or one without a picture.
    """
    grids = sorted((run / "pictures").glob("grid-*.png"))
    setup, policy, reward = restore(run, {})
    if not grids:
        raise DiffRLError(f"{run}: no grid in {run / 'pictures'}; let the run come to its end.")
    trained = command or settings_file.command(settings_of(run), here=False)
    found: dict[str, Any] = {"command": f"{trained}; diffrl eval RUN --json -n {num_pictures}"}
    found |= provenance() | {"minutes": [*evaluations(run)][-1]["spent/seconds"] / 60}
    found |= measure(setup, policy, reward, num_pictures)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(grids[-1], out / f"{name}.png")
    file = out / f"{name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a run, and return the exit code: 0, or 2 for a mistake in what was asked."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.record", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="of the two files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="their folder")
    parser.add_argument("-n", type=int, default=512, help="pictures to measure (default 512)")
    parser.add_argument("--command", help="that trained the run (default: its settings)")
    asked = parser.parse_args(arguments)
    try:
        print(record(asked.run, asked.name, asked.out, num_pictures=asked.n, command=asked.command))
    except DiffRLError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
