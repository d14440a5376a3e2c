"""Does the memory of training grow with the number of steps? `python -m diffrl.benchmarks.memory`.

One CTRL update by full back-propagation through every step (the most a truncation can keep), each T in a
process of its own. On a GPU the peak is PyTorch's allocator's, on a CPU the process's resident set above
what it was before the update.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

import torch

from diffrl import config
from diffrl.build import Setup
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood

# glibc keeps freed pages, more of them the longer the chain: without these the peak is its cache, not ours
_RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}

FULL = [
    "algo.truncation.kind=fixed",
    "algo.truncation.low=0",
    "algo.truncation.path=network",
    "algo.kl_steps=null",
    "env.checkpointing=true",
]
"""The gradient through every step; any of it can be given otherwise."""


def peak_megabytes(words: list[str]) -> float:
    """Return the peak of one update, MB, of this process; `words` are settings."""
    asked = {word.partition("=")[0] for word in words}
    full = [word for word in FULL if word.partition("=")[0] not in asked]
    setup = Setup(config.load([*full, *words]))
    algo = setup.config.algo
    report = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())
    attribute = Attribute("compressibility", Classifier(4, "dct"), torch.tensor([1.0, 2.0, 3.0]), report)
    reward = LogLikelihood([attribute]).to(setup.device)
    policy = setup.make_policy(reward.num_classes)
    env = setup.make_env(reward, algo.micro_batch_size)
    optimizer, generator = algo.make_optimizer(policy), setup.generator(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    algo.update((algo.collect(env, policy, generator) for _ in range(1)), policy, optimizer)
    if setup.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def main() -> None:
    """Measure each T in a fresh process and print the peaks as JSON."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.memory", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50], help="values of T")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options, words = parser.parse_known_args()
    if options.here:
        print(peak_megabytes([*words, f"env.num_steps={options.steps[0]}"]))
        return
    peaks = {}
    for steps in options.steps:
        command = [
            sys.executable,
            "-m",
            "diffrl.benchmarks.memory",
            *words,
            "--here",
            "--steps",
            str(steps),  # last: it takes any number of values, words too
        ]
        environment = os.environ | _RETURN_FREED_MEMORY
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        peaks[f"T={steps}"] = round(float(out.split()[-1]), 1)
    print(json.dumps({"peak_mb": peaks, "settings": words}))


if __name__ == "__main__":
    main()
