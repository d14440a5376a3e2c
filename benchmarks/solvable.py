"""Each algorithm against the exact answer: `python -m diffrl.benchmarks.solvable`.

Trains every row of the table on the solvable model, several seeds each, two processes at a time, and
measures the trained policy without sampling noise: the gap to the best attainable objective in nats and
the total variation of x_0 to the target, both of the worst label. Rows without a KL have no such target;
they are held against the one of gamma 1, to show on which side they end.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffrl import config, run

ROWS: dict[str, list[str]] = {
    "ctrl, gamma 1": ["algo=ctrl"],
    "ctrl, gamma 10": ["algo=ctrl", "algo.gamma=10"],
    "ddpo, KL as loss": ["algo=ddpo"],
    "ddpo, KL in reward": ["algo=ddpo", "algo.kl_form=reward"],
    "rwr, from the pretrained model": ["algo=rwr"],
    "ddpo, no KL": ["algo=ddpo", "algo.kl=0"],
    "reward_backprop, no KL": ["algo=reward_backprop"],
}
RESULTS = Path(__file__).resolve().parent / "results"


def measure(row: str, seed: int, root: str) -> dict[str, Any]:
    """Train one row with one seed in a fresh folder and return its exact measures."""
    torch.set_num_threads(1)
    words = ["env=gaussian_mixture", *ROWS[row], f"seed={seed}", f"root={root}", f"name={row} {seed}"]
    begin = time.perf_counter()
    folder = run.train(config.load([f"'{w}'" if " " in w else w for w in words]))
    seconds = time.perf_counter() - begin
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = next(line for line in map(json.loads, reversed(lines)) if "exact/tv" in line)
    return {name: value for name, value in last.items() if name.startswith("exact/")} | {
        "row": row,
        "seed": seed,
        "seconds": seconds,
    }


def summarise(results: list[dict[str, Any]]) -> str:
    """Return the table as Markdown: worst and mean over seeds."""
    lines = [
        "| row | gap (nats), worst seed | mean | total variation, worst seed | mean | E log p | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        runs = [result for result in results if result["row"] == row]
        if not runs:
            continue
        gaps, tvs = ([result[f"exact/{name}"] for result in runs] for name in ("gap_nats", "tv"))
        log_p = [
            statistics.mean(values)
            for values in zip(*(r["exact/log_prob_per_label"] for r in runs), strict=True)
        ]
        cells = [f"{max(gaps):.4f}", f"{statistics.mean(gaps):.4f}", f"{max(tvs):.4f}"]
        cells += [f"{statistics.mean(tvs):.4f}", ", ".join(f"{value:.3f}" for value in log_p)]
        cells += [f"{statistics.mean(result['seconds'] for result in runs):.0f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, train all, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.solvable", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default 5)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path, default=RESULTS / "solvable.json")
    options = parser.parse_args()
    begin = time.perf_counter()
    with (
        TemporaryDirectory() as root,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        jobs = [
            pool.submit(measure, row, seed, root) for row in options.rows for seed in range(options.seeds)
        ]
        results = [job.result() for job in jobs]
    report = {
        "command": "python -m diffrl.benchmarks.solvable",
        "minutes": (time.perf_counter() - begin) / 60,
        "hardware": f"{multiprocessing.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "runs": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(summarise(results))
    print(f"{report['minutes']:.1f} minutes; wrote {options.out}")


if __name__ == "__main__":
    main()
