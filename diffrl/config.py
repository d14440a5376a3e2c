"""The command line's `key=value` words to settings, through Hydra.

One dataclass a component is its schema: fields, defaults, and a line of help in the comment beside
each. Presets are YAML in `diffrl/conf/`.
"""

import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.algorithms.guidance.base import Unguided
from diffrl.components import CUSTOM, GROUPS, installed, register
from diffrl.envs.prompts import LISTS
from diffrl.errors import DiffRLError, unknown, unknown_setting
from diffrl.policy import LoRA

CONF = Path(__file__).parent / "conf"
"""Where the presets and suites lie."""

_FILES = {"prompts", "eval_prompts", "dataset", "clip", "mlp", "classifier"}
"""The settings that may name a file; of an env its `model` may too, which of a reward is a server's."""


@dataclass
class Config:
    """Everything that decides a run; its last setting stays last, and shows that a stored file is whole."""

    algo: Any
    env: Any
    reward: Any
    guidance: Any = field(default_factory=Unguided)  # of evaluations and samples; training has none
    policy: LoRA = field(default_factory=LoRA)
    prompts: str = "simple_animals"  # a list, a text file, a CSV with labels, imagenet_animals:PATH
    eval_prompts: str | None = None  # of evaluations, such as eval_animals; null: the same
    dataset: str | None = None  # AVA, metadata.csv or .jsonl, or pictures; null: drawn from the model
    dataset_pictures: int | None = None  # so many of them, drawn by the seed; null: all
    dataset_workers: int = 0  # processes that read its pictures; 0: this one
    reward_timeout: float | None = 600.0  # seconds a black box may take for a micro-batch; null: for ever
    clip: str | None = None  # a CLIP model, a folder or a hub id, for CLIPScore
    seed: int = 0  # of all that is drawn
    resume: str = "never"  # or auto: go on with the run of this name, if it is there
    checkpoint_every: int = 50  # updates between two checkpoints, from which a run can be resumed
    keep_last: int = 2  # checkpoints of a run that are kept
    keep_best: str | None = None  # metric, such as eval/accuracy, whose best evaluation's weights are kept
    patience: int | None = None  # evaluations in a row without a better one that end the run; null: none do
    name: str = ""  # of the run's folder; empty: from algo, env, reward and seed
    root: str = "runs"  # where runs are kept
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    eval_every: int = 50  # updates between two evaluations
    eval_batch: int = 64  # pictures, or particles, drawn at a time where nothing is learnt from them
    eval_pictures: int = 64  # of an evaluation on the way; the last one draws four times as many
    eval_scales: list[float] = field(default_factory=list)  # of the control, for the last evaluation too


@dataclass
class _Schema(Config):
    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"algo": "ctrl"},
            {"env": "emoji"},
            {"reward": "compressibility"},
            {"guidance": "none"},
            # presets that apply by themselves: what an env needs, what suits an algorithm on it
            {"optional tuned_env": "${env}"},
            {"optional tuned_pair": "${algo}_${env}"},
        ]
    )
    algo: Any = None
    env: Any = None
    reward: Any = None
    guidance: Any = None


def experiments() -> dict[str, str]:
    """Return `{name: first comment line}` of the presets for `+experiment=`."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
        for path in sorted((CONF / "experiment").glob("*.yaml"))
    }


def load(overrides: list[str]) -> Config:
    """Return the settings that `key=value` words ask for.

    Raises:
        DiffRLError: as `composed`, or a value that its component refuses.

    Examples:
        >>> config = load(["algo=ddpo", "algo.kl=0.1"])
        >>> config.algo.kl, chosen(config, "env")
        (0.1, 'emoji')
    """
    return located(to_objects(composed(overrides)))


def composed(overrides: list[str]) -> DictConfig:
    """Return the same as a tree: names, values and types, which no component has checked.

    Raises:
        DiffRLError: a word that does not parse, an unknown group, name or key, a value of the wrong type.
    """
    overrides = [_registered(word) for word in overrides]
    _check_groups(overrides)
    overrides = [*_own_reward(overrides), *overrides]
    try:
        return tree(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from error


def tree(overrides: list[str]) -> DictConfig:
    """Return what Hydra composes of words that are known to be right, with the presets that they bring."""
    _register()
    GlobalHydra.instance().clear()
    with initialize_config_module("diffrl.conf", version_base="1.3"):
        return compose("config", overrides=overrides)


def sweep(overrides: list[str], job: Callable[[Config], object]) -> None:
    """Do `job` for every combination of settings, given with commas, through a Hydra launcher.

    `hydra/launcher=...` is another one than the built-in, which does them in turn. Unless `root` and `name`
    say otherwise, a run lies in the sweep's folder and is named after the settings that vary. Hydra tells
    of a job's mistake when all are done, and ends the process.

    Raises:
        DiffRLError: a word that does not parse, an env among several that has a reward of its own, a
            component from a file for a launcher whose processes know nothing of it.
    """
    launchers = [
        word for word in overrides if key_of(word) == "hydra/launcher" and not word.endswith("=basic")
    ]
    files = [word for word in overrides if key_of(word) in GROUPS and ".py:" in word]
    if launchers and files:
        raise DiffRLError(
            f"{files[0]} {launchers[0]}: its processes cannot take a component from a file; sweep in turn, "
            "without a launcher."
        )
    overrides = [_registered(word) for word in overrides]
    words = [word for word in overrides if key_of(word) != "hydra/launcher"]
    try:
        varied = [o for o in OverridesParser.create().parse_overrides(words) if o.is_sweep_override()]
    except HydraException as error:
        raise DiffRLError(
            f"{' '.join(str(error).split())} Write key=value, quotes round blanks."
        ) from error
    for word in words:
        _check_form(word)
    keys = [override.key_or_group for override in varied]
    given = {key_of(word) for word in words}
    if "env" in keys and "reward" not in given:
        raise DiffRLError("env: several of them in a sweep need one reward that suits all; give reward=...")
    groups = {*GROUPS, "experiment"}
    name = ",".join(f"{key}=${{{'hydra:runtime.choices.' * (key in groups)}{key}}}" for key in keys)
    words = [*_own_reward(words), *overrides]
    words += [] if "root" in given else ["root=${hydra:sweep.dir}"]
    words += [] if "name" in given or not keys else [f"name='{name}'"]
    _register()

    @hydra.main(config_path="pkg://diffrl.conf", config_name="config", version_base="1.3")
    def one(composed: DictConfig) -> None:
        try:
            job(located(to_objects(composed)))
        except DiffRLError as error:  # Hydra shows a traceback of all others
            raise CompactHydraException(f"diffrl: {error}") from error

    arguments, sys.argv = sys.argv, ["diffrl", "--multirun", *words]
    try:
        one()
    finally:
        sys.argv = arguments


def located(config: Config) -> Config:
    """Return the settings with the full paths of files, so that a run can be gone on with from anywhere."""
    _locate(config, _FILES)
    _locate(config.env, {"model"})
    return config


def chosen(config: Config, group: str) -> str:
    """Return the name under which the config's algo, env, reward or guidance is known."""
    return name_of(group, type(getattr(config, group)))


def name_of(group: str, kind: type) -> str:
    """Return the name under which a group knows a component."""
    return next((name for name, known in GROUPS[group].items() if known is kind), CUSTOM)


def to_objects(composed: Any) -> Config:
    """Return the composed tree as dataclasses; their own checks run here."""
    values: dict[str, Any] = {}
    for key in composed:
        if key != "defaults":
            node = composed._get_node(key)
            values[key] = OmegaConf.to_object(node) if isinstance(node, DictConfig) else composed[key]
    return Config(**values)


def _locate(part: Any, names: Collection[str]) -> None:
    for one in fields(part):
        value = getattr(part, one.name)
        if is_dataclass(value) and not isinstance(value, type):
            _locate(value, names)
        elif one.name in names or isinstance(value, Path):
            object.__setattr__(part, one.name, _full(value))  # of somebody's, it may be frozen


def key_of(word: str) -> str:
    """Return the key of a `key=value` word, `+key=value` too."""
    return word.lstrip("+").partition("=")[0]


def _full(value: Any) -> Any:
    """Return the full path of a file that is there, in a word or a list of them; all else as it is."""
    if isinstance(value, list):
        return [_full(each) for each in value]
    if isinstance(value, Path):
        return _place(value.expanduser()) if value.expanduser().exists() else value
    if not isinstance(value, str) or value in LISTS:
        return value
    kind, colon, file = value.rpartition(":")  # as in imagenet_animals:PATH
    path = Path(file).expanduser()
    return f"{kind}{colon}{_place(path)}" if file and path.exists() else value


def _place(path: Path) -> Path:
    """Return the full path; of a link its own: in the hub's cache, what it leads to has no suffix."""
    return path.parent.resolve() / path.name if path.is_symlink() else path.resolve()


def _register() -> None:
    """Tell Hydra of the components that it does not know: telling it of one is slow."""
    store = ConfigStore.instance()
    store.store(name="config", node=_Schema)
    for group, known in GROUPS.items():
        held = store.repo.get(group, {})
        for name, node in known.items():
            if f"{name}.yaml" not in held or OmegaConf.get_type(held[f"{name}.yaml"].node) is not node:
                store.store(group=group, name=name, node=node)


def _registered(word: str) -> str:
    """Return the word with the name under which Hydra knows what it chooses."""
    key, equals, name = word.partition("=")
    return f"{key}={register(key, name)}" if equals and key in GROUPS else word


def _check_form(word: str) -> None:
    if "=" not in word or word.startswith("~"):  # Hydra's for a setting to be left out: none may be
        raise DiffRLError(f"{word}: not of the form key=value.")


def _check_groups(overrides: list[str]) -> None:
    known: dict[str, Collection[str]] = {**GROUPS, "experiment": experiments()}
    for word in overrides:
        _check_form(word)
        group, _, name = word.lstrip("+").partition("=")
        if group in known and name not in known[group]:
            raise unknown(group, name, {*known[group], *installed(group)})


def _own_reward(overrides: list[str]) -> list[str]:
    """Return the word that chooses an env's own reward, where it has one and nothing else is asked for.

    Hydra forbids this in `tuned_env/`: a preset chosen by another choice cannot choose in turn.
    """
    chosen = dict(word.lstrip("+").split("=", 1) for word in overrides)
    reward = getattr(GROUPS["env"].get(chosen.get("env", "")), "own_reward", None)
    return [f"reward={reward}"] if reward and not {"reward", "experiment"} & chosen.keys() else []


def _explain(error: Exception, overrides: list[str]) -> DiffRLError:
    """Turn Hydra's several lines into one that names the word that caused them."""
    text = str(error.__cause__ or error)
    words: dict[str, Any] = {}
    for word in overrides:
        try:
            words |= {o.key_or_group: o for o in OverridesParser.create().parse_overrides([word])}
        except HydraException:
            return DiffRLError(f"{word}: cannot be parsed. Write key=value, with quotes round blanks.")
    bare = [word for word in overrides if key_of(word) in {*GROUPS, "experiment"}]
    known = _keys(tree(bare))
    for key in words:
        if key not in known and key not in {*GROUPS, "experiment"}:
            return unknown_setting(key, known)
    for key, override in sorted(words.items(), reverse=True):  # algo.gamma before algo
        if re.search(rf"full_key: {re.escape(key.rpartition('.')[2])}\b|{re.escape(key)}\b", text):
            reason = text.splitlines()[0]
            return DiffRLError(f"{key}={override.get_value_element_as_str()}: {reason}")
    return DiffRLError(" ".join(text.split()))


def _keys(config: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        keys.append(f"{prefix}{key}")
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            keys += _keys(node, f"{prefix}{key}.")
    return keys
