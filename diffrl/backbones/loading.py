"""Finding a checkpoint and reading it: a hub id, a diffusers folder, or one file of the original layout."""

import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel

from diffrl.backbones.architectures import (
    CONFIG_FILES,
    NETWORKS,
    SD_V1,
    Network,
    check_pipeline,
    read_configs,
)
from diffrl.backbones.single_file import read_file
from diffrl.errors import DiffRLError, first_line
from diffrl.log import console
from diffrl.schedule import make_scheduler

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Stable Diffusion v1.5 on the hub."""

_WANTED = ["*.json", "tokenizer/*", *(f"{part.name}/{part.weights}.safetensors" for part in NETWORKS)]
_PICKLE = "pytorch_model.bin"  # of transformers; diffusers names its like its safetensors
_FP16 = ".fp16.safetensors"  # what `from_pretrained(variant="fp16")` leaves
_CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer v1.x and v2.x share
_CLIP_WANTED = ["tokenizer_config.json", "vocab.json", "merges.txt"]
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
_HASHED = (".json", ".txt", *_FILES)
_CHUNK = 1 << 20  # bytes


class Parts(NamedTuple):
    """What a checkpoint consists of."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


def load_parts(model: str, revision: str | None = None) -> Parts:
    """Return the parts of a checkpoint.

    Args:
        model: a hub id, looked up in the cache (HF_HOME) where there is no network (HF_HUB_OFFLINE); a
            diffusers folder; or a file of the original layout.
        revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
        DiffRLError: nothing there, a file missing or damaged, another architecture.
    """
    path = _find(model, revision)
    if path.is_file():
        networks, configs = read_file(model, path)
        tokenizer = _tokenizer_of_file(model, path, configs["tokenizer"])
    else:
        configs = read_configs(model, path)
        networks = {part.name: _network(model, path, part) for part in NETWORKS}
        tokenizer = _tokenizer(model, path / "tokenizer")
    return Parts(**networks, tokenizer=tokenizer, scheduler=make_scheduler(configs["scheduler"]))


def random_parts(model: str) -> Parts:
    """Return the parts of a checkpoint with random weights, always the same: for its speed and size alone.

    Args:
        model: a folder with the config files of the diffusers layout, or `DEFAULT_MODEL`.

    Raises:
        DiffRLError: another hub id, or no such folder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        configs = read_configs(model, folder)
    elif model == DEFAULT_MODEL:
        configs = SD_V1
    else:
        raise DiffRLError(
            f"env.model={model} env.random_weights=true: only {DEFAULT_MODEL} is built in. Give a folder "
            "with the model's config.json files."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = {part.name: part.build(configs[part.name]) for part in NETWORKS}
    if (folder / "tokenizer").is_dir():
        tokenizer = _tokenizer(model, folder / "tokenizer")
    else:
        tokenizer = _spelling_tokenizer(networks["text_encoder"].config)
    return Parts(**networks, tokenizer=tokenizer, scheduler=make_scheduler(configs["scheduler"]))


def fingerprint(model: str) -> str:
    """Return what identifies the checkpoint's content: a hash of its files, or the hub id itself.

    Of a single file, the configs and the tokenizer beside it are among them: they are read with it.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return model
    if path.is_dir():
        files = [(file.name, file) for file in sorted(path.glob("*/*"))]
    else:
        place = path.parent
        beside = [*(place / name for name in CONFIG_FILES.values()), *sorted(place.glob("tokenizer/*"))]
        files = [(path.name, path), *((str(f.relative_to(place)), f) for f in beside if f.is_file())]
    states = ((name, file, file.stat()) for name, file in files if file.suffix in _HASHED)
    return _hash(tuple((name, file, state.st_size, state.st_mtime_ns) for name, file, state in states))


@functools.lru_cache
def _hash(files: tuple[tuple[str, Path, int, int], ...]) -> str:
    """Return a hash of names and contents; size and time tell a file that has changed since it was read."""
    digest = hashlib.sha256()
    for name, file, *_ in files:
        digest.update(name.encode())
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _find(model: str, revision: str | None) -> Path:
    """Return the folder or file that `model` names, downloaded if need be."""
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise DiffRLError(
                f"env.revision={revision}: {model} is on this machine; only hub ids have revisions."
            )
        if path.is_file() and path.suffix not in _FILES:
            raise DiffRLError(
                f"env.model={model}: not a checkpoint file. Give a .safetensors file or a folder."
            )
        return path
    kind = "file" if path.suffix in _FILES else "folder"
    if kind == "file" or path.is_absolute() or not _is_hub_id(model):
        raise DiffRLError(
            f"env.model={model}: no such {kind}, {path.absolute()}. Give the path of a .safetensors file "
            "or of a diffusers folder, or a hub id 'owner/name'."
        )
    # before gigabytes of what is not supported
    check_pipeline(model, _download(model, revision, ["model_index.json"]))
    if not (constants.HF_HUB_OFFLINE or _is_cached(model, revision)):
        console.print(f"env.model={model}: downloading, some GB, to {constants.HF_HUB_CACHE}")
    folder = _download(model, revision, _WANTED)
    bare = [p for p in NETWORKS if not (folder / p.name / f"{p.weights}.safetensors").is_file()]
    if bare:  # an old repository, or one half in the cache
        pickles = [f"{part.name}/{name}" for part in bare for name in (f"{part.weights}.bin", _PICKLE)]
        folder = _download(model, revision, [*_WANTED, *pickles])
        half = [f"{p.name}/{p.weights}{_FP16}" for p in bare if not _has_plain_weights(folder / p.name, p)]
        if half:  # rounded weights, so only where there are no others
            folder = _download(model, revision, [*_WANTED, *pickles, *half])
    return folder


def _is_cached(model: str, revision: str | None) -> bool:
    """Return whether the weights of the largest part are there already, by any of their names."""
    stem, cache = f"unet/{NETWORKS[0].weights}", constants.HF_HUB_CACHE
    files = (f"{stem}{end}" for end in (".safetensors", ".bin", _FP16))
    return any(isinstance(try_to_load_from_cache(model, file, cache, revision), str) for file in files)


def _is_hub_id(model: str) -> bool:
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return "/" in model


def _download(model: str, revision: str | None, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except Exception as error:  # of many kinds, by what went wrong
        # no network, and some of the files in the cache: which is missing is told where it is read
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)
        at = "" if revision is None else f" at revision {revision}"
        raise DiffRLError(
            f"env.model={model}: no such folder here, not in the cache {constants.HF_HUB_CACHE}{at}, and "
            f"not to be had from the hub ({first_line(error)}). Where there is a network run '"
            f"{_hf_download(model, _WANTED, revision)}' and bring its cache here (HF_HOME), or give a "
            "diffusers folder or a .safetensors file."
        ) from error


def _hf_download(model: str, files: Sequence[str], revision: str | None = None) -> str:
    at = [] if revision is None else [f"--revision {revision}"]
    return " ".join(["hf download", model, *at, *(f'--include "{name}"' for name in files)])


def _network(model: str, folder: Path, part: Network) -> nn.Module:
    """Return a network with all its weights."""
    place = folder / part.name
    # a weight of another shape is then in the report too, by name
    asked: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if not _has_plain_weights(place, part):
        _check_files(model, place, [[f"{part.weights}.safetensors"], [f"{part.weights}{_FP16}"]])
        asked["variant"] = "fp16"
        warnings.warn(f"{model}: {part.name} is there in fp16 alone: rounded weights.", stacklevel=2)
    if issubclass(part.kind, PreTrainedModel):
        asked["dtype"] = torch.float32  # else that of its config, to which it would round float32 weights
    network, report = _read(model, place, part.kind, **asked)
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise DiffRLError(
            f"env.model={model}: {part.name} {name!r} has shape {list(found)}, by its config.json "
            f"{list(wanted)}: another architecture."
        )
    for name in sorted(report["missing_keys"]):
        raise DiffRLError(f"env.model={model}: no weights for {part.name} {name!r}: another architecture.")
    return network


def _has_plain_weights(place: Path, part: Network) -> bool:
    """Return whether the weights of a part are there, by any of their names but the fp16 variant's."""
    names = [f"{part.weights}{end}" for end in (".safetensors", ".safetensors.index.json", ".bin")]
    return any((place / name).is_file() for name in [*names, _PICKLE])


def _tokenizer(model: str, place: Path, **settings: Any) -> CLIPTokenizer:
    # transformers takes a folder without these for an empty vocabulary
    _check_files(model, place, [["tokenizer.json"], ["vocab.json", "merges.txt"]])
    return _read(model, place, CLIPTokenizer, **settings)


def _check_files(model: str, place: Path, sets: list[list[str]]) -> None:
    """Raise DiffRLError unless `place` has all files of one of the `sets`."""
    if not any(all((place / name).is_file() for name in names) for names in sets):
        raise DiffRLError(
            f"env.model={model}: {place / sets[0][0]} is missing; was the download cut short? Run "
            "'hf download' again, or give a complete folder or a .safetensors file."
        )


def _read(model: str, place: Path, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(place, local_files_only=True, **options)
    except Exception as error:  # each library has its own; all mean that it cannot be loaded
        pickled = list(place.glob("*.bin")) and not list(place.glob("*.safetensors"))
        hint = "Pickles with more than tensors are not run; give .safetensors files." if pickled else ""
        raise DiffRLError(
            f"env.model={model}: {place.name} cannot be loaded from {place}: {first_line(error)} "
            f"{hint or 'Download it again, or give a complete diffusers folder.'}"
        ) from error


def _tokenizer_of_file(model: str, path: Path, settings: Mapping[str, Any]) -> CLIPTokenizer:
    """Return the tokenizer beside the file, or CLIP's from the hub: such a file has none."""
    beside = path.parent / "tokenizer"
    if beside.is_dir():
        return _tokenizer(model, beside)
    try:
        place = Path(snapshot_download(_CLIP, allow_patterns=_CLIP_WANTED))
    except Exception as error:
        raise DiffRLError(
            f"env.model={model}: a single file has no tokenizer, there is none in {beside}, and {_CLIP} is "
            f"neither in the cache {constants.HF_HUB_CACHE} nor to be had from the hub. Put the tokenizer "
            "folder of any Stable Diffusion there, or where there is a network run "
            f"'{_hf_download(_CLIP, _CLIP_WANTED)}'."
        ) from error
    return _tokenizer(model, place, **settings)


def _spelling_tokenizer(config: Any) -> CLIPTokenizer:
    """Return CLIP's tokenizer without its merges: prompts are spelt, a token a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": config.vocab_size - 2, "<|endoftext|>": config.vocab_size - 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=config.max_position_embeddings)
