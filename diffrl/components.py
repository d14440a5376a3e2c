"""What can be chosen by name: the project's own parts, those of installed packages, those of a file.

    algo=ctrl              one of ours
    reward=brightness      an entry point `diffrl.rewards` of an installed package
    env=my_env.py:MyEnv    a name in a file
    reward=[jpeg,my.py:f]  several rewards, as one
    reward=surrogate[vlm]  one that learns another, and has a gradient

Each becomes a dataclass whose fields are its settings.
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.algorithms.classifier_free import ClassifierFree
from diffrl.algorithms.ctrl import CTRL
from diffrl.algorithms.ddpo import DDPO
from diffrl.algorithms.guidance.base import Unguided
from diffrl.algorithms.guidance.classifier_free import ClassifierFreeGuidance
from diffrl.algorithms.guidance.mpgd import MPGD
from diffrl.algorithms.guidance.reconstruction import Reconstruction
from diffrl.algorithms.guidance.smc import SMC
from diffrl.algorithms.guidance.svdd import SVDD
from diffrl.algorithms.reward_backprop import RewardBackprop
from diffrl.algorithms.rwr import RWR
from diffrl.algorithms.untrained import Untrained
from diffrl.envs.emoji import Emoji
from diffrl.envs.gaussian_mixture import GaussianMixture
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError, first_line, unknown
from diffrl.rewards.aesthetic import Aesthetic
from diffrl.rewards.clip_score import ClipScore
from diffrl.rewards.closed_form import Gaussian, Softmax
from diffrl.rewards.composed import Composed
from diffrl.rewards.compressibility import Compressibility
from diffrl.rewards.custom import of_function
from diffrl.rewards.jpeg import Jpeg, JpegIncompressible
from diffrl.rewards.multitask import Multitask
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.rewards.vlm import VLM

GROUPS: dict[str, dict[str, type]] = {
    "algo": {
        "ctrl": CTRL,
        "ddpo": DDPO,
        "rwr": RWR,
        "reward_backprop": RewardBackprop,
        "classifier_free": ClassifierFree,
        "none": Untrained,
    },
    "env": {"emoji": Emoji, "gaussian_mixture": GaussianMixture, "sd15": SD15},
    "reward": {
        "aesthetic": Aesthetic,
        "clip_score": ClipScore,
        "compressibility": Compressibility,
        "gaussian": Gaussian,
        "jpeg": Jpeg,
        "jpeg_incompressible": JpegIncompressible,
        "multitask": Multitask,
        "softmax": Softmax,
        "vlm": VLM,
    },
    "guidance": {
        "none": Unguided,
        "reconstruction": Reconstruction,
        "mpgd": MPGD,
        "smc": SMC,
        "svdd": SVDD,
        "classifier_free": ClassifierFreeGuidance,
    },
}
"""What can be chosen on the command line, by group and name; `register` adds what is not ours."""

CUSTOM = "custom"
"""The name of what was chosen by `FILE.py:NAME`."""


@dataclass(frozen=True)
class _Kind:
    """What one of somebody else's must be."""

    entry_points: str  # under which packages name theirs
    needed: tuple[str, ...]  # of a class: methods and attributes
    defaults: dict[str, Any]  # of a class: attributes that it may leave out
    advice: str


_KINDS = {
    "algo": _Kind(
        "diffrl.algorithms",
        (
            "make_optimizer(self, policy)",
            "collect(self, env, policy, generator)",
            "update(self, trajectories, policy, optimizer)",
            "needs_gradient",
            "needs_noise",
        ),
        {},
        "derive it from diffrl.algorithms.base.Algorithm and give it what is missing.",
    ),
    "env": _Kind(
        "diffrl.envs",
        ("load(self)", "num_steps"),
        {"eta": 1.0, "guidance_scale": 1.0, "checkpointing": False, "compile": False},
        "derive it from an env's settings, such as diffrl.envs.emoji.Emoji, or give it what is missing.",
    ),
    "reward": _Kind(
        "diffrl.rewards",
        ("__call__(self, images, context)",),
        {"differentiable": False, "num_classes": ()},
        "give it one, or make it a function.",
    ),
}


_FOLDERS: list[Path] = []  # of the files that were loaded, whose neighbours they may import
_FILE = re.compile(r"([^\[\],]+\.py):")
_IMPORT = re.compile(r"^\s*(?:from|import)\s+(\w+)", re.MULTILINE)
_SURROGATE = re.compile(r"surrogate\[(.+)\]")


def register(group: str, word: str) -> str:
    """Return the name under which `GROUPS` has what `word` asks for, which is loaded if it is not ours.

    Raises:
        DiffRLError: see `component`. A name that nobody knows is returned as it is.
    """
    made = _is_made(word)
    if group not in _KINDS or word in GROUPS[group] or not (made or word in installed(group)):
        return word
    name = CUSTOM if made else word
    GROUPS[group][name] = component(group, word)
    return name


def word_of(name: str, settings: dict[str, Any]) -> str:
    """Return the word that chose a component, from its name and settings as a run stored them."""
    return settings["chosen_by"] if name == CUSTOM else name


def content(word: str) -> str:
    """Return the word with a hash of each file in its place, and of those beside it that it imports."""
    return _FILE.sub(lambda found: f"{_hash(Path(found[1]))}:", word)


def _hash(path: Path) -> str:
    text = path.read_bytes()
    digest = hashlib.sha256(text)
    for name in sorted(set(_IMPORT.findall(text.decode(errors="replace")))):
        if (neighbour := path.with_name(f"{name}.py")).is_file():
            digest.update(neighbour.read_bytes())
    return digest.hexdigest()


def installed(group: str) -> dict[str, EntryPoint]:
    """Return what installed packages add to a group, by name; nothing of them is imported."""
    kind = _KINDS.get(group)
    return {point.name: point for point in entry_points(group=kind.entry_points)} if kind else {}


def component(group: str, word: str) -> type:
    """Return what `word` names in a group, as a dataclass of its settings.

    Raises:
        DiffRLError: no such file or name, a file or package that fails, something of another kind.
    """
    if word.startswith("["):
        return _composed(group, word)
    if found := _SURROGATE.fullmatch(word):
        return _surrogate(group, found[1])
    if _is_made(word):
        return _from_file(group, word)
    if word in GROUPS[group]:
        return GROUPS[group][word]
    points = installed(group)
    if word not in points:
        raise unknown(group, word, {*GROUPS[group], *points})
    point = points[word]
    package = f"package {point.dist.name}" if point.dist else "an installed package"
    try:
        own = point.load()
    except Exception as error:  # somebody else's code
        raise DiffRLError(
            f"{group}={word}: {package} fails at {point.value}: {type(error).__name__}: {error}"
        ) from error
    made: Any = as_component(group, word, own, line=f"{point.attr} of {package}.")
    # what it does is decided by more than its settings
    made.from_package = [package, point.dist.version if point.dist else None, point.value]
    return made


def _is_made(word: str) -> bool:
    """Return whether the class is made for the word: of a file, of several, of another."""
    return ".py:" in word or word.startswith("[") or _SURROGATE.fullmatch(word) is not None


def _composed(group: str, word: str) -> type:
    if group != "reward" or not word.endswith("]"):
        raise DiffRLError(f"{group}={word}: only rewards can be several, reward=[one,other].")
    parts: dict[str, type] = {}
    for part in word[1:-1].split(","):
        name, kind = part.rpartition(":")[2].strip(), component(group, part.strip())
        if name in parts:
            raise DiffRLError(f"reward={word}: {name} is there twice; give each part another name.")
        if getattr(kind, "learned", False):
            raise DiffRLError(
                f"reward={word}: {name} is fitted to a label, and stands alone; leave it out."
            )
        if issubclass(kind, OnlineSurrogateReward):
            raise DiffRLError(f"reward={word}: a surrogate is of the whole; write surrogate[[one,other]].")
        parts[name] = kind
    own = [(name, kind, field(default=kind)) for name, kind in parts.items()]
    schema = make_dataclass("Parts", own)
    word = f"[{','.join(getattr(kind, 'chosen_by', name) for name, kind in parts.items())}]"
    return _around(Composed, "parts", schema, word)


def _surrogate(group: str, word: str) -> type:
    true = component(group, word)
    if group != "reward" or getattr(true, "learned", False):
        raise DiffRLError(f"{group}=surrogate[{word}]: only of a reward, and none that is itself fitted.")
    return _around(OnlineSurrogateReward, "of", true, f"surrogate[{getattr(true, 'chosen_by', word)}]")


def _around(kind: type, name: str, inner: type, word: str) -> type:
    """Return `kind` with the settings of `inner` as those of its field `name`; `word` chooses it."""
    # a class as default: these settings may be incomplete until the command line has been read
    own: list[tuple[str, type, Any]] = [(name, inner, field(default=inner)), ("chosen_by", str, word)]
    namespace = {"__reduce__": _by_word("reward", word), "__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, own, bases=(kind,), namespace=namespace)


def _from_file(group: str, word: str) -> type:
    file, _, name = word.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise DiffRLError(f"{group}={word}: no such file, {path}.")
    # a name of its own: two files may be called alike, and one must not hide a module of that name
    title = f"_diffrl_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[title] = importlib.util.module_from_spec(spec)  # dataclasses look there for types
    _clear_the_way(path.parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise DiffRLError(f"{group}={word}: {path} fails: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == title}
        raise unknown(group, word, {f"{file}:{key}" for key in own})
    source = f"{path}:{name}"
    own, more = getattr(module, name), [("chosen_by", str, source)]
    return as_component(group, source, own, line=f"{name} of {path.name}.", more=more)


def _clear_the_way(folder: Path) -> None:
    """Have what lies in a folder imported from there, not what is called alike in another file's folder."""
    others = [place for place in _FOLDERS if place != folder]
    for neighbour in folder.glob("*.py"):
        loaded = getattr(sys.modules.get(neighbour.stem), "__file__", None)
        if loaded and Path(loaded).parent in others:
            del sys.modules[neighbour.stem]
    sys.path[:] = [place for place in sys.path if place not in map(str, _FOLDERS)]
    _FOLDERS[:] = others if str(folder) in sys.path else [folder, *others]
    sys.path += map(str, _FOLDERS)  # behind all else, of which they hide nothing


def as_component(
    group: str, word: str, own: Any, *, line: str = "", more: Sequence[tuple[str, type, Any]] = ()
) -> type:
    """Return somebody's class or function as a dataclass of its settings.

    Args:
        group: algo, env or reward: what it must be.
        word: that chooses it.
        own: class or function.
        line: its docstring, if it has none.
        more: fields (name, type, default).

    Raises:
        DiffRLError: it is of another kind, or has settings of a type that cannot be written down.
    """
    kind = _KINDS[group]
    if not isinstance(own, type):
        if group != "reward" or not callable(own):
            raise DiffRLError(f"{group}={word}: {own!r} is no class; {kind.advice}")
        own = of_function(own)
    name, doc = own.__name__, own.__doc__ or line
    if base := _with_init(own):
        raise DiffRLError(
            f"{group}={word}: {base.__name__}.__init__ would never be called. Write {name}'s settings as "
            "annotated fields with defaults, and what else it needs into __post_init__(self)."
        )
    try:  # of an undecorated class is_dataclass() says what its base is
        settings = own if "__dataclass_fields__" in vars(own) else dataclass(own)
    except (TypeError, ValueError) as error:
        raise DiffRLError(f"{group}={word}: {name} cannot have these settings: {error}") from error
    for one in fields(settings):
        if one.default is one.default_factory is MISSING:
            raise DiffRLError(f"{group}={word}: {name}.{one.name} has no default; give it one.")
    given = {key for base in own.__mro__[:-1] for key in vars(base)}
    given -= getattr(own, "__abstractmethods__", frozenset())
    if missing := [needed for needed in kind.needed if needed.partition("(")[0] not in given]:
        raise DiffRLError(f"{group}={word}: {name} has no {', no '.join(missing)}; {kind.advice}")
    namespace: dict[str, Any] = {key: value for key, value in kind.defaults.items() if key not in given}
    namespace["__doc__"] = doc
    namespace["__reduce__"] = _by_word(group, word)
    made = make_dataclass(name, more, bases=(settings,), namespace=namespace)
    try:
        OmegaConf.structured(made)
    except OmegaConfBaseException as error:
        why = first_line(error)
        raise DiffRLError(f"{group}={word}: {name} cannot have these settings: {why}") from error
    return made


def _with_init(own: type) -> type | None:
    """Return which class, `own` or a base, has a constructor that somebody wrote; None if none has."""
    for base in own.__mro__[:-1]:
        written = vars(base).get("__init__")
        generated = getattr(getattr(written, "__code__", None), "co_filename", "") == "<string>"
        # as nn.Module's, by super().__init__()
        made_there = base is not own and hasattr(own, "__post_init__")
        if written is not None and not (generated or made_there or getattr(base, "_is_protocol", False)):
            return base
    return None


def _by_word(group: str, word: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return how to pickle what a word made: another process, such as a suite's, cannot import it."""
    return lambda self: (_rebuild, (group, word, asdict(self)))


def _rebuild(group: str, word: str, settings: dict[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(component(group, word)), settings))
