"""RL fine-tuning of diffusion models.

Importing it registers the envs with Gymnasium and nothing more (PyTorch is not imported): the parts are in
`diffrl.algorithms`, `diffrl.envs`, `diffrl.rewards`, `diffrl.policy` and `diffrl.rollout`. `check_reward`,
`check_env` and `check_algorithm` look at yours; `ControlledStableDiffusionPipeline` draws with what was
trained.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffrl.envs.registration import register_envs

if TYPE_CHECKING:
    from diffrl.checks.algorithm import check_algorithm as check_algorithm
    from diffrl.checks.env import check_env as check_env
    from diffrl.checks.reward import check_reward as check_reward
    from diffrl.pipeline import ControlledStableDiffusionPipeline as ControlledStableDiffusionPipeline

__version__ = "0.1.0"

_LAZY = {
    "ControlledStableDiffusionPipeline": "diffrl.pipeline",
    "check_algorithm": "diffrl.checks.algorithm",
    "check_env": "diffrl.checks.env",
    "check_reward": "diffrl.checks.reward",
}
"""Names that are imported, with all that they stand on, when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


# which imports Gymnasium, most of the time of `diffrl --help`: the command does it when it runs one
if Path(sys.argv[0]).stem != "diffrl":
    register_envs()
