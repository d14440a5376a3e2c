"""RL fine-tuning of diffusion models.

Importing it registers the envs with Gymnasium and nothing more (PyTorch is not imported, so that
`diffrl --help` is instant): the parts are in `diffrl.algorithms`, `diffrl.envs`, `diffrl.rewards`,
`diffrl.policy` and `diffrl.rollout`. `check_reward`, `check_env` and
`check_algorithm` look at yours.
"""

import importlib
from typing import Any

from diffrl.envs.registration import register_envs

__version__ = "0.1.0"

_LAZY = {
    "check_algorithm": "diffrl.checks.algorithm",
    "check_env": "diffrl.checks.env",
    "check_reward": "diffrl.checks.reward",
}
"""Names that are imported, with all that they stand on, when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


register_envs()
