"""Rewards of your own: a function of pictures and context, or a class with settings.

    def redness(images, context):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

is chosen by `reward=my_rewards.py:redness`. A class has `__call__` instead, and its annotated fields become
settings, `reward.strength=2`; what else it needs, such as a network, it makes in `__post_init__`. Both are
black boxes unless `@reward(differentiable=True)` stands above them.
Shapes: N pictures `[N, 3, S, S]` in [0, 1].
"""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def reward(*, differentiable: bool) -> Callable[[T], T]:
    """Return a decorator that says whether gradients flow from the score to the pictures."""

    def decorate(own: T) -> T:
        own.differentiable = differentiable  # type: ignore[attr-defined]
        return own

    return decorate


def of_function(own: Any) -> type:
    """Return the class of a reward without settings that a function computes."""
    attributes = {"__call__": lambda self, images, context: own(images, context), "__doc__": own.__doc__}
    attributes |= {key: getattr(own, key) for key in ("differentiable", "num_classes") if hasattr(own, key)}
    return type(own.__name__, (), attributes)
