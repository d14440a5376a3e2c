"""The embedded emoji model: Stable Diffusion v1.5's layout at 64 px, small enough for a laptop."""

from dataclasses import dataclass
from pathlib import Path

import diffrl
from diffrl.envs.sd15 import SD15

ASSET = Path(diffrl.__file__).parent / "assets" / "emoji"


@dataclass
class Emoji(SD15):
    """The MDP over the embedded model's latents: 16 x 16 x 4, pictures of 64 px."""

    model: str = str(ASSET)
    num_steps: int = 20
    guidance_scale: float = 2.0
