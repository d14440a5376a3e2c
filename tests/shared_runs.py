"""What `test_processes` starts: torchrun's agent, and as its processes forks that import nothing anew."""

import os
import sys
from uuid import uuid4

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffrl import policy
from diffrl.cli import main


def launch(number, commands, cache, log):
    """Have `number` processes share the runs of the commands; all that they say goes to `log`."""
    with open(log, "wb") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
    os.environ |= {"DIFFRL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    standalone = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": uuid4().hex}
    config = LaunchConfig(1, 1, number, start_method="fork", max_restarts=0, **standalone)
    elastic_launch(config, _train)(commands)


def without_zeros():
    """Begin with adapters of which neither half is zero: else A has no gradient in the first update."""
    own = {"init_lora_weights": False, "lora_alpha": 0.1}
    config = policy.LoraConfig
    policy.LoraConfig = lambda **settings: config(**settings | own)


def _train(commands):
    without_zeros()
    for words in commands:
        if code := main(words):
            sys.exit(code)
