"""An env is a model with settings: `load()` returns the backbone that encodes prompts and decodes latents.

diffrl train env=grey_emoji.py:GreyEmoji env.colour=0.2 reward=jpeg algo=ddpo

Here it is the emoji model, seen through a lens that takes colours away; rewards, evaluations and pictures
all see what the lens shows. A model of your own needs what `diffrl.types.Backbone` lists.
"""

from dataclasses import dataclass

from diffrl.envs.emoji import Emoji
from diffrl.errors import DiffRLError


@dataclass
class GreyEmoji(Emoji):
    """The MDP over the emoji model's latents, its pictures without colours."""

    colour: float = 0.0  # what is left of them: 0 none, 1 all

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.colour <= 1:
            raise DiffRLError(f"env.colour={self.colour}: must be between 0 and 1.")

    def load(self):
        """Return the emoji model with another last layer."""
        backbone = super().load()
        decode = backbone.decode

        def through_the_lens(latents):
            images = decode(latents)  # [N, 3, S, S] in [0, 1]; neither detached nor under no_grad
            grey = images.mean(1, keepdim=True)
            return self.colour * images + (1 - self.colour) * grey

        backbone.decode = through_the_lens
        return backbone
