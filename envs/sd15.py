"""Stable Diffusion v1.5, and any checkpoint of its layout, as an env."""

from dataclasses import dataclass

from diffrl.backbones.loading import DEFAULT_MODEL
from diffrl.backbones.stable_diffusion import PRECISIONS, StableDiffusion
from diffrl.errors import DiffRLError
from diffrl.schedule import check_steps


@dataclass
class SD15:
    """The MDP over Stable Diffusion v1.5's latents: 64 x 64 x 4, pictures of 512 px."""

    model: str = DEFAULT_MODEL  # hub id, diffusers folder, or .safetensors file of the original layout
    revision: str | None = None  # branch, tag or commit of a hub id; null: its main branch
    precision: str = "tf32"  # fp32; tf32: a GPU rounds products; bf16, fp16 (draws only): the denoiser
    image_size: int | None = None  # pixels a side; null: the model's own, 512
    random_weights: bool = False  # no download, the architecture alone: its speed, not its pictures
    num_steps: int = 50  # T; CTRL, Table 2
    eta: float = 1.0  # DDIM's: 0 deterministic, 1 as much noise as DDPM
    guidance_scale: float = 7.5  # of the prompt: CTRL, Table 2; 1 switches it off
    checkpointing: bool = True  # recompute a chain's activations in the backward pass: far less memory
    compile: bool = False  # the denoiser, by torch.compile: the first step takes minutes, the others less

    def __post_init__(self) -> None:
        if self.guidance_scale < 1:
            raise DiffRLError(f"env.guidance_scale={self.guidance_scale}: must be 1 or more.")
        check_steps(self.num_steps, self.eta, "env.")
        if self.precision not in PRECISIONS:
            raise DiffRLError(f"env.precision={self.precision}: must be one of {', '.join(PRECISIONS)}.")
        if self.image_size is not None and (self.image_size < 8 or self.image_size % 8):
            raise DiffRLError(f"env.image_size={self.image_size}: must be a multiple of 8.")

    def load(self) -> StableDiffusion:
        """Return the checkpoint."""
        backbone = StableDiffusion.load(
            self.model,
            revision=self.revision,
            random_weights=self.random_weights,
            precision=self.precision,
            image_size=self.image_size,
        )
        backbone.checkpointing = self.checkpointing
        return backbone
