"""From settings to objects: the model, its policy, its reward.

Shapes: M pictures `[M, 3, S, S]`.
"""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from diffrl import __version__, datasets, disk, memory, processes, settings_file
from diffrl import config as settings
from diffrl.algorithms.guidance.base import Guidance
from diffrl.cache import cache_folder
from diffrl.config import Config
from diffrl.conflicts import check, is_learned
from diffrl.datasets import Entry, PictureFiles
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.prompts import load_prompts
from diffrl.errors import DiffRLError
from diffrl.log import console, progress
from diffrl.policy import Policy, Pretrained
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.log_likelihood import LAYOUT, LogLikelihood
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule
from diffrl.types import Backbone, Reward, stream_seed

_FEW = 100  # pictures of a class
_FULL = "The model alone does not fit beside what else is there: end that, or take another device."
_FITTED = 3  # part of the cache's key: raise it when the same settings come to draw or fit otherwise


class Setup:
    """The loaded model of a config, and what is made from it.

    Raises:
        DiffRLError: settings that contradict each other, before anything is loaded or written.
    """

    def __init__(self, config: Config) -> None:
        check(config)
        self.config = config
        self.device = processes.join(_device(config.device))
        console.quiet = not processes.is_first()
        if getattr(config.env, "random_weights", False):
            console.print("env.random_weights=true: for speed and memory alone; the result means nothing.")
        self.prompts = load_prompts(config.prompts, self.num_classes())
        self.eval_prompts = load_prompts(config.eval_prompts or config.prompts, self.num_classes())
        entries = self._read_dataset()
        with memory.advised(f"device={self.device}", _FULL):
            self.backbone: Backbone = config.env.load().to(self.device)
        self.schedule = DDIMSchedule(self.backbone.scheduler, config.env.num_steps, config.env.eta).to(
            self.device
        )
        self.dataset: PictureFiles | None = None
        if entries is not None:
            self.dataset = PictureFiles(entries, self.backbone.image_size, config.dataset_workers)

    def make_policy(self, num_classes: tuple[int, ...]) -> Policy:
        """Return the policy: the pretrained model with fresh adapters and no control learnt yet."""
        return Policy(
            self.backbone.unet,
            self.schedule,
            self.backbone.encode_prompts([""]),
            guidance_scale=self.config.env.guidance_scale,
            num_classes=num_classes,
            lora=self.config.policy,
            checkpointing=self.config.env.checkpointing,
            seed=self.config.seed,
        )

    def make_env(self, reward: Reward, num_envs: int, group_size: int = 1) -> DenoisingVectorEnv:
        """Return an env of this model with `reward`."""
        return DenoisingVectorEnv(
            self.backbone,
            self.schedule,
            reward,
            self.prompts,
            num_envs=num_envs,
            group_size=group_size,
            dataset=self.dataset,
            reward_timeout=self.config.reward_timeout,
        )

    def make_guided(
        self, policy: Policy, reward: Reward, num_pictures: int, envs: int | None = None
    ) -> Guidance:
        """Return what evaluations draw with: the guided policy, at most `num_pictures` at a time.

        Nor more than `envs` envs hold, by default `eval_batch`: fewer where each picture takes several.
        """
        at_once = max((envs or self.config.eval_batch) // self.config.guidance.population, 1)
        return self.guide(policy, reward, min(num_pictures, at_once))

    def guide(self, policy: Policy, reward: Reward, num_pictures: int) -> Guidance:
        """Return the policy under its guidance, in an env that draws `num_pictures` at once."""
        guidance = self.config.guidance
        env = self.make_env(reward, num_pictures * guidance.population, guidance.population)
        env.prompts = self.eval_prompts
        return guidance.attach(policy, env)

    @property
    def target_gamma(self) -> float:
        """Gamma of the law that is aimed at: the guidance's, else the algorithm's, else 1."""
        own = self.config.algo.target_gamma(math.prod(self.backbone.latent_shape))
        aims = (self.config.guidance.target_gamma, own, 1.0)
        return next(gamma for gamma in aims if gamma is not None)

    @property
    def z_known(self) -> bool:
        """Whether a learned reward's log Z is of the model, steps and prompts that are evaluated.

        It is of the pictures that the classifier was held against, which a file's were drawn elsewhere.
        """
        elsewhere = getattr(self.config.reward, "classifier", None)
        return elsewhere is None and self.eval_prompts == self.prompts

    def seed(self, *stream: int) -> int:
        """Return a seed for each purpose, from the run's seed and `stream`."""
        return stream_seed(self.config.seed, *stream)

    def generator(self, *stream: int) -> torch.Generator:
        """Return a generator of its own for each purpose."""
        return torch.Generator(self.device).manual_seed(self.seed(*stream))

    def num_classes(self) -> tuple[int, ...]:
        """Return the number of classes of each attribute of the label, before any fit."""
        count = self.config.reward.num_classes
        return count if isinstance(count, tuple) else (count,)

    def make_reward(self, policy: Policy, *, refit: bool = False) -> Reward:
        """Return the reward, fitted and calibrated if it is a learned one and not in the cache."""
        chosen = self.config.reward
        if not is_learned(chosen):
            return chosen
        reward = self._learned_reward(policy, refit=refit).to(self.device)
        reward.ceiling = chosen.ceiling
        return reward

    def classifier_file(self) -> Path:
        """Return where the cache has the fitted classifier, or will have it."""
        return cache_folder() / f"{self._reward_key()}.safetensors"

    def _learned_reward(self, policy: Policy, *, refit: bool) -> LogLikelihood:
        chosen = self.config.reward
        if chosen.classifier:
            reward = chosen.load()
            _check_side(reward, self.backbone.image_size, chosen.classifier)
            return reward
        path = self.classifier_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with processes.led():  # by the one that speaks; the others wait at the lock, without a time limit
            lock = FileLock(f"{path}.lock").acquire()  # cells of a suite want the same one at once
        with lock:
            if path.is_file() and not refit:
                console.print(f"classifier: from the cache, {path}")
                reward = LogLikelihood.load(path)
            else:
                reward = self._fit(policy)
                reward.save(path)
                if self.dataset is None:
                    self._forget_pictures(chosen.num_pictures)
        _warn_of_few(reward)
        return reward

    def _fit(self, policy: Policy) -> LogLikelihood:
        chosen, seed = self.config.reward, self.config.seed
        if self.dataset is None:
            return chosen.fit(self._draw(policy, chosen.num_pictures), seed, from_pretrained=True)
        console.print(f"dataset: reading {len(self.dataset)} pictures of {self.config.dataset}")
        reward = chosen.fit(self.dataset, seed, from_pretrained=False)
        _warn_of_unreadable(self.dataset)
        return reward

    def _read_dataset(self) -> list[Entry] | None:
        """Return what `dataset` holds, no picture opened yet."""
        if self.config.dataset is None:
            return None
        measures = getattr(self.config.reward, "measures", [])
        # in a file a joint label has a number for each measure too
        counts = (2,) * len(measures) if getattr(self.config.reward, "joint", False) else self.num_classes()
        entries, notes = datasets.read(Path(self.config.dataset), measures, counts)
        for note in notes:
            console.print(f"dataset={self.config.dataset}: {note}")
        return entries

    def _draw(self, policy: Policy, count: int) -> Tensor:
        """Return `count` pictures of the pretrained model, uint8: CTRL's offline dataset.

        They lie in a file, not in memory, and are there again if the fit refuses them.
        """
        path, side = self._pictures_file(count), self.backbone.image_size
        size = count * 3 * side**2
        with FileLock(f"{path}.lock"), disk.told(path, "Make room, or set DIFFRL_CACHE to another folder."):
            if path.is_file():
                console.print(f"offline dataset: drawn before, {path}")
            else:
                self._write_pictures(policy, count, path)
            pictures = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return pictures.view(count, 3, side, side)

    def _write_pictures(self, policy: Policy, count: int, path: Path) -> None:
        at_once = self.config.eval_batch
        env, generator = self.make_env(Jpeg(), min(at_once, count)), self.generator(1)
        draft, left = path.with_suffix(".tmp"), count  # ours, as the lock is
        try:
            with (
                progress("drawing the offline dataset", count) as bar,
                memory.told("eval_batch", at_once),
                draft.open("wb") as file,
            ):
                while left > 0:
                    seed = self.config.seed if left == count else None
                    images = rollout(env, Pretrained(policy), generator, seed=seed).images
                    file.write((255 * images[:left]).round().byte().cpu().numpy().tobytes())
                    left -= env.num_envs
                    bar.advance(env.num_envs)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)  # it may be what fills the disk

    def _pictures_file(self, count: int) -> Path:
        """Return where the pictures lie until a classifier is fitted to them, whatever its settings."""
        facts = [__version__, _FITTED, self.config.seed, count, *self._drawn_by()]
        return cache_folder() / f"{_digest(facts)}.pictures"

    def _forget_pictures(self, count: int) -> None:
        path = self._pictures_file(count)
        with FileLock(f"{path}.lock"):
            path.unlink(missing_ok=True)

    def _drawn_by(self) -> list[Any]:
        """Return what decides the pictures besides the seed and their number."""
        env = settings_file.facts(self.config)["env"]
        return [env, self.prompts, self.config.eval_batch, str(self.device.type)]

    def _reward_key(self) -> str:
        """Return a hash of all that decides the classifier: model, sampler, prompts, data, settings."""
        config = self.config
        fitted = asdict(config.reward)
        del fitted["ceiling"]  # of the reward, not of its classifier
        facts = [__version__, LAYOUT, _FITTED, settings.chosen(config, "reward"), fitted, config.seed]
        if self.dataset is None:
            facts += self._drawn_by()
        else:
            facts.append(self.dataset.fingerprint())
        return _digest(facts)


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _warn_of_unreadable(dataset: PictureFiles) -> None:
    """Tell of pictures that could not be read."""
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DiffRLError(f"device={name}: no such device. Use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DiffRLError(f"device={name}: PyTorch sees no CUDA device. Use device=cpu.")
    return device
