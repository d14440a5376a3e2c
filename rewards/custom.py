"""Rewards from a file of your own: a function of pictures and context, or a class with settings.

    def redness(images, context):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

is chosen by `reward=my_rewards.py:redness`. A class has `__call__` instead, and its annotated fields become
settings, `reward.strength=2`. Both are black boxes unless `@reward(differentiable=True)` stands above them.
Shapes: N pictures `[N, 3, S, S]` in [0, 1].
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffrl.errors import DiffRLError, unknown

T = TypeVar("T")


def reward(*, differentiable: bool) -> Callable[[T], T]:
    """Return a decorator that says whether gradients flow from the score to the pictures."""

    def decorate(own: T) -> T:
        own.differentiable = differentiable  # type: ignore[attr-defined]
        return own

    return decorate


def is_source(name: str) -> bool:
    """Return whether a reward's name is `FILE.py:NAME`."""
    return ".py:" in name


def from_file(source: str) -> type:
    """Return the reward that `FILE.py:NAME` names, as a dataclass of its settings and its `source`.

    Raises:
        DiffRLError: no such file or name, a file that fails, something that is no reward.
    """
    file, _, name = source.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise DiffRLError(f"reward={source}: no such file, {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise DiffRLError(f"reward={source}: {path} fails: {type(error).__name__}: {error}") from error
    known = {key for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if name not in known:
        raise unknown(f"reward={file}", name, known)
    own = getattr(module, name)
    shared: dict[str, Any] = {
        "differentiable": getattr(own, "differentiable", False),
        "num_classes": getattr(own, "num_classes", ()),
        "__reduce__": _reduce,
        "__doc__": own.__doc__ or f"{name} of {path.name}.",
    }
    bases: tuple[type, ...] = ()
    if not isinstance(own, type):
        shared["__call__"] = lambda self, images, context: own(images, context)
    elif any("__call__" in vars(base) for base in own.__mro__):
        bases = (own if is_dataclass(own) else dataclass(own),)
    else:
        raise DiffRLError(f"reward={source}: {name} has no __call__(self, images, context).")
    return make_dataclass(name, [("source", str, f"{path}:{name}")], bases=bases, namespace=shared)


def _reduce(self: Any) -> tuple[Callable[..., object], tuple[str, dict[str, Any]]]:
    """Pickle by source: a suite's cells are processes of their own."""
    return _rebuild, (self.source, asdict(self))


def _rebuild(source: str, settings: dict[str, Any]) -> object:
    return from_file(source)(**settings)
