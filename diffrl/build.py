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

from diffrl import __version__, datasets, guards, memory, processes, settings_file
from diffrl import config as settings
from diffrl.algorithms.base import check_choice
from diffrl.algorithms.guidance.base import Guidance, Unguided
from diffrl.algorithms.untrained import Untrained
from diffrl.cache import cache_folder
from diffrl.config import Config
from diffrl.datasets import Entry, PictureFiles
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.prompts import load_prompts
from diffrl.errors import DiffRLError
from diffrl.log import console, progress
from diffrl.policy import Policy, Pretrained
from diffrl.quality import unavailable
from diffrl.rewards.clip import load_clip
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.log_likelihood import LAYOUT, LogLikelihood
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule
from diffrl.types import Backbone, Reward, stream_seed

_FEW = 100  # pictures of a class
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
        with FileLock(f"{path}.lock"):  # cells of a suite want the same one at once
            if path.is_file() and not refit:
                console.print(f"classifier: from the cache, {path}")
                reward = LogLikelihood.load(path)
            else:
                reward = self._fit(policy)
                reward.save(path)
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
        """Return `count` pictures of the pretrained model, uint8: CTRL's offline dataset."""
        at_once = self.config.eval_batch
        env = self.make_env(Jpeg(), min(at_once, count))
        generator, pictures = self.generator(1), []
        with progress("drawing the offline dataset", count) as bar, memory.told("eval_batch", at_once):
            for batch in range(-(-count // env.num_envs)):
                seed = None if batch else self.config.seed
                images = rollout(env, Pretrained(policy), generator, seed=seed).images
                pictures.append((255 * images).round().byte().cpu())
                bar.advance(env.num_envs)
        return torch.cat(pictures)[:count]

    def _reward_key(self) -> str:
        """Return a hash of all that decides the classifier: model, sampler, prompts, data, settings."""
        config, digest = self.config, hashlib.sha256()
        fitted = asdict(config.reward)
        del fitted["ceiling"]  # of the reward, not of its classifier
        facts = [__version__, LAYOUT, _FITTED, settings.chosen(config, "reward"), fitted, config.seed]
        if self.dataset is None:
            env = settings_file.facts(config)["env"]
            facts += [env, self.prompts, config.eval_batch, str(self.device.type)]
        else:
            facts.append(self.dataset.fingerprint())
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return digest.hexdigest()[:32]


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


def is_learned(reward: object) -> bool:
    """Return whether these are the settings of a classifier, to be fitted or loaded."""
    return getattr(reward, "learned", False)


def _has_gradient(reward: Any) -> bool:
    return is_learned(reward) or reward.differentiable


def check(config: Config) -> None:
    """Raise DiffRLError for settings that contradict each other."""
    name, reward = settings.chosen(config, "algo"), settings.chosen(config, "reward")
    if config.algo.needs_gradient and not _has_gradient(config.reward):
        raise DiffRLError(
            f"algo={name} reward={reward}: {name} needs a differentiable reward and {reward!r} is a black "
            "box. Use reward=compressibility."
        )
    if config.algo.needs_noise and config.env.eta == 0:
        raise DiffRLError(
            f"algo={name} env.eta=0: without noise a step has no density and no KL. Use env.eta=1."
        )
    labels = is_learned(config.reward) or hasattr(config.reward, "draw_label")
    if config.algo.needs_labels and not labels:
        raise DiffRLError(
            f"algo={name} reward={reward}: {name} learns from labels, and {reward!r} gives none. Use "
            "reward=compressibility."
        )
    check_choice("resume", config.resume, ("never", "auto"))
    every = ("checkpoint_every", "eval_every")
    for option in (*every, "keep_last", "patience", "eval_batch", "eval_pictures"):
        if (value := getattr(config, option)) is not None and value < 1:
            raise DiffRLError(f"{option}={value}: must be 1 or more.")
    if config.seed < 0:
        raise DiffRLError(f"seed={config.seed}: must be 0 or more.")
    if config.reward_timeout is not None and not config.reward_timeout > 0:
        raise DiffRLError(f"reward_timeout={config.reward_timeout}: must be positive, or null for none.")
    if config.patience is not None and config.keep_best is None:
        raise DiffRLError(
            f"patience={config.patience} keep_best=null: better by what? Give keep_best=eval/accuracy, or "
            "another name in metrics.jsonl."
        )
    if config.clip is not None:
        load_clip(config.clip)  # kept for the evaluations, or refused before anything is trained
    if config.eval_scales and getattr(config.env, "num_dims", None) is not None:
        raise DiffRLError(
            f"eval_scales={config.eval_scales}: for pictures; give 'diffrl eval' --control-scale."
        )
    trains = not isinstance(config.algo, Untrained) or config.guidance.needs_gradient
    if trains and getattr(config.env, "precision", None) == "fp16":
        raise DiffRLError(
            "env.precision=fp16: gradients underflow in it, and this algorithm or guidance needs them. Use "
            "env.precision=bf16."
        )
    _check_guidance(config)
    _check_space(config)
    if config.dataset is not None and getattr(config.env, "num_dims", None) is not None:
        raise DiffRLError(
            f"dataset={config.dataset}: for pictures, and this env makes points. Leave it out."
        )


def check_new(config: Config) -> None:
    """Raise DiffRLError for settings that no run can begin with, though one that is there may have them."""
    if config.keep_best is not None:
        num_dims = getattr(config.env, "num_dims", None)
        guards.check_metric(
            config.keep_best,
            pictures=num_dims is None,
            labels=is_learned(config.reward),
            exact=num_dims == 1 and isinstance(config.guidance, Unguided),
        )
        if why := unavailable(config.keep_best.removeprefix("eval/"), config.clip):
            raise DiffRLError(f"keep_best={config.keep_best}: {why}.")
        if config.keep_best == "eval/prompt_fidelity" and judge_folder(config.env) is None:
            raise DiffRLError(
                f"keep_best={config.keep_best} env.model={getattr(config.env, 'model', None)}: no judge of "
                "prompts lies beside this model, as one does beside env=emoji's. Use "
                "keep_best=eval/clip_score and clip=PATH."
            )


def judge_folder(env: Any) -> Path | None:
    """Return where the judge of prompt fidelity lies beside an env's checkpoint; None if there is none."""
    model = getattr(env, "model", None)  # an env of somebody's may have none
    folder = Path(model) / "judge" if model else None
    return folder if folder is not None and folder.is_dir() else None


def _check_guidance(config: Config) -> None:
    name, reward = settings.chosen(config, "guidance"), settings.chosen(config, "reward")
    if config.guidance.needs_gradient and not _has_gradient(config.reward):
        raise DiffRLError(
            f"guidance={name} reward={reward}: it follows the reward's gradient, and {reward!r} is a black "
            "box. Use guidance=svdd or smc, or reward=compressibility."
        )
    if config.guidance.needs_gradient and isinstance(config.reward, OnlineSurrogateReward):
        raise DiffRLError(
            f"guidance={name} reward={reward}: a surrogate learns while a policy is trained, and it knows "
            "nothing here. Use guidance=svdd or smc, with the reward itself."
        )
    if config.guidance.needs_noise and config.env.eta == 0:
        raise DiffRLError(
            f"guidance={name} env.eta=0: without noise there is nothing to choose from, and sigma^2 moves "
            "nothing. Use env.eta=1."
        )
    if config.guidance.needs_training and isinstance(config.algo, Untrained):
        raise DiffRLError(
            f"guidance={name} algo=none: an untrained policy does not know its label. Give the folder of a "
            "run, or train with algo=classifier_free."
        )


def _check_space(config: Config) -> None:
    """A reward scores pictures, or points of as many dimensions as the env's."""
    ours, theirs = (getattr(part, "num_dims", None) for part in (config.env, config.reward))
    if ours == theirs:
        return
    env, reward = settings.chosen(config, "env"), settings.chosen(config, "reward")
    made, scored = ("pictures" if d is None else f"points of {d} dimension(s)" for d in (ours, theirs))
    fix = "Use reward=compressibility."
    if ours is not None:
        fix = (
            "Use reward=softmax." if theirs is None else "Give its slopes or observations as many numbers."
        )
    raise DiffRLError(f"env={env} reward={reward}: the env makes {made}, the reward scores {scored}. {fix}")


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
