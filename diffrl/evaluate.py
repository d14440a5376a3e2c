"""Does the control work? Classes by the true measure, KL and objective in nats, pictures to look at.

Shapes: n pictures, K classes.
"""

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor

from diffrl.algorithms.guidance.base import Guidance
from diffrl.log import grid
from diffrl.policy import Pretrained
from diffrl.quality import brisque, clip_score, diversity
from diffrl.rewards.jpeg import jpeg_kilobytes
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rollout import rollout
from diffrl.types import NO_LABEL


def evaluate(
    actor: Guidance,
    *,
    num_pictures: int,
    gamma: float,
    seed: int = 42,
    judge: PromptFidelity | None = None,
    clip: str | None = None,
) -> dict[str, Any]:
    """Return the measures of a policy, guided or not, over `num_pictures` of the actor's env.

    Of any reward: its mean and standard deviation, KL in nats (null where a step has no density), the
    measures of `diffrl.quality`, prompt fidelity where there is a judge, cost. Of a control, with labels in
    equal blocks, what `_control` and `_optimality` return. Noise and prompts come from `seed` alone: an
    evaluation neither reads nor moves a generator of training.
    """
    env = actor.env
    generator = torch.Generator(env.device).manual_seed(seed)
    counts = env.reward.num_classes
    target = torch.arange(num_pictures) * (counts[0] if counts else 0) // num_pictures
    reference = actor.policy.reference if env.schedule.eta > 0 else None
    rewards, kl, drawn = [], [], []
    prompts: list[str] = []
    at_once = env.num_envs // actor.population
    for start in range(0, num_pictures, at_once):
        # the last batch is filled up and trimmed: N is fixed
        index = torch.arange(start, start + at_once).clamp(max=num_pictures - 1)
        options = {"label": target[index, None].repeat_interleave(actor.population, 0)} if counts else None
        first = seed if start == 0 else None
        trajectory = rollout(env, actor, generator, reference=reference, seed=first, options=options)
        kept = actor.chosen(generator)[: num_pictures - start]
        rewards.append(trajectory.reward[kept].cpu())
        if trajectory.kl is not None:
            kl.append(trajectory.kl.sum(0)[kept].cpu())
        drawn.append(trajectory.images[kept].cpu())
        prompts += [trajectory.context.prompts[i] for i in kept.tolist()]
    images = torch.cat(drawn)
    reward = torch.cat(rewards)
    measures: dict[str, Any] = {
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std(unbiased=False)),
        "kl_nats": float(torch.cat(kl).mean()) if kl else None,
        "n": num_pictures,
    }
    if isinstance(env.reward, LogLikelihood):
        measures |= _control(env.reward, target, env.reward.true_class(images), reward)
        if kl:
            measures |= _optimality(env.reward, target, gamma * reward - torch.cat(kl), gamma)
    if judge is not None:
        measures["prompt_fidelity"] = float(judge(images.to(env.device), prompts).float().mean())
    measures |= {
        "diversity": diversity(images, list(zip(prompts, target.tolist(), strict=True))),
        "brisque": brisque(images),
        "clip_score": clip_score(images, prompts, clip),
    }
    return measures | _cost(actor, seed)


def _control(reward: LogLikelihood, target: Tensor, guess: Tensor, log_p: Tensor) -> dict[str, Any]:
    """Return how well labels are obeyed, by the true measure, never by the classifier."""
    labels = list(range(*reward.num_classes))
    confusion = confusion_matrix(target, guess, labels=labels)
    return {
        "accuracy": float(accuracy_score(target, guess)),
        "macro_f1": float(f1_score(target, guess, labels=labels, average="macro", zero_division=0)),
        "confusion": confusion.tolist(),
        "per_class": (confusion.diagonal() / confusion.sum(1).clip(min=1)).tolist(),
        "mean_logp": float(log_p.mean()),
    }


def _optimality(reward: LogLikelihood, target: Tensor, objective: Tensor, gamma: float) -> dict[str, Any]:
    """Return J = gamma log p - KL and the gap log Z - J of each label, nats; null where Z is unknown."""
    per_label = torch.stack([objective[target == y].mean() for y in range(*reward.num_classes)])
    log_z = reward.log_z(gamma)
    return {
        "objective": per_label.tolist(),
        "log_z": None if log_z is None else log_z.tolist(),
        "gap": None if log_z is None else (log_z.cpu() - per_label).tolist(),
    }


def _cost(actor: Guidance, seed: int) -> dict[str, float]:
    """Return network calls, reward calls and seconds a picture, of sampling: without KL and measures."""
    env, policy = actor.env, actor.policy
    calls, scored, begin = policy.num_calls, env.num_scored, time.perf_counter()
    rollout(env, actor, torch.Generator(env.device).manual_seed(seed), seed=seed)
    seconds, pictures = time.perf_counter() - begin, env.num_envs / actor.population
    return {
        "nfe_per_image": (policy.num_calls - calls) / pictures,
        # the env scores every picture once at the end, which sampling by itself does not ask for
        "reward_calls_per_image": (env.num_scored - scored - env.num_envs) / pictures,
        "seconds_per_image": seconds / pictures,
    }


def picture_grid(actor: Guidance, prompts: list[str], *, seed: int = 42) -> Image.Image:
    """Return pictures, one column a prompt and the same noise in each row.

    The first row is the pretrained model's; then one row a label, or one row if there are no labels.
    """
    env = actor.env
    words = (prompts * env.num_envs)[: env.num_envs // actor.population]
    rows: list[Tensor] = []
    names = []
    counts = env.reward.num_classes
    for label in [None, *range(*counts)] if counts else [None, NO_LABEL]:
        generator = torch.Generator(env.device).manual_seed(seed)
        options: dict[str, Any] = {"prompts": [word for word in words for _ in range(actor.population)]}
        if counts:
            options["label"] = torch.full((env.num_envs, 1), NO_LABEL if label is None else label)
        drawn = rollout(
            env, Pretrained(actor.policy) if label is None else actor, generator, seed=seed, options=options
        )
        first = torch.arange(len(words)) * actor.population
        rows.append(drawn.images[first if label is None else actor.chosen(generator)])
        size = float(jpeg_kilobytes(rows[-1]).mean())
        name = "pretrained" if label is None else f"label {label}" if counts else "trained"
        names.append(f"{name}\n{size:.2f} kB")
    return grid(rows, names, words)


def load_judge(model: str) -> PromptFidelity | None:
    """Return the judge of prompt fidelity beside a checkpoint, where it has one."""
    folder = Path(model) / "judge"
    return PromptFidelity.load(folder) if folder.is_dir() else None
