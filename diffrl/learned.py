"""The learned reward: pictures, a classifier fitted to them, and what the cache keeps of both.

Shapes: M pictures `[M, 3, S, S]`.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from diffrl import __version__, disk, memory, processes, settings_file
from diffrl import config as settings
from diffrl.build import Setup
from diffrl.cache import cache_folder
from diffrl.conflicts import is_learned
from diffrl.datasets import PictureFiles
from diffrl.errors import DiffRLError
from diffrl.log import console, progress
from diffrl.policy import Policy, Pretrained
from diffrl.rewards.fit import FEWEST
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.log_likelihood import LAYOUT, LogLikelihood, ReplacedNetworksError
from diffrl.rollout import rollout
from diffrl.types import Reward

_FEW = 100  # pictures of a class
_REHEARSED = 128  # pictures of a rehearsal
_FITTED = 3  # part of the cache's key: raise it when the same settings come to draw or fit otherwise


def make_reward(setup: Setup, policy: Policy) -> Reward:
    """Return the chosen reward, fitted and calibrated if it is a learned one and not in the cache.

    Raises:
        DiffRLError: a classifier from a file does not suit, or the pictures do not suffice for a fit.
    """
    chosen = setup.config.reward
    if not is_learned(chosen):
        return chosen
    if chosen.classifier:
        reward = chosen.load()
        _check_side(reward, setup.backbone.image_size, chosen.classifier)
    else:
        reward = _cached(setup, policy)
    reward.ceiling = chosen.ceiling
    return reward.to(setup.device)


def is_at_hand(setup: Setup) -> bool:
    """Return whether `make_reward` has nothing to fit."""
    chosen = setup.config.reward
    return not is_learned(chosen) or bool(chosen.classifier) or classifier_file(setup).is_file()


def rehearse(setup: Setup, pictures: Tensor | PictureFiles) -> LogLikelihood:
    """Return the learned reward after a fit to `rehearsal_size` pictures under labels dealt at random.

    It has the layout and the cost of the one that would be fitted, and its gradient, and knows nothing.

    Args:
        setup: whose reward it is.
        pictures: any few of the env's, `[N, 3, S, S]`, or those of a data set; each is taken several times
            if they do not suffice.
    """
    chosen, few = setup.config.reward, torch.arange(rehearsal_size(setup)) % len(pictures)
    if isinstance(pictures, PictureFiles):
        entries = [pictures.entries[place] for place in few.tolist()]
        pictures = PictureFiles(entries, pictures.side, pictures.workers)
    else:
        pictures = pictures.cpu()[few]
    reward: LogLikelihood = chosen.fit(pictures, 0, from_pretrained=setup.dataset is None, rehearsal=True)
    reward.ceiling = chosen.ceiling
    return reward.to(setup.device)


def rehearsal_size(setup: Setup) -> int:
    """Return how many pictures are few, and enough for each class to have some."""
    return max(_REHEARSED, FEWEST * max(setup.num_classes()))


def classifier_file(setup: Setup) -> Path:
    """Return where the cache has the fitted classifier, or will have it."""
    return cache_folder() / f"{_classifier_key(setup)}.safetensors"


def _cached(setup: Setup, policy: Policy) -> LogLikelihood:
    path = classifier_file(setup)
    path.parent.mkdir(parents=True, exist_ok=True)
    with processes.led():  # by the one that speaks; the others wait at the lock, without a time limit
        lock = FileLock(f"{path}.lock").acquire()  # cells of a suite want the same one at once
    with lock:
        reward = _loaded(path) if path.is_file() else None
        if reward is None:
            reward = _fitted(setup, policy)
            reward.save(path)
            if setup.dataset is None:
                _forget_pictures(setup)
    _warn_of_few(reward)
    return reward


def _loaded(path: Path) -> LogLikelihood | None:
    """Return what the cache has; None if it stands on networks that were replaced since."""
    try:
        reward = LogLikelihood.load(path)
    except ReplacedNetworksError:
        console.print("classifier: fitted anew, as the networks of the one in the cache were replaced")
        return None
    console.print(f"classifier: from the cache, {path}")
    return reward


def _fitted(setup: Setup, policy: Policy) -> LogLikelihood:
    chosen, seed = setup.config.reward, setup.config.seed
    if setup.dataset is None:
        return chosen.fit(_drawn(setup, policy), seed, from_pretrained=True)
    console.print(f"dataset: reading {len(setup.dataset)} pictures of {setup.config.dataset}")
    reward = chosen.fit(setup.dataset, seed, from_pretrained=False)
    warn_of_unreadable(setup.dataset)
    return reward


def _drawn(setup: Setup, policy: Policy) -> Tensor:
    """Return `num_pictures` pictures of the pretrained model, uint8: CTRL's offline dataset.

    They lie in a file, not in memory, and are there again if the fit refuses them.
    """
    path, side, count = _pictures_file(setup), setup.backbone.image_size, setup.config.reward.num_pictures
    size = count * 3 * side**2
    with FileLock(f"{path}.lock"), disk.told(path, "Make room, or set DIFFRL_CACHE to another folder."):
        if path.is_file():
            console.print(f"offline dataset: drawn before, {path}")
        else:
            _write_pictures(setup, policy, count, path)
        pictures = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return pictures.view(count, 3, side, side)


def _write_pictures(setup: Setup, policy: Policy, count: int, path: Path) -> None:
    at_once, left = setup.config.eval_batch, count
    env, generator = setup.make_env(Jpeg(), min(at_once, count)), setup.generator(1)
    with (
        progress("drawing the offline dataset", count) as bar,
        memory.told("eval_batch", at_once),
        disk.replacing(path) as draft,
        draft.open("wb") as file,
    ):
        while left > 0:
            seed = setup.config.seed if left == count else None
            images = rollout(env, Pretrained(policy), generator, seed=seed).images
            file.write((255 * images[:left]).round().byte().cpu().numpy().tobytes())
            left -= env.num_envs
            bar.advance(env.num_envs)


def _forget_pictures(setup: Setup) -> None:
    path = _pictures_file(setup)
    with FileLock(f"{path}.lock"):
        path.unlink(missing_ok=True)


def _pictures_file(setup: Setup) -> Path:
    """Return where the pictures lie until a classifier is fitted to them, whatever its settings."""
    count = setup.config.reward.num_pictures
    facts = [__version__, _FITTED, setup.config.seed, count, *_drawn_by(setup)]
    return cache_folder() / f"{_digest(facts)}.pictures"


def _drawn_by(setup: Setup) -> list[Any]:
    """Return what decides the pictures besides the seed and their number."""
    env = settings_file.facts(setup.config)["env"]
    env.pop("compile", None)  # the same pictures, but for their rounding
    whose = getattr(setup.config.env, "from_package", [])  # it may have all of emoji's settings
    return [env, setup.prompts, setup.config.eval_batch, str(setup.device.type), *whose]


def _classifier_key(setup: Setup) -> str:
    """Return a hash of all that decides the classifier: model, sampler, prompts, data, settings."""
    config = setup.config
    fitted = asdict(config.reward)
    del fitted["ceiling"]  # of the reward, not of its classifier
    facts = [__version__, LAYOUT, _FITTED, settings.chosen(config, "reward"), fitted, config.seed]
    facts += _drawn_by(setup) if setup.dataset is None else [setup.dataset.fingerprint()]
    return _digest(facts)


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def warn_of_unreadable(dataset: PictureFiles) -> None:
    """Tell of the pictures that could not be read so far."""
    if lost := dataset.unreadable:
        console.print(
            f"[yellow]dataset[/]: {len(lost)} of {len(dataset)} pictures cannot be read and are left out, "
            f"the first is {dataset.entries[min(lost)].path}"
        )


def _warn_of_few(reward: LogLikelihood) -> None:
    """Tell of classes with hardly any picture."""
    for attribute in reward.attributes:
        counts = attribute.report.class_counts
        if min(counts) < _FEW:
            console.print(
                f"[yellow]{attribute.name}[/]: only {min(counts)} pictures of class "
                f"{counts.index(min(counts))}, of {list(counts)} in all; below {_FEW} a class its "
                "classifier is hardly to be trusted"
            )


def _check_side(reward: LogLikelihood, side: int, path: object) -> None:
    """Raise DiffRLError if a classifier has learnt from pictures of another size than those to score."""
    for attribute in reward.attributes:
        fitted = attribute.report.side
        if fitted not in (None, side) and not attribute.networks:  # a network sees any size as its own
            raise DiffRLError(
                f"reward.classifier={path}: fitted to pictures of {fitted} px, and this env's have {side}: "
                f"another {attribute.measure.title}. Run 'diffrl fit' with this env."
            )
