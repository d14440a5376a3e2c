"""One update a line, by this toolkit, and the time of its network calls alone; see `trl_worker`."""

import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffrl import config
from diffrl.build import Setup
from diffrl.policy import Policy
from diffrl.types import Context, Observation


@dataclass
class Flatness:
    """Minus the variance about mid-grey: differentiable, at no cost."""

    differentiable: ClassVar[bool] = True
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return the reward of each picture, `[N]`."""
        return -(images - 0.5).square().mean((1, 2, 3))


def settings(task: dict[str, Any]) -> list[str]:
    """Return the words that ask for the same update as TRL's."""
    count = task["batch"]
    words = [f"env.num_steps={task['steps']}", f"env.guidance_scale={task['guidance']}", "policy.rank=4"]
    words += [f"algo.batch_size={count}", f"algo.micro_batch_size={count}", "reward=jpeg"]
    if task["method"] == "ddpo":
        return [*words, "algo=ddpo", "algo.minibatches=1"]
    cut = [
        f"algo.truncation.low={task['cut']}",
        "algo.truncation.kind=fixed",
        "algo.truncation.path=network",
    ]
    return [*words, "algo=reward_backprop", "env.checkpointing=true", *cut]


def floor(policy: Policy, obs: Observation, task: dict[str, Any]) -> float:
    """Return the seconds of the update's network calls, forward and backward, and of nothing else."""
    begin = time.perf_counter()
    kept = task["steps"] - task["cut"]
    forward = task["steps"] if task["method"] == "ddpo" else task["cut"]
    with torch.no_grad():
        for _ in range(forward):
            policy.guided_eps(obs)
    for _ in range(kept):
        if task["method"] == "ddpo":
            policy.guided_eps(obs).sum().backward()
        else:  # through the latents as well, as the chain needs it
            latents = obs["latents"].requires_grad_()
            policy.guided_eps({**obs, "latents": latents}).sum().backward()
    policy.zero_grad()
    return time.perf_counter() - begin


def main() -> None:
    """Build the algorithm and take updates as they are asked for."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    words = settings(task)
    if task["method"] != "ddpo":
        words.remove("reward=jpeg")  # a black box: what is optimised is given below
    setup = Setup(config.load(words))
    reward = setup.config.reward if task["method"] == "ddpo" else Flatness()
    policy, algo = setup.make_policy(()), setup.config.algo
    env = setup.make_env(reward, task["batch"])
    optimizer, generator = algo.make_optimizer(policy), setup.generator(2)
    obs, _ = env.reset(seed=0)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "floor":
            print(json.dumps({"seconds": floor(policy, obs, task)}), flush=True)
            continue
        begin = time.perf_counter()
        algo.update((algo.collect(env, policy, generator) for _ in range(1)), policy, optimizer)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}), flush=True
    )


if __name__ == "__main__":
    main()
