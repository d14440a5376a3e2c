"""CLIPScore as a reward: does the picture show what the prompt says?"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffrl.rewards.clip import VIT_L_14, load_clip
from diffrl.types import Context


@dataclass
class ClipScore:
    """100 cos(picture, prompt) of CLIP, differentiable."""

    clip: str = VIT_L_14  # hub id, or a folder in the layout of transformers

    differentiable: ClassVar[bool] = True
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return 100 times the cosine of each picture and its prompt, `[N]`, -100 to 100."""
        return 100 * load_clip(self.clip).similarity(images, context.prompts)
