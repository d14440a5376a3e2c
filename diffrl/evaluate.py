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

from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.log import grid
from diffrl.policy import Policy, Pretrained
from diffrl.rewards.jpeg import jpeg_kilobytes
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rollout import rollout
from diffrl.types import NO_LABEL


def evaluate(
    env: DenoisingVectorEnv,
    policy: Policy,
    *,
    num_pictures: int,
    gamma: float,
    seed: int = 42,
    judge: PromptFidelity | None = None,
) -> dict[str, Any]:
    """Return the measures of a policy over `num_pictures`.

    Of any reward: its mean and standard deviation, KL in nats (null where eta is 0), prompt fidelity where
    there is a judge, cost. Of a control, with labels in equal blocks, what `_control` and `_optimality`
    return. Noise and prompts come from `seed` alone: an evaluation neither reads nor moves a generator of
    training.
    """
    generator = torch.Generator(env.device).manual_seed(seed)
    counts = env.reward.num_classes
    target = torch.arange(num_pictures) * (counts[0] if counts else 0) // num_pictures
    reference = policy.reference if env.schedule.eta > 0 else None
    rewards, kl, guess, faithful = [], [], [], []
    for start in range(0, num_pictures, env.num_envs):
        # the last batch is filled up and trimmed: N is fixed
        index = torch.arange(start, start + env.num_envs).clamp(max=num_pictures - 1)
        options = {"label": target[index, None]} if counts else None
        first = seed if start == 0 else None
        trajectory = rollout(env, policy, generator, reference=reference, seed=first, options=options)
        keep = min(env.num_envs, num_pictures - start)
        rewards.append(trajectory.reward[:keep].cpu())
        if trajectory.kl is not None:
            kl.append(trajectory.kl.sum(0)[:keep].cpu())
        if isinstance(env.reward, LogLikelihood):
            guess.append(env.reward.true_class(trajectory.images)[:keep])
        if judge is not None:
            faithful.append(judge(trajectory.images, trajectory.context.prompts)[:keep].cpu())
    reward = torch.cat(rewards)
    measures: dict[str, Any] = {
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std(unbiased=False)),
        "kl_nats": float(torch.cat(kl).mean()) if kl else None,
        "n": num_pictures,
    }
    if isinstance(env.reward, LogLikelihood):
        measures |= _control(env.reward, target, torch.cat(guess), reward)
        if kl:
            measures |= _optimality(env.reward, target, gamma * reward - torch.cat(kl), gamma)
    if judge is not None:
        measures["prompt_fidelity"] = float(torch.cat(faithful).float().mean())
    return measures | _cost(env, policy, seed)


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


def _cost(env: DenoisingVectorEnv, policy: Policy, seed: int) -> dict[str, float]:
    """Return network calls and seconds a picture, of plain sampling: without KL and scoring."""
    calls, begin = policy.num_calls, time.perf_counter()
    rollout(env, policy, torch.Generator(env.device).manual_seed(seed), seed=seed)
    seconds = time.perf_counter() - begin
    return {
        "nfe_per_image": (policy.num_calls - calls) / env.num_envs,
        "seconds_per_image": seconds / env.num_envs,
    }


def picture_grid(
    env: DenoisingVectorEnv, policy: Policy, prompts: list[str], *, seed: int = 42
) -> Image.Image:
    """Return pictures, one column a prompt and the same noise in each row.

    The first row is the pretrained model's; then one row a label, or one row if there are no labels.
    """
    words = (prompts * env.num_envs)[: env.num_envs]
    rows: list[Tensor] = []
    names = []
    counts = env.reward.num_classes
    for label in [None, *range(*counts)] if counts else [None, NO_LABEL]:
        generator = torch.Generator(env.device).manual_seed(seed)
        options: dict[str, Any] = {"prompts": words}
        if counts:
            options["label"] = torch.full((env.num_envs, 1), NO_LABEL if label is None else label)
        actor = Pretrained(policy) if label is None else policy
        rows.append(rollout(env, actor, generator, seed=seed, options=options).images)
        size = float(jpeg_kilobytes(rows[-1]).mean())
        name = "pretrained" if label is None else f"label {label}" if counts else "trained"
        names.append(f"{name}\n{size:.2f} kB")
    return grid(rows, names, words)


def load_judge(model: str) -> PromptFidelity | None:
    """Return the judge of prompt fidelity beside a checkpoint, where it has one."""
    folder = Path(model) / "judge"
    return PromptFidelity.load(folder) if folder.is_dir() else None
