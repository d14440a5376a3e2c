"""The envs under their Gymnasium ids: `gymnasium.make_vec("diffrl:diffrl/Emoji-v0", num_envs=8)`."""

from typing import Any

from gymnasium.envs.registration import register, registry

_IDS = {"diffrl/Emoji-v0": "emoji", "diffrl/SD15-v0": "sd15"}


def register_envs() -> None:
    """Register every env; called when `diffrl` is imported."""
    for env_id in _IDS:
        if env_id not in registry:
            register(
                env_id,
                vector_entry_point="diffrl.envs.registration:make",
                kwargs={"name": _IDS[env_id]},
            )


def make(name: str, num_envs: int = 1, **settings: Any) -> Any:
    """Return the vector env `name`, with the true JPEG measure as its reward unless one is given.

    Args:
        name: emoji or sd15.
        num_envs: N.
        settings: `reward`, `prompts` (list), `group_size`, `device`, and the fields of the env's settings.
    """
    from diffrl.backbones.stable_diffusion import StableDiffusion
    from diffrl.envs.denoising import DenoisingVectorEnv
    from diffrl.envs.emoji import Emoji
    from diffrl.envs.prompts import LISTS
    from diffrl.envs.sd15 import SD15
    from diffrl.rewards.jpeg import Jpeg
    from diffrl.schedule import DDIMSchedule

    own = ("reward", "prompts", "group_size", "device", "render_mode")
    chosen = {key: settings.pop(key) for key in own if key in settings}
    env = {"emoji": Emoji, "sd15": SD15}[name](**settings)
    backbone = StableDiffusion.load(env.model).to(chosen.pop("device", "cpu"))
    schedule = DDIMSchedule(backbone.scheduler, env.num_steps, env.eta).to(backbone.unet.device)
    return DenoisingVectorEnv(
        backbone,
        schedule,
        chosen.pop("reward", Jpeg()),
        chosen.pop("prompts", LISTS["simple_animals"]),
        num_envs=num_envs,
        **chosen,
    )
