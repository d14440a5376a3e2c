"""What one update costs: seconds, memory, network calls, FLOPs. `throughput` runs it, a process each."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diffrl import config
from diffrl.algorithms.base import Algorithm
from diffrl.backbones.stable_diffusion import PRECISIONS
from diffrl.benchmarks.plain import PlainLoop
from diffrl.build import Setup
from diffrl.memory import is_exhausted
from diffrl.meter import now, peak_memory
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.rollout import rollout
from diffrl.types import Reward

OUT_OF_MEMORY = {"out_of_memory": True}
"""The record of a measurement that did not fit."""


def measure(row: str, words: list[str], rounds: int) -> dict[str, Any]:
    """Return the cost of an update, whose pictures are one micro-batch.

    Every round draws the same noise, and so keeps the same steps. The first one warms up, and is timed only
    if there is no other; in it the FLOPs of the whole update are counted, with those of recomputing.

    Args:
        row: "sampling" draws pictures without learning, one that begins with "plain" takes `PlainLoop`,
            any other the algorithm.
        words: settings.
        rounds: updates.

    Returns:
        `seconds` of each update. `peak_gb`, and `held_gb` of it before the first update: of PyTorch's
        allocator on a GPU, of the process on a CPU. `matmul_flops` are those of a large matrix product, a
        second: on a GPU in bf16, whatever the row's precision; on a CPU, of which few have units for bf16,
        in the row's. The rest is a picture's, or named after its setting.
    """
    setup = Setup(config.load(words))
    setup.prompts = setup.prompts[:1]  # encoded once: no part of an update
    algo, cuda = setup.config.algo, setup.device.type == "cuda"
    reward = unfitted_reward().to(setup.device) if algo.needs_gradient else Jpeg()
    precision = getattr(setup.config.env, "precision", "fp32")
    fastest = matmul_flops(setup.device, peak_dtype(setup.device, precision))
    take, policy = _work(row, setup, algo, reward)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held, seconds, calls = peak_memory(cuda), [], 0
    compiled = setup.config.env.compile
    counted = count_flops(take) if compiled else 0  # a round in which they are counted is not compiled
    for number in range(rounds):
        calls, begin = policy.num_calls, now(cuda)
        if number or compiled:
            take()
        else:
            counted = count_flops(take)
        seconds.append(now(cuda) - begin)
        calls = policy.num_calls - calls
        if cuda and rounds > 1 and not number:
            torch.cuda.reset_peak_memory_stats()
    pictures = algo.micro_batch_size
    kept = {}
    if hasattr(algo, "truncation") and row != "sampling":
        kept["kept_steps"] = sum(algo.truncation.kept(setup.schedule.num_steps, setup.generator(2)))
    return {
        "device": torch.cuda.get_device_name(setup.device) if cuda else "CPU",
        "precision": precision,
        "seconds": seconds[1:] or seconds,
        "peak_gb": peak_memory(cuda) / 1e9,
        "held_gb": held / 1e9,
        "network_calls": calls / pictures,
        "flops": counted / pictures,
        "matmul_flops": fastest,
        **kept,
    }


def count_flops(take: Callable[[], object]) -> int:
    """Return the FLOPs of products, convolutions and attention while `take` runs, forward and backward.

    Nothing runs compiled the while: the counter does not see into what compilation makes.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    with torch.compiler.set_stance("force_eager"), counter:
        take()
    return counter.get_total_flops()


def unfitted_reward() -> LogLikelihood:
    """Return log p(y|x) of a classifier with random weights: as costly as a fitted one."""
    report = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(4, "dct")
    return LogLikelihood([Attribute("compressibility", classifier, torch.tensor([1.0, 2.0, 3.0]), report)])


def peak_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return what a device's peak is measured in; `precision` is the row's."""
    return torch.bfloat16 if device.type == "cuda" else PRECISIONS[precision]


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of the fastest of ten products of two large square matrices."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    taken = []
    for _ in range(10):
        begin = now(cuda)
        a @ b
        taken.append(now(cuda) - begin)
    return 2 * side**3 / min(taken)


def _work(row: str, setup: Setup, algo: Algorithm, reward: Reward) -> Any:
    """Return what is measured, and the policy that counts its network calls."""
    policy = setup.make_policy(reward.num_classes)
    env = setup.make_env(reward, algo.micro_batch_size, algo.group_size)
    optimizer = algo.make_optimizer(policy)
    env.reset(seed=0)
    if row == "sampling":
        return lambda: rollout(env, policy, setup.generator(2)), policy
    if row.startswith("plain"):
        plain = PlainLoop(algo, policy, env)  # type: ignore[arg-type]
        return lambda: plain.update(optimizer, setup.generator(2)), policy

    def update() -> None:
        generator = setup.generator(2)
        algo.update((algo.collect(env, policy, generator) for _ in range(1)), policy, optimizer)

    return update, policy


class _Untracked:
    """Tells no module from another: PyTorch's own tracker holds on to what checkpointing would free."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_ATTENTION = {  # on a CPU, which PyTorch's counter leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def main() -> None:
    """Print the record of the measurement that the command line asks for, in JSON."""
    row, words, rounds = json.loads(sys.argv[1])
    try:
        record = measure(row, words, rounds)
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        record = OUT_OF_MEMORY
    print(json.dumps(record))


if __name__ == "__main__":
    main()
