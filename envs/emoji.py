"""The embedded emoji model: Stable Diffusion v1.5's layout at 64 px, small enough for a laptop."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from diffrl.envs.sd15 import SD15

ASSET = Path(str(files("diffrl"))) / "assets" / "emoji"


@dataclass
class Emoji(SD15):
    """The MDP over the embedded model's latents: 16 x 16 x 4, pictures of 64 px."""

    model: str = str(ASSET)
    precision: str = "fp32"  # as for sd15; here whole float32, so that nats are true on a GPU too
    num_steps: int = 10  # T; chosen: fidelity and spread as at 20, in half the time
    guidance_scale: float = 1.0  # of the prompt; 1: it is distilled into the weights
    checkpointing: bool = False  # recompute activations; this model is small enough to keep them

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.model).parts[-3:] == ASSET.parts[-3:]:  # where it lay for whoever trained the run
            self.model = str(ASSET)
