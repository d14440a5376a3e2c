"""Speed against TRL: `python -m diffrl.benchmarks.peers --python VENV/bin/python`.

TRL 0.22.2 is the last release with both `DDPOTrainer` and `AlignPropTrainer`; it wants an environment of
its own: `pip install trl==0.22.2 "transformers<5" "diffusers<0.36" peft pillow torch==2.13.0`. Both sides
take the same update of the same emoji checkpoint (batch, steps, guidance, LoRA, reward), by turns, each in
a process of its own, and so does the floor: our update's network calls alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from diffrl.benchmarks.provenance import provenance
from diffrl.envs.emoji import ASSET
from diffrl.envs.prompts import load_prompts
from diffrl.log import print_wide

HERE = Path(__file__).resolve().parent
METHODS = {"ddpo": 0.0, "alignprop, last half": 0.5, "alignprop, full": 0.0}
"""What is compared, and the share of the chain that carries no gradient."""


class Worker:
    """A process that takes one update when asked."""

    def __init__(self, python: str, script: str, task: dict[str, Any]) -> None:
        self.command = [python, str(HERE / script), json.dumps(task)]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while self._line() != "ready":
            pass

    def ask(self, what: str = "update") -> float:
        """Return the seconds of one update, or of "floor"."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return float(json.loads(self._line())["seconds"])

    def close(self) -> float:
        """End the process and return its peak memory, MB."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = float(json.loads(self._line())["peak_mb"])
        self.process.wait()
        return peak

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.command[1]} stopped; run by hand, it says why: {self.command}")
        return line.strip()


def measure(method: str, python: str, rounds: int, task: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and memory of both sides and of the floor, medians over the rounds."""
    ours, theirs = Worker(sys.executable, "our_worker.py", task), Worker(python, "trl_worker.py", task)
    taken: dict[str, list[float]] = {"ours": [], "trl": [], "floor": []}
    for number in range(rounds + 1):
        measured = {"ours": ours.ask(), "trl": theirs.ask(), "floor": ours.ask("floor")}
        if number:  # the first one warms up
            for name, seconds in measured.items():
                taken[name].append(seconds)
    ratio = {
        "faster_than_trl": [t / o for t, o in zip(taken["trl"], taken["ours"], strict=True)],
        "over_floor": [o / f for o, f in zip(taken["ours"], taken["floor"], strict=True)],
    }
    return {
        "method": method,
        "seconds_per_image": {k: statistics.median(v) / task["batch"] for k, v in taken.items()},
        "peak_mb": {"ours": ours.close(), "trl": theirs.close()},
        **{name: statistics.median(values) for name, values in ratio.items()},
        "rounds": taken,
    }


def main() -> None:
    """Read the command line, measure every method, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.peers", description=__doc__)
    parser.add_argument("--python", required=True, help="the interpreter that has TRL")
    parser.add_argument("--rounds", type=int, default=7, help="updates of each side (default 7)")
    parser.add_argument("--steps", type=int, default=20, help="T (default 20)")
    parser.add_argument("--batch", type=int, default=16, help="pictures an update (default 16)")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale (default 5)")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    options = parser.parse_args()
    results = []
    for method, share in METHODS.items():
        task = {
            "method": method.split(",")[0],
            "cut": int(share * options.steps),
            "model": str(ASSET),
            "prompts": load_prompts("simple_animals"),
            "threads": os.cpu_count() or 1,
        } | {name: getattr(options, name) for name in ("steps", "batch", "guidance")}
        results.append(measure(method, options.python, options.rounds, task))
    table = Table(box=box.MARKDOWN)
    for heading in (
        "update",
        "TRL / ours",
        "ours / network alone",
        "ours, s a picture",
        "TRL",
        "ours, MB",
        "TRL, MB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        seconds, peak = result["seconds_per_image"], result["peak_mb"]
        table.add_row(
            result["method"],
            *(f"{result[name]:.2f}" for name in ("faster_than_trl", "over_floor")),
            *(f"{seconds[name]:.3f}" for name in ("ours", "trl")),
            *(f"{peak[name]:.0f}" for name in ("ours", "trl")),
        )
    print_wide(table)
    if options.out:
        asked = {name: getattr(options, name) for name in ("rounds", "steps", "batch", "guidance")}
        options.out.write_text(json.dumps(asked | provenance() | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
