"""RL fine-tuning of diffusion models.

Nothing is imported here, so that `diffrl --help` is instant: import what you need from
`diffrl.algorithms`, `diffrl.envs`, `diffrl.rewards`, `diffrl.policy` and `diffrl.rollout`.
"""

__version__ = "0.1.0"
