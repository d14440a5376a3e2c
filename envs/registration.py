"""The envs under their Gymnasium ids: `gymnasium.make_vec("diffrl:diffrl/Emoji-v0", num_envs=8)`."""

from typing import Any

_IDS = {
    "diffrl/Emoji-v0": "emoji",
    "diffrl/GaussianMixture-v0": "gaussian_mixture",
    "diffrl/SD15-v0": "sd15",
}


def register_envs() -> None:
    """Register every env; called when `diffrl` is imported, or by its command."""
    from gymnasium.envs.registration import register, registry

    for env_id in _IDS:
        if env_id not in registry:
            register(
                env_id,
                vector_entry_point="diffrl.envs.registration:make",
                kwargs={"name": _IDS[env_id]},
            )


def make(name: str, num_envs: int = 1, **settings: Any) -> Any:
    """Return the vector env `name`.

    Its reward, unless one is given, is the true JPEG measure, or for the mixture its softmax classifier.

    Args:
        name: emoji, sd15 or gaussian_mixture.
        num_envs: N.
        settings: `reward`, `prompts` (list), `group_size`, `device`, and the fields of the env's settings.
    """
    from diffrl.envs.emoji import Emoji
    from diffrl.envs.gaussian_mixture import GaussianMixture
    from diffrl.envs.sd15 import SD15

    own = ("reward", "prompts", "group_size", "device", "render_mode")
    chosen = {key: settings.pop(key) for key in own if key in settings}
    env = {"emoji": Emoji, "sd15": SD15, "gaussian_mixture": GaussianMixture}[name](**settings)
    return make_from(env, num_envs, **chosen)


def make_from(env: Any, num_envs: int = 1, *, device: str = "cpu", **chosen: Any) -> Any:
    """Return the vector env of an env's settings, with the same defaults as `make`."""
    from diffrl.envs.denoising import DenoisingVectorEnv
    from diffrl.envs.gaussian_mixture import GaussianMixture
    from diffrl.envs.prompts import LISTS
    from diffrl.rewards.closed_form import Softmax
    from diffrl.rewards.jpeg import Jpeg
    from diffrl.schedule import DDIMSchedule

    defaults: dict[str, Any] = {"reward": Jpeg()}
    if isinstance(env, GaussianMixture):
        defaults = {"reward": Softmax(), "render_mode": None}
    backbone = env.load().to(device)
    schedule = DDIMSchedule(backbone.scheduler, env.num_steps, env.eta).to(backbone.unet.device)
    chosen = {"prompts": LISTS["simple_animals"]} | defaults | chosen
    return DenoisingVectorEnv(backbone, schedule, num_envs=num_envs, **chosen)
