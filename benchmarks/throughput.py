"""Pictures a second and peak memory of every way to train: `python -m diffrl.benchmarks.throughput`.

    python -m diffrl.benchmarks.throughput env=sd15 --random-weights --precision bf16 --out throughput.json
    python -m diffrl.benchmarks.throughput env=emoji --quick

Words are settings, as for `diffrl train`: `algo` names the algorithm whose growth with the micro-batch and
with T is measured, and `algo.` settings go to its rows alone. A row has the published numbers, except that
its batch is one micro-batch; CTRL as a plain loop is measured in the same run. Rewards are not fitted: they
cost the same without. Every measurement is a process of its own; one that runs out of memory says so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from diffrl import config
from diffrl.backbones.stable_diffusion import PRECISIONS
from diffrl.benchmarks.cost import OUT_OF_MEMORY
from diffrl.benchmarks.provenance import provenance
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError, unknown
from diffrl.log import console, print_wide

FULL = ["+experiment=ctrl_paper", "algo.truncation.kind=fixed"]
TRUNCATED = ["+experiment=ctrl_paper", "algo.truncation.high={steps}"]
BLACK_BOX = ["+experiment=ddpo_pytorch", "algo.minibatches=1"]
ROWS: dict[str, list[str]] = {
    "sampling": BLACK_BOX,
    "ctrl": ["algo=ctrl", "env.guidance_scale=7.5", "policy.rank=4"],
    "ctrl, full": FULL,
    "ctrl, truncated": TRUNCATED,
    "ddpo": BLACK_BOX,
    "rwr": ["+experiment=rwr_paper"],
    "plain ctrl, full": FULL,
    "plain ctrl, truncated": TRUNCATED,
    "plain ctrl, truncated, tf32": [*TRUNCATED, "env.precision=tf32"],
}
"""Each one's settings; `ctrl` is this toolkit's default, "truncated" the published random truncation."""

_PUBLISHED = {"ctrl": "ctrl, truncated"}  # of a default that is another update than any plain loop's

_SCALED = {"ctrl": "ctrl, full", "ddpo": "ddpo", "rwr": "rwr"}
_OWN = ("experiment", "reward", "env.num_steps", "algo.batch_size", "algo.micro_batch_size")
_FULL_WIDTH = ["env=sd15", "env.random_weights=true"]
# glibc keeps freed pages, more of them the longer the chain: without these the peak is its cache, not ours
_RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
Record = dict[str, Any]
"""What is known of a cell: itself, what `cost.measure` returns, and what follows from that."""


class Cell(NamedTuple):
    """One measurement."""

    row: str
    steps: int
    micro_batch: int


def settings(cell: Cell, words: Sequence[str] = ()) -> list[str]:
    """Return the words a cell is measured with: its row's, then the user's `words` that are about it.

    Raises:
        DiffRLError: a word that the benchmark sets itself.
    """
    for word in words:
        if config.key_of(word) in _OWN:
            raise DiffRLError(
                f"{word}: the benchmark sets {config.key_of(word)} itself; see --help for its options."
            )
        if config.key_of(word) == "env" and not issubclass(config.GROUPS["env"].get(word[4:], SD15), SD15):
            raise DiffRLError(f"{word}: no network whose speed is of interest. Use env=emoji or env=sd15.")
    chosen = _algorithm(words)
    own = cell.row == chosen or cell.row.removeprefix("plain ").startswith(f"{chosen},")
    batch = [f"algo.{name}={cell.micro_batch}" for name in ("batch_size", "micro_batch_size")]
    row = [word.format(steps=cell.steps) for word in ROWS[cell.row]]
    asked = [
        word
        for word in words
        if config.key_of(word) != "algo" and (own or not config.key_of(word).startswith("algo."))
    ]
    if cell.row.endswith("tf32"):
        asked = [word for word in asked if config.key_of(word) != "env.precision"]
    before = ["env=emoji", "env.checkpointing=true", f"env.num_steps={cell.steps}", *batch]
    words = list({config.key_of(word): word for word in (*before, *row, *asked)}.values())
    return words[::-1]  # a mistake is told by the first word it could be about


def run(cell: Cell, words: list[str], rounds: int) -> Record:
    """Return the record of a cell, measured in a process of its own.

    On a CPU in two: one whose peak is what it needs, and one with the usual allocator, for the time.
    """
    words = settings(cell, words)
    on_cpu = config.load(words).device == "cpu" or not torch.cuda.is_available()
    record: Record = cell._asdict() | _measured(cell, words, 1 if on_cpu else rounds, freeing=on_cpu)
    if on_cpu and rounds > 1 and "seconds" in record:
        timed = _measured(cell, words, rounds)
        record |= {name: timed[name] for name in ("seconds", "matmul_flops") if name in timed}
    if "seconds" in record:
        seconds = statistics.median(record["seconds"])
        record["pictures_per_second"] = cell.micro_batch / seconds
        record["flops_per_second"] = record["pictures_per_second"] * record["flops"]
    return record


def _measured(cell: Cell, words: list[str], rounds: int, *, freeing: bool = False) -> Record:
    command = [sys.executable, "-m", "diffrl.benchmarks.cost", json.dumps([cell.row, words, rounds])]
    environment = os.environ | (_RETURN_FREED_MEMORY if freeing else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == -9:  # by the kernel, when memory is out
        return OUT_OF_MEMORY
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run_all(cells: Sequence[Cell], words: list[str], rounds: int) -> list[Record]:
    """Return the records of all cells, in their order; none larger than one that did not fit is tried."""
    for cell in cells:
        config.load(settings(cell, words))  # every mistake shows before an hour of measuring
    records: list[Record] = []
    for cell in cells:
        console.print(f"{cell.row}, T={cell.steps}, micro-batch {cell.micro_batch}")
        hopeless = any(
            "out_of_memory" in record
            and (record["row"], record["steps"]) == cell[:2]
            and record["micro_batch"] < cell.micro_batch
            for record in records
        )
        records.append(cell._asdict() | OUT_OF_MEMORY if hopeless else run(cell, words, rounds))
    return compared(records)


def compared(records: list[Record]) -> list[Record]:
    """Return the records with their share of the measured peak, and their ratios to their plain loops.

    That of `ctrl`, the default, is to the plain loop of the published update.
    """
    fastest = max((record.get("matmul_flops", 0.0) for record in records), default=0.0)
    known = {Cell(*(record[name] for name in Cell._fields)): record for record in records}
    for cell, record in known.items():
        if "seconds" not in record:
            continue
        record["share_of_peak"] = record["flops_per_second"] / fastest
        row = _PUBLISHED.get(cell.row, cell.row)
        for name in (f"plain {row}", f"plain {row}, tf32"):
            plain = known.get(cell._replace(row=name), {})
            if "seconds" in plain:
                record[f"faster than {name}"] = record["pictures_per_second"] / plain["pictures_per_second"]
                record[f"memory of {name}"] = record["peak_gb"] / plain["peak_gb"]
    return records


def table(records: Sequence[Record], title: str, heading: str, field: str) -> Table:
    """Return a line a record; `field` tells them apart."""
    shown = Table(title=title, box=box.MARKDOWN)
    shown.add_column(heading, no_wrap=True)
    columns = (
        "pictures/s",
        "s a picture",
        "peak GB",
        "at rest",
        "network calls",
        "TFLOP",
        "of matmul peak",
    )
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for record in records:
        if "seconds" not in record:
            why = "out of memory" if "out_of_memory" in record else record["failed"]
            shown.add_row(str(record[field]), why)
            continue
        rate = record["pictures_per_second"]
        shown.add_row(
            str(record[field]),
            *(f"{value:.3g}" for value in (rate, 1 / rate)),
            *(f"{record[name]:.2f}" for name in ("peak_gb", "held_gb")),
            f"{record['network_calls']:,.0f}",
            f"{record['flops'] / 1e12:.3g}",
            f"{record['share_of_peak']:.0%}",
        )
    return shown


def show(records: list[Record], cells: dict[str, list[Cell]]) -> None:
    """Print a table for each group of `cells`, and the ratios to the plain loops."""
    known = {Cell(*(record[name] for name in Cell._fields)): record for record in records}
    for (title, group), field in zip(cells.items(), ("row", "micro_batch", "steps"), strict=False):
        if group:
            print_wide(table([known[cell] for cell in group], title, field.replace("_", "-"), field))
    for record in records:
        other = ""
        if record["row"] in _PUBLISHED:
            other = ", by another update, our default against the published one"
        for name in (name for name in record if name.startswith("faster than ")):
            plain = name.removeprefix("faster than ")
            memory = record[f"memory of {plain}"]
            console.print(
                f"{record['row']}: {record[name]:.2f} x the pictures a second of {plain!r}, "
                f"{memory:.2f} x its memory{other}"
            )
    fastest = max((record.get("matmul_flops", 0.0) for record in records), default=0.0)
    console.print(f"measured peak of a matrix product: {fastest / 1e12:.3g} TFLOP/s")


def plan(options: argparse.Namespace) -> dict[str, list[Cell]]:
    """Return the cells of each table, by its title.

    Raises:
        DiffRLError: a row or algorithm that is not known.
    """
    for row in options.rows:
        if row not in ROWS:
            raise unknown("row", row, ROWS)
    steps, micro_batch, algo = options.steps, options.micro_batch, _algorithm(options.words)
    if algo not in _SCALED:
        raise unknown("algo", algo, _SCALED)
    groups = {
        f"T={steps}, micro-batch {micro_batch}": [Cell(row, steps, micro_batch) for row in options.rows]
    }
    if options.scaling:
        row = _SCALED[algo]
        groups[f"{row}, T={steps}"] = [Cell(row, steps, count) for count in options.micro_batches]
        groups[f"{row}, micro-batch {micro_batch}"] = [
            Cell(row, count, micro_batch) for count in options.all_steps
        ]
    return groups


def _algorithm(words: Sequence[str]) -> str:
    return next((word.partition("=")[2] for word in words if config.key_of(word) == "algo"), "ctrl")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diffrl.benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="key=value", help="settings, such as env=sd15 (default env=emoji)")
    add("--random-weights", action="store_true", help="the architecture alone, nothing is downloaded")
    add("--precision", choices=tuple(PRECISIONS), help="of the network (default: the env's)")
    add("--steps", type=int, help="T (default 50; quick 4)")
    add("--micro-batch", type=int, help="pictures at a time (default 4; quick 2)")
    add("--rounds", type=int, help="updates of each, the first of which warms up (default 4; quick 2)")
    add("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    add("--micro-batches", type=int, nargs="+", help="of the scaling table (default 1 2 4 8 16; quick 1 2)")
    add("--all-steps", type=int, nargs="+", help="T of the scaling table (default 10 20 50; quick 2 4)")
    add("--no-scaling", dest="scaling", action="store_false", help="leave both scaling tables out")
    add("--quick", action="store_true", help="little of everything, for a small machine")
    add(
        "--full-width-update",
        action="store_true",
        help="one update of ctrl and of ddpo at Stable Diffusion v1.5's widths, T=2, one picture",
    )
    add("--json", action="store_true", help="print one JSON record a row")
    add("--out", type=Path, help="also write all records to this file")
    options = parser.parse_intermixed_args(arguments)
    defaults: dict[str, Any] = {"steps": 50, "micro_batch": 4, "rounds": 4, "rows": list(ROWS)}
    defaults |= {"micro_batches": [1, 2, 4, 8, 16], "all_steps": [10, 20, 50]}
    if options.quick:
        defaults |= {
            "steps": 4,
            "micro_batch": 2,
            "rounds": 2,
            "micro_batches": [1, 2],
            "all_steps": [2, 4],
        }
    if options.full_width_update:
        defaults |= {"steps": 2, "micro_batch": 1, "rounds": 1, "rows": ["ctrl, full", "ddpo"]}
        options.words, options.scaling = [*_FULL_WIDTH, *options.words], False
    same = ("tf32",) if torch.cuda.is_available() else ("tf32", "fp32")
    if _precision(options) in same:  # then it is the row above it once more
        defaults["rows"] = [row for row in defaults["rows"] if not row.endswith("tf32")]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.words += ["env.random_weights=true"] if options.random_weights else []
    options.words += [f"env.precision={options.precision}"] if options.precision else []
    return options


def _precision(options: argparse.Namespace) -> str:
    """Return what the rows will have, of the option, the words or the env."""
    words = {config.key_of(word): word.partition("=")[2] for word in options.words}
    env = config.GROUPS["env"].get(words.get("env", "emoji"))
    return str(options.precision or words.get("env.precision") or getattr(env, "precision", "fp32"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit code: 0, 1 if a row failed, 2 for a mistake in what was asked."""
    options = _options(arguments)
    console.stderr = options.json  # standard output is the records alone
    try:
        groups = plan(options)
        cells = list(dict.fromkeys(cell for group in groups.values() for cell in group))
        records = run_all(cells, options.words, options.rounds)
    except DiffRLError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    origin = provenance() | {"words": options.words}
    if options.out:
        options.out.write_text(json.dumps(origin | {"rows": records}, indent=1) + "\n", encoding="utf-8")
    if options.json:
        for record in records:
            print(json.dumps(origin | record))
    else:
        show(records, groups)
    return int(any("failed" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
