"""Checkpoints that survive: each a folder that is whole or not there, proven by a manifest.

Order of a save: every file is written under a temporary name and synced; the manifest, with the size and
SHA-256 of each, comes last; then the folder gets its name, and its parent is synced. Only then are older
ones deleted. What is latest follows from the manifests: there is no link to be wrong. safetensors and JSON
only, so that reading one executes nothing.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffrl import disk
from diffrl.errors import DiffRLError

MANIFEST = "manifest.json"
_TENSORS, _STATE = "tensors.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_DRAFT = ".tmp-"


class DamagedError(DiffRLError):
    """A checkpoint whose files are not those that its manifest tells of."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, and what it claims of the state that is made of it."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    claims: dict[str, Any]


def write(
    parent: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    claims: Mapping[str, Any] | None = None,
    keep: int = 1,
    spare: int | None = None,
) -> Path:
    """Write a checkpoint of these tensors and facts, delete all but the last `keep`, and return its folder.

    Args:
        parent: holds the checkpoints of one run, and is made if it is not there.
        step: counts updates; one that is there already and whole is left: the same step is the same state.
            Later ones, which the run did not begin with, are damaged, and are deleted.
        tensors: by name.
        state: in JSON's types.
        claims: of the live state, in JSON's types, for who loads it to hold against what came of it.
        keep: 1 or more.
        spare: the step of one that is kept however old.

    Raises:
        DiffRLError: it cannot be written; those before it are as they were.
    """
    folder = parent / f"step-{step:06d}"
    if folder.exists():
        try:
            _verified(folder)
            return folder
        except DamagedError:
            shutil.rmtree(folder, ignore_errors=True)
    draft = parent / f"{folder.name}{_DRAFT}{uuid.uuid4().hex}"
    contents = {
        _TENSORS: save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        _STATE: json.dumps(state).encode(),
    }
    try:
        draft.mkdir(parents=True)
        for name, content in contents.items():
            _write(draft / name, content)
        _write(draft / MANIFEST, _manifest(step, contents, claims or {}))
        disk.sync(draft)
        os.rename(draft, folder)
        disk.sync(parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        advice = "There is none before it; make room, and begin again."
        if _steps(parent):
            advice = "Those before it are intact; make room, then go on with --resume."
        raise DiffRLError(
            f"{folder}: the checkpoint cannot be written ({error.strerror or error}). {advice}"
        ) from error
    there = _steps(parent)
    later = [other for other in there if step_of(other) > step]  # damaged: else the run had begun there
    past = max(len(there) - len(later) - keep, 0)
    olds = [old for old in there[:past] if step_of(old) != spare] + later
    for old in [*olds, *parent.glob(f"*{_DRAFT}*")]:  # drafts: of saves that were killed
        shutil.rmtree(old, ignore_errors=True)
    return folder


def read(folder: Path) -> Checkpoint:
    """Return what a checkpoint holds.

    Raises:
        DamagedError: a file is missing, or has another size or content than when it was written.
    """
    claims, contents = _verified(folder)
    try:
        return Checkpoint(load(contents[_TENSORS]), json.loads(contents[_STATE]), claims)
    except (KeyError, SafetensorError, ValueError) as error:
        raise DamagedError(f"{folder}: not a checkpoint of this version ({error}).") from error


def newest_first(parent: Path) -> Iterator[Path]:
    """Yield the checkpoints of a run, the latest first; whether they are whole shows when they are read."""
    yield from reversed(_steps(parent))


def step_of(folder: Path) -> int:
    """Return the number of updates that a checkpoint was taken after."""
    return int(folder.name.removeprefix("step-"))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tensors as they lie now, of shapes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(save({"": tensor.detach().cpu().contiguous()}))
    return found.hexdigest()


def _steps(parent: Path) -> list[Path]:
    found = parent.iterdir() if parent.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def _manifest(step: int, contents: Mapping[str, bytes], claims: Mapping[str, Any]) -> bytes:
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    facts = json.dumps({"step": step, "claims": claims, "files": files}, indent=1)
    return f"{hashlib.sha256(facts.encode()).hexdigest()}\n{facts}\n".encode()


def _verified(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest's claims, and the content of every file that it names."""
    path = folder / MANIFEST
    try:
        digest, facts = path.read_bytes().split(b"\n", 1)
        if digest != hashlib.sha256(facts.removesuffix(b"\n")).hexdigest().encode() or facts[-1:] != b"\n":
            raise DamagedError(f"{path}: damaged, its own hash is another.")
        manifest = json.loads(facts)
        if manifest["step"] != step_of(folder):
            raise DamagedError(f"{path}: of step {manifest['step']}, its folder was renamed.")
        contents = {}
        for name, known in manifest["files"].items():
            content = (folder / name).read_bytes()
            if len(content) != known["bytes"]:
                size = f"{len(content)} bytes, {known['bytes']} were written"
                raise DamagedError(f"{folder / name}: {size}.")
            if hashlib.sha256(content).hexdigest() != known["sha256"]:
                raise DamagedError(f"{folder / name}: damaged, its SHA-256 is another.")
            contents[name] = content
        return manifest.get("claims", {}), contents
    except OSError as error:
        raise DamagedError(f"{error.filename or path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError) as error:
        raise DamagedError(f"{path}: not a manifest ({error}).") from error


def _write(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    finally:
        os.close(handle)
