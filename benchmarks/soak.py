"""Does a run survive? It is killed at random moments, resumed, and held against one that was left alone.

    python -m diffrl.benchmarks.soak --kills 1200 --json

Each kill is a SIGKILL at a moment drawn uniformly from the time that a run takes, so that some hit a save;
after it the same command goes on. A run that has come to its end must have the same metrics, weights and
optimiser state, to the bit; then the next one begins.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from diffrl import checkpoint, config
from diffrl.benchmarks import forks
from diffrl.benchmarks.provenance import provenance
from diffrl.errors import DiffRLError
from diffrl.log import METRICS_FILE, console, progress
from diffrl.train import train
from diffrl.weights import CONTROL_FILE, LORA_FILE

RUN = [
    "env=gaussian_mixture",
    "env.num_steps=4",
    "algo.updates=12",
    "algo.batch_size=16",
    "algo.micro_batch_size=8",
]
"""A run of a second or two; words on the command line are added."""


def soak(kills: int, words: list[str], root: Path, seed: int) -> dict[str, Any]:
    """Return how many runs came to their end after so many `kills`, and what differed in which.

    Args:
        kills: of processes that were still training.
        words: settings of the run.
        root: of the runs.
        seed: of the moments.
    """
    moments = random.Random(seed)
    context = forks.server()

    def start(name: str) -> Any:
        process = context.Process(target=_train, args=([*words, f"root={root}", f"name={name}"],))
        process.start()
        return process

    start("first").join()  # fits the solvable model's denoiser, if it must
    begin = time.perf_counter()
    alone = start("alone")
    alone.join()
    seconds = time.perf_counter() - begin
    if alone.exitcode:
        why = (root / "alone.log").read_text().strip().splitlines()[-1]
        raise DiffRLError(f"{' '.join(words)}: fails without being killed ({why})")
    done, finished = 0, 0
    wrong: dict[str, str] = {}
    with progress("kills", kills) as bar:
        while done < kills:
            process = start(f"run-{finished}")
            process.join(moments.uniform(0, seconds))
            if process.exitcode is None:
                process.kill()
                process.join()
                done += 1
                bar.advance(note=f"{finished} runs at their end")
            else:
                wrong |= _judged(process.exitcode, root / f"run-{finished}", root / "alone")
                finished += 1
    last = start(f"run-{finished}")
    last.join()
    wrong |= _judged(last.exitcode, root / f"run-{finished}", root / "alone")
    return {"kills": done, "runs": finished + 1, "failures": len(wrong), "wrong": wrong, "words": words}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return every metric of a run but the times, which are the machine's."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    timed = {name for line in lines for name in line if name.startswith("time/") or "seconds" in name}
    return [{name: line[name] for name in line.keys() - timed} for line in lines]


def bits(folder: Path) -> dict[str, bytes]:
    """Return the weights of a run, and all tensors of its last checkpoint."""
    last = next(checkpoint.newest_first(folder / "checkpoints"))
    files = [folder / LORA_FILE, folder / CONTROL_FILE, last / "tensors.safetensors"]
    return {path.name: path.read_bytes() for path in files}


def _judged(exitcode: int, run: Path, alone: Path) -> dict[str, str]:
    if exitcode:
        return {run.name: f"exit code {exitcode}; see {run}.log"}
    if numbers(run) != numbers(alone):
        return {run.name: "other metrics"}
    others = [name for name, content in bits(alone).items() if bits(run)[name] != content]
    return {run.name: f"other {', '.join(others)}"} if others else {}


def _train(words: list[str]) -> None:
    place = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    with Path(place["root"], f"{place['name']}.log").open("a") as log:
        sys.stdout = sys.stderr = console.file = log
        train(config.load([*words, "resume=auto", "checkpoint_every=1"]))


def main() -> int:
    """Soak, print the result, and return the exit code: 0, 1 if a run differs, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="diffrl.benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="further settings, such as algo=ddpo")
    parser.add_argument("--kills", type=int, default=100, help="(default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write it to this file")
    options = parser.parse_intermixed_args()
    begin = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = soak(options.kills, [*RUN, *options.words], Path(folder), options.seed)
    except DiffRLError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    result |= {"minutes": (time.perf_counter() - begin) / 60} | provenance()
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    else:
        kills, runs, failures = (result[name] for name in ("kills", "runs", "failures"))
        said = f"{kills} kills, {runs} runs came to their end, {failures} failed"
        console.print("\n".join([said, *(f"{name}: {why}" for name, why in result["wrong"].items())]))
    return int(result["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
