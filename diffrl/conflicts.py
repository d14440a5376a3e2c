"""Settings that contradict each other: found before the model is loaded, or anything drawn or written."""

from pathlib import Path
from typing import Any

from diffrl import config as settings
from diffrl import guards
from diffrl.algorithms.base import check_choice
from diffrl.algorithms.guidance.base import Unguided
from diffrl.algorithms.untrained import Untrained
from diffrl.config import Config
from diffrl.errors import DiffRLError
from diffrl.quality import unavailable
from diffrl.rewards.clip import load_clip
from diffrl.rewards.surrogate import OnlineSurrogateReward


def is_learned(reward: object) -> bool:
    """Return whether these are the settings of a classifier, to be fitted or loaded."""
    return getattr(reward, "learned", False)


def _has_gradient(reward: Any) -> bool:
    return is_learned(reward) or reward.differentiable


def _makes_points(config: Config) -> bool:
    """Whether the model draws points of a few dimensions, and no pictures."""
    return getattr(config.env, "num_dims", None) is not None


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
    if config.eval_scales and _makes_points(config):
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
    if config.dataset is not None and _makes_points(config):
        raise DiffRLError(
            f"dataset={config.dataset}: for pictures, and this env makes points. Leave it out."
        )
    if (most := config.dataset_pictures) is not None and (most < 1 or config.dataset is None):
        raise DiffRLError(
            f"dataset_pictures={most} dataset={config.dataset}: must be 1 or more, of a data set; how many "
            "pictures are drawn from the model, reward.num_pictures says."
        )


def check_new(config: Config) -> None:
    """Raise DiffRLError for settings that no run can begin with, though one that is there may have them."""
    _check_dataset(config)
    if config.keep_best is not None:
        points = _makes_points(config)
        guards.check_metric(
            config.keep_best,
            pictures=not points,
            labels=is_learned(config.reward),
            exact=points and config.env.num_dims == 1 and isinstance(config.guidance, Unguided),
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


def _check_dataset(config: Config) -> None:
    """A data set is learnt from, or a classifier is fitted to it; else nothing would read its pictures."""
    fits = is_learned(config.reward) and not config.reward.classifier
    # of an env that makes points `check` says that it has none
    if config.dataset is None or _makes_points(config) or fits or config.algo.needs_labels:
        return
    name, reward = settings.chosen(config, "algo"), settings.chosen(config, "reward")
    if is_learned(config.reward):
        raise DiffRLError(
            f"dataset={config.dataset} reward.classifier={config.reward.classifier}: is fitted already, "
            f"and algo={name} learns from no data set. Leave one of them out."
        )
    raise DiffRLError(
        f"algo={name} reward={reward} dataset={config.dataset}: nothing reads it, {name} learns from no "
        f"data set and {reward!r} is not fitted to one. Leave it out, or use reward=compressibility."
    )


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
