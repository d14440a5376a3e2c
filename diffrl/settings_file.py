"""A run's settings on disk and on the command line: written, read back, compared, asked for again."""

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from diffrl import disk
from diffrl.backbones.loading import fingerprint
from diffrl.components import CUSTOM, GROUPS, content, register, word_of
from diffrl.config import Config, chosen, load, located, to_objects, tree
from diffrl.envs.prompts import split_path
from diffrl.errors import DiffRLError

AT_A_TIME = ("algo.micro_batch_size", "eval_batch")
"""How many pictures are held at once: settings of the machine, which may change on the way."""


def read(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of a run's `config.yaml`; those younger than the run are their defaults.

    Args:
        path: of the file.
        overrides: `key=value` words that override it.

    Raises:
        DiffRLError: no such file, one that is damaged or cut short, a setting that this version lacks.
    """
    with _readable(path):
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        asked = {group: word_of(stored.pop("_" + group), stored[group]) for group in GROUPS}
        composed = tree([f"{group}={_registered(group, word, path)}" for group, word in asked.items()])
        if (last := fields(Config)[-1].name) not in stored:
            raise ValueError(f"it is cut short: its last setting, {last!r}, is missing")
        whole = OmegaConf.merge(composed, stored, OmegaConf.from_dotlist(list(overrides)))
        return located(to_objects(whole))


def read_env(path: Path) -> Any:
    """Return the settings of a run's env alone: a stranger's file, of which nothing is imported.

    Raises:
        DiffRLError: no such file, one that is damaged, an env that does not come with diffrl.
    """
    with _readable(path):
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        if (name := stored["_env"]) not in GROUPS["env"] or name == CUSTOM:
            raise ValueError(f"its env {name!r} is none that comes with diffrl")
        composed = tree([f"env={name}"])
        return to_objects(OmegaConf.merge(composed, {"env": stored["env"]})).env


def write(config: Config, path: Path, *, here: bool = True) -> None:
    """Write every setting as YAML, with the names of the chosen components.

    Args:
        config: the settings.
        path: of the file.
        here: for this machine; else files of the user's own, but the model's, go by their names alone.
    """
    stored = _stored(config)
    if not here:
        model = stored["env"].get("model")
        stored = _elsewhere(stored)
        stored["env"] |= {"model": model} if model else {}
    with disk.replacing(path) as draft:
        draft.write_text(yaml.safe_dump(stored, sort_keys=False), encoding="utf-8")


def facts(config: Config) -> dict[str, Any]:
    """Return all that decides a run's numbers: the settings, of a model or a file of yours its content."""
    found = _stored(config)
    for name in ("name", "root", "resume", "checkpoint_every", "keep_last", "reward_timeout"):
        del found[name]
    if "model" in found["env"]:
        found["env"]["model"] = fingerprint(found["env"]["model"])
    for name in ("prompts", "eval_prompts"):
        found[name] = _list_content(found[name])
    return _with_content(found)


def same(stored: Mapping[str, Any], config: Config) -> bool:
    """Return whether `stored`, from `facts`, is `config`; younger settings count as defaults."""
    return not changed(stored, facts(config))


def changed(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two of `facts` each have, of the settings that differ but for those of `AT_A_TIME`."""
    new, then, defaults = _flat(now), _flat(stored), {}
    if new.keys() - then.keys():
        composed = tree([f"{group}={now['_' + group]}" for group in GROUPS])
        defaults = _flat(OmegaConf.to_container(composed))  # type: ignore[arg-type]
    names = [name for name in [*new, *then] if name not in AT_A_TIME]
    both = {name: (then.get(name, defaults.get(name)), new.get(name)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1] or name not in new}


def words(config: Config) -> list[str]:
    """Return the words that ask 'diffrl train' for these settings, without those that are its defaults."""
    stored, usual = _stored(config), load([])
    choices = {group: word_of(stored.pop("_" + group), stored[group]) for group in GROUPS}
    choices = {group: word for group, word in choices.items() if word != chosen(usual, group)}
    composed = tree([f"{group}={register(group, word)}" for group, word in choices.items()])
    defaults = _flat(OmegaConf.to_container(composed))  # type: ignore[arg-type]
    return [f"{group}={word}" for group, word in choices.items()] + [
        f"{key}={_word(value)}"
        for key, value in _flat(stored).items()
        if key not in ("name", "root") and value != defaults.get(key)
    ]


def command(config: Config, *, here: bool = True) -> str:
    """Return the line that trains with these settings; files by their names alone if it is not for here."""
    asked = words(config)
    return shlex.join(["diffrl", "train", *(asked if here else map(_elsewhere, asked))])


def plain(value: Any) -> Any:
    """Return a value in YAML's types: a path, which a component of somebody's may have, as a string."""
    return _mapped(value, lambda leaf: str(leaf) if isinstance(leaf, Path) else leaf)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of a file that is missing, or not what it should be, what is wrong with it."""
    if not path.is_file():
        raise DiffRLError(f"{path.parent}: not a run directory, it has no {path.name}.")
    try:
        yield
    except (OSError, TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's errors have several lines
        raise DiffRLError(f"{path}: cannot be read as a run's settings ({reason}).") from error


def _registered(group: str, word: str, path: Path) -> str:
    """Return the name of what a stored word asks for, see `register`."""
    try:
        return register(group, word)
    except DiffRLError as error:
        raise DiffRLError(
            f"{error} So it stands in {path}, at chosen_by; if a file of yours was moved, change it there."
        ) from error


def _stored(config: Config) -> dict[str, Any]:
    stored = {"_" + group: chosen(config, group) for group in GROUPS}
    return stored | plain(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tree with every leaf changed."""
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return [_mapped(each, change) for each in value] if isinstance(value, list) else change(value)


def _with_content(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the content of each file of the user's own in the place of its path."""
    return {
        name: _with_content(value)
        if isinstance(value, dict)
        else content(value)
        if name == "chosen_by"
        else value
        for name, value in tree.items()
    }


def _list_content(word: str | None) -> str | None:
    """Return what chooses prompts, of a file with a hash of its content in the place of its folder."""
    kind, path = split_path(word or "")
    if path is None or not path.is_file():
        return word
    return f"{kind}{hashlib.sha256(path.read_bytes()).hexdigest()}/{path.name}"


def _elsewhere(value: Any) -> Any:
    """Return a word, or a tree of them, without the folders of the full paths in it."""

    def bare(leaf: Any) -> Any:
        if not isinstance(leaf, str) or "://" in leaf:
            return leaf
        return re.sub(r"(?<![^=\[,:'])/[^,:\]]*/", "", leaf)

    return _mapped(value, bare)


def _word(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"(?!(true|false|null|nan|inf)$)[A-Za-z_/~][\w./~:-]*", value, re.IGNORECASE)
    return value if plain else "'" + value.replace("'", r"\'") + "'"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
