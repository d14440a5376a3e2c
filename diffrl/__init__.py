"""RL fine-tuning of diffusion models.

Importing it registers the envs with Gymnasium and nothing more (PyTorch is not imported, so that
`diffrl --help` is instant): the parts are in `diffrl.algorithms`, `diffrl.envs`, `diffrl.rewards`,
`diffrl.policy` and `diffrl.rollout`.
"""

from diffrl.envs.registration import register_envs

__version__ = "0.1.0"

register_envs()
