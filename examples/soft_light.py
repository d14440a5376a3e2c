"""A reward with settings is a class: its annotated fields are set on the command line.

diffrl train algo=reward_backprop reward=soft_light.py:SoftLight reward.target=0.6

`differentiable=True` is a promise that gradients flow from the score to the pictures; algorithms that
follow them (ctrl, reward_backprop) take no other.
"""

from diffrl.errors import DiffRLError
from diffrl.rewards.custom import reward


@reward(differentiable=True)
class SoftLight:
    """Minus the squared distance of the mean brightness from a target, and of the contrast from another."""

    target: float = 0.5  # brightness, 0 to 1
    contrast: float = 0.1  # standard deviation over the picture
    weight: float = 1.0  # of the contrast

    def __post_init__(self):
        # wrong settings are told before anything is loaded, in one line
        if not 0 <= self.target <= 1:
            raise DiffRLError(f"reward.target={self.target}: must be between 0 and 1.")

    def __call__(self, images, context):
        """Return the score of each picture, [N]."""
        # over a picture, never over the batch: a score must not depend on its company
        brightness = images.mean((1, 2, 3))
        # the small number keeps the root's gradient finite where a picture is all one colour
        contrast = (images.var((1, 2, 3)) + 1e-6).sqrt()
        return -((brightness - self.target) ** 2) - self.weight * (contrast - self.contrast) ** 2
