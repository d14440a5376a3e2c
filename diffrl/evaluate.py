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
from diffrl.policy import Policy
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rollout import rollout
from diffrl.types import NO_LABEL, Actor


def evaluate(
    env: DenoisingVectorEnv,
    policy: Policy,
    *,
    num_pictures: int,
    gamma: float,
    seed: int = 42,
    judge: PromptFidelity | None = None,
) -> dict[str, Any]:
    """Return the measures of a controlled policy over `num_pictures`, labels in equal blocks.

    Accuracy, macro F1, confusion and per-class accuracy are by the true measure, never by the classifier.
    `objective` is J = gamma log p - KL and `gap` is log Z - J, both per label, in nats. Its noise and
    prompts come from `seed` alone: an evaluation neither reads nor moves a training generator.
    """
    reward = env.reward
    assert isinstance(reward, LogLikelihood)
    (num_classes,) = reward.num_classes
    generator = torch.Generator(env.device).manual_seed(seed)
    target = torch.arange(num_pictures) * num_classes // num_pictures
    predicted, log_p, kl, faithful = [], [], [], []
    for start in range(0, num_pictures, env.num_envs):
        # the last batch is filled up and trimmed: N is fixed
        index = torch.arange(start, start + env.num_envs).clamp(max=num_pictures - 1)
        trajectory = rollout(
            env,
            policy,
            generator,
            reference=policy.reference,
            seed=seed if start == 0 else None,
            options={"label": target[index, None]},
        )
        keep = min(env.num_envs, num_pictures - start)
        assert trajectory.kl is not None
        predicted.append(reward.true_class(trajectory.images)[:keep])
        log_p.append(trajectory.reward[:keep].cpu())
        kl.append(trajectory.kl.sum(0)[:keep].cpu())
        if judge is not None:
            faithful.append(judge(trajectory.images, trajectory.context.prompts)[:keep].cpu())
    truth, guess = target.numpy(), torch.cat(predicted).numpy()
    labels = list(range(num_classes))
    confusion = confusion_matrix(truth, guess, labels=labels)
    objective = gamma * torch.cat(log_p) - torch.cat(kl)
    per_label = torch.stack([objective[target == y].mean() for y in labels])
    log_z = reward.log_z(gamma)
    measures: dict[str, Any] = {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, labels=labels, average="macro", zero_division=0)),
        "confusion": confusion.tolist(),
        "per_class": (confusion.diagonal() / confusion.sum(1).clip(min=1)).tolist(),
        "kl_nats": float(torch.cat(kl).mean()),
        "mean_logp": float(torch.cat(log_p).mean()),
        "objective": per_label.tolist(),
        "log_z": None if log_z is None else log_z.tolist(),
        "gap": None if log_z is None else (log_z.cpu() - per_label).tolist(),
        "n": num_pictures,
    }
    if judge is not None:
        measures["prompt_fidelity"] = float(torch.cat(faithful).float().mean())
    return measures | _cost(env, policy, seed)


def _cost(env: DenoisingVectorEnv, policy: Policy, seed: int) -> dict[str, float]:
    """Return network calls and seconds a picture, of plain sampling: without KL and scoring."""
    calls, begin = policy.num_calls, time.perf_counter()
    rollout(env, policy, torch.Generator(env.device).manual_seed(seed), seed=seed)
    seconds = time.perf_counter() - begin
    return {
        "nfe_per_image": (policy.num_calls - calls) / env.num_envs,
        "seconds_per_image": seconds / env.num_envs,
    }


def control_grid(
    env: DenoisingVectorEnv, policy: Actor, prompts: list[str], *, seed: int = 42
) -> Image.Image:
    """Return pictures with one row a label (and one without), one column a prompt, the same noise."""
    reward = env.reward
    assert isinstance(reward, LogLikelihood)
    (num_classes,) = reward.num_classes
    words = (prompts * env.num_envs)[: env.num_envs]
    rows: list[Tensor] = []
    names = []
    for label in [NO_LABEL, *range(num_classes)]:
        generator = torch.Generator(env.device).manual_seed(seed)
        options = {"label": torch.full((env.num_envs, 1), label), "prompts": words}
        rows.append(rollout(env, policy, generator, seed=seed, options=options).images)
        size = float(reward.measure(rows[-1]).mean())
        names.append(f"{'no label' if label == NO_LABEL else f'label {label}'}\n{size:.2f} kB")
    return grid(rows, names, words)


def load_judge(model: str) -> PromptFidelity | None:
    """Return the judge of prompt fidelity beside a checkpoint, where it has one."""
    folder = Path(model) / "judge"
    return PromptFidelity.load(folder) if folder.is_dir() else None
