"""Which setting gives the least variance a second? Pathwise gradients of one run, drawn again and again.

    python -m diffrl.benchmarks.gradients RUN algo.kl_steps=1 algo.kl_steps=2 algo.truncation.count=2

Each argument after the run is one row: settings of its algorithm, several joined by '+'. Rows take turns,
and no step is taken. A mean over updates comes as far in a second with twice the variance in half the time:
the last column is variance x seconds, as a ratio to the first row's, and `error` the variance's standard
error, relative to it. Only rows of one expectation compare: `mean` is the cosine of a row's mean gradient
and the first row's, `noise` is the norm of the standard deviation over that of the mean.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from diffrl.algorithms.pathwise import Pathwise
from diffrl.algorithms.recorder import Recorder
from diffrl.benchmarks.provenance import provenance
from diffrl.build import Setup
from diffrl.config import key_of
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.log import console, print_wide, progress
from diffrl.policy import Policy
from diffrl.restore import restore, settings_of
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.types import Trajectory

_EPISODES, _ACTIONS = 0, 1  # streams of random numbers, of a round each


def measure(run: Path, rows: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Return a record a row: seconds and variance of its gradient of a batch at the run's weights.

    Args:
        run: a finished run's folder.
        rows: `algo.key=value` words, several joined by '+'; none of the batch's size.
        rounds: gradients a row, 2 or more.

    Raises:
        DiffRLError: a word that is no setting of the algorithm, too few rounds, or a run whose gradient is
            no function of its weights and a batch: of another algorithm, a surrogate or a KL budget.
    """
    if rounds < 2:
        raise DiffRLError(f"--rounds {rounds}: must be 2 or more, for a variance.")
    algos = [replace(_algorithm(run, row.split("+")), max_grad_norm=math.inf) for row in rows]
    setup, policy, reward = restore(run, {})
    if isinstance(reward, OnlineSurrogateReward):
        raise DiffRLError(f"{run}: its reward is a surrogate, which learns on the way; take another run.")
    env = setup.make_env(reward, algos[0].micro_batch_size)
    found: list[list[Tensor]] = [[] for _ in rows]
    seconds: list[list[float]] = [[] for _ in rows]
    with progress("gradients", rounds * len(rows)) as bar:
        for number in range(rounds):
            for algo, gradients, times in zip(algos, found, seconds, strict=True):
                begin = time.perf_counter()
                gradients.append(gradient(setup, policy, env, algo, number))
                times.append(time.perf_counter() - begin)
                bar.advance()
    return compared(rows, [torch.stack(gradients) for gradients in found], seconds)


def gradient(setup: Setup, policy: Policy, env: DenoisingVectorEnv, algo: Pathwise, number: int) -> Tensor:
    """Return the gradient of one batch, flat, as the optimiser is given it; `number` seeds its noise."""
    recorder = Recorder(policy)

    def batch() -> Iterator[Trajectory]:
        for part in range(algo.batch_size // algo.micro_batch_size):
            env.reset(seed=setup.seed(_EPISODES, number, part))
            yield algo.collect(env, policy, setup.generator(_ACTIONS, number, part))

    algo.update(batch(), policy, recorder)
    return torch.cat([part.flatten() for part in recorder.gradients.values()]).cpu()


def compared(
    rows: Sequence[str], gradients: Sequence[Tensor], seconds: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Return a record a row from its gradients `[rounds, parameters]` and the seconds each took."""
    records: list[dict[str, Any]] = []
    first = gradients[0].mean(0)
    for row, drawn, times in zip(rows, gradients, seconds, strict=True):
        mean, rounds = drawn.mean(0), len(drawn)
        squares = (drawn - mean).square().sum(1) * rounds / (rounds - 1)
        variance = float(squares.mean())
        records.append(
            {
                "settings": row,
                "rounds": rounds,
                "seconds": statistics.median(times),
                "variance": variance,
                "error": float(squares.std()) / math.sqrt(rounds) / variance,
                "noise": math.sqrt(variance) / float(mean.norm()),
                "mean": float(torch.cosine_similarity(mean, first, dim=0)),
            }
        )
    price = records[0]["variance"] * records[0]["seconds"]
    return [each | {"variance_seconds": each["variance"] * each["seconds"] / price} for each in records]


def _algorithm(run: Path, words: list[str]) -> Pathwise:
    """Return the run's algorithm with other settings."""
    for word in words:
        if not word.startswith("algo."):
            raise DiffRLError(f"{word}: no setting of the algorithm; give words such as algo.kl_steps=2.")
        if key_of(word) in ("algo.batch_size", "algo.micro_batch_size"):
            raise DiffRLError(f"{word}: rows compare at the run's own batch; leave it out.")
    algo = settings_of(run, words).algo
    if not isinstance(algo, Pathwise) or algo.kl_budget is not None:
        raise DiffRLError(f"{run}: no run of ctrl or reward_backprop without a KL budget.")
    return algo


def main() -> int:
    """Measure, print the table, and return the exit code: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="diffrl.benchmarks.gradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("rows", nargs="+", metavar="algo.key=value", help="a row each, '+' joins several")
    parser.add_argument("--rounds", type=int, default=32, help="gradients a row (default 32)")
    parser.add_argument("--out", type=Path, help="also write the records to this file, as JSON")
    options = parser.parse_args()
    try:
        records = measure(options.run, options.rows, options.rounds)
    except DiffRLError as error:
        print(f"gradients: {error}", file=sys.stderr)
        return 2
    if options.out:
        stored = {"rows": records} | provenance()
        options.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    table = Table(box=box.MARKDOWN)
    for heading in ("settings", "seconds", "noise", "mean", "error", "variance x seconds"):
        table.add_column(heading, justify="left" if heading == "settings" else "right", no_wrap=True)
    for record in records:
        numbers = (record[name] for name in ("seconds", "noise", "mean", "error", "variance_seconds"))
        table.add_row(record["settings"], *(f"{number:.3f}" for number in numbers))
    print_wide(table)
    if options.out:
        console.print(f"{options.out} has every number")
    return 0


if __name__ == "__main__":
    sys.exit(main())
