"""Does the control work? Classes by the true measure, KL and objective in nats, pictures to look at.

Shapes: n pictures, A attributes of a label, C labels in all.
"""

import math
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor

from diffrl.algorithms.guidance.base import Guidance
from diffrl.algorithms.guidance.smc import SMC
from diffrl.envs.prompts import LabelledPrompt
from diffrl.log import grid
from diffrl.policy import Pretrained
from diffrl.quality import brisque, clip_score, diversity, image_statistics
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.measures import MEASURES, Measure
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rewards.scoring import score
from diffrl.rollout import rollout
from diffrl.types import EVALUATION_SEED, NO_LABEL, Reward, every_label


def evaluate(
    actor: Guidance,
    *,
    num_pictures: int,
    gamma: float,
    z_known: bool = True,
    seed: int = EVALUATION_SEED,
    judge: PromptFidelity | None = None,
    clip: str | None = None,
    stand_in: Reward | None = None,
) -> dict[str, Any]:
    """Return the measures of a policy, guided or not, over `num_pictures` of the actor's env.

    Of any reward: its mean and standard deviation, KL in nats (null where a step has no density), the
    measures of `diffrl.quality`, prompt fidelity where there is a judge, cost; of SMC `log_z_hat`, log of
    its mean estimate of Z, for each label: Z under the law of the policy that it guides. Of a control, with
    labels in equal blocks, or each prompt's own where all prompts have one: what `_control` and
    `_optimality` return (`z_known`: the reward's Z is of this env's model and prompts), and without the
    reward's ceiling the mean log p(y|x) and the accuracy that the classifier claims, its mean p(y|x). Of a
    `stand_in` that was trained on in the reward's place, the mean that it claims. Noise and prompts come
    from `seed` alone: an evaluation neither reads nor moves a generator of training.
    """
    env = actor.env
    generator = torch.Generator(env.device).manual_seed(seed)
    labels = every_label(env.reward.num_classes)
    blocks = labels[torch.arange(num_pictures) * len(labels) // num_pictures]
    own = all(isinstance(prompt, LabelledPrompt) for prompt in env.prompts)
    reference = actor.policy.reference if env.schedule.eta > 0 else None
    rewards, kl, drawn, claimed, log_probs, targets, log_z_hat = [], [], [], [], [], [], []
    prompts: list[str] = []
    at_once = env.num_envs // actor.population
    for start in range(0, num_pictures, at_once):
        # the last batch is filled up and trimmed: N is fixed
        index = torch.arange(start, start + at_once).clamp(max=num_pictures - 1)
        options = {} if own else {"label": blocks[index].repeat_interleave(actor.population, 0)}
        first = seed if start == 0 else None
        trajectory = rollout(env, actor, generator, reference=reference, seed=first, options=options)
        kept = actor.chosen(generator)[: num_pictures - start]
        rewards.append(trajectory.reward[kept].cpu())
        targets.append(trajectory.context.label[kept].cpu())
        if trajectory.kl is not None:
            kl.append(trajectory.kl.sum(0)[kept].cpu())
        if isinstance(actor, SMC) and actor.last:  # else r(x_0) has no part in it
            log_z_hat.append(actor.log_z[: len(kept)].cpu())
        drawn.append(trajectory.images[kept].cpu())
        pictures, context = trajectory.images[kept], trajectory.context.rows(kept)
        if isinstance(env.reward, LogLikelihood):
            with torch.no_grad():
                log_probs.append(env.reward.log_prob(pictures, context).cpu())
        if stand_in is not None:
            claimed.append(score(stand_in, pictures, context).detach().cpu())
        prompts += [trajectory.context.prompts[i] for i in kept.tolist()]
    images, target = torch.cat(drawn), torch.cat(targets)
    reward = torch.cat(rewards)
    measures: dict[str, Any] = {
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std(unbiased=False)),
        "kl_nats": float(torch.cat(kl).mean()) if kl else None,
        "n": num_pictures,
    }
    if isinstance(env.reward, LogLikelihood):
        measures |= _control(env.reward, target, env.reward.true_class(images))
        log_prob = torch.cat(log_probs)
        measures["mean_logp"] = float(log_prob.mean())
        measures["claimed_accuracy"] = float(log_prob.exp().mean())
        if kl:
            objective = gamma * reward - torch.cat(kl)
            measures |= _optimality(env.reward, target, objective, gamma if z_known else None)
    if log_z_hat:
        measures["log_z_hat"] = _log_means(torch.cat(log_z_hat), target, env.reward.num_classes)
    if claimed:
        measures["claimed_reward"] = float(torch.cat(claimed).mean())
    if judge is not None:
        measures["prompt_fidelity"] = float(judge(images.to(env.device), prompts).float().mean())
    measures |= {
        "diversity": diversity(images, list(zip(prompts, map(tuple, target.tolist()), strict=True))),
        "brisque": brisque(images),
        "clip_score": clip_score(images, prompts, clip),
    }
    return measures | image_statistics(images) | _cost(actor, seed)


def _control(reward: LogLikelihood, target: Tensor, true: Tensor) -> dict[str, Any]:
    """Return how well labels `[n, A]` are obeyed, by the true measures, never by a classifier.

    A picture is right if every attribute is; classes are whole labels, named in `labels`. Of several
    attributes, each one's accuracy, macro F1 and confusion besides, as CTRL reports them.
    """
    wanted, got = (_index(label, reward.num_classes) for label in (target, true))
    measures = _scores(wanted, got, math.prod(reward.num_classes)) | {
        "labels": [label_name(label) for label in every_label(reward.num_classes)]
    }
    confusion = np.array(measures["confusion"])
    measures["per_class"] = (confusion.diagonal() / confusion.sum(1).clip(min=1)).tolist()
    if len(reward.attributes) > 1:
        split = (reward.split(label).unbind(1) for label in (target, true))
        columns = zip(reward.attributes, *split, strict=True)
        for attribute, own_target, own in columns:
            for name, value in _scores(own_target, own, attribute.classifier.num_classes).items():
                measures[f"{attribute.name}/{name}"] = value
    return measures


def _scores(target: Tensor, guess: Tensor, num_classes: int) -> dict[str, Any]:
    labels = list(range(num_classes))
    return {
        "accuracy": float(accuracy_score(target, guess)),
        "macro_f1": float(f1_score(target, guess, labels=labels, average="macro", zero_division=0)),
        "confusion": confusion_matrix(target, guess, labels=labels).tolist(),
    }


def _index(label: Tensor, num_classes: tuple[int, ...]) -> Tensor:
    """Return the place of each of `label` `[n, A]` in `every_label`, `[n]`."""
    index = torch.zeros(len(label), dtype=torch.int64)
    for column, count in zip(label.unbind(1), num_classes, strict=True):
        index = index * count + column
    return index


def _optimality(
    reward: LogLikelihood, target: Tensor, objective: Tensor, gamma: float | None
) -> dict[str, Any]:
    """Return J = gamma log p - KL and the gap log Z - J of each label, nats; and the ESS of log Z.

    Null where Z is unknown, as without a gamma, and of a label that no picture was asked to have.
    """
    asked = _by_label(objective, target, reward.num_classes)
    own = [float(part.mean()) if len(part) else None for part in asked]
    log_z = None if gamma is None else reward.log_z(gamma)
    ess = None if gamma is None else reward.log_z_ess(gamma)
    if log_z is None or ess is None:
        return {"objective": own, "log_z": None, "log_z_ess": None, "gap": None}
    gap = [None if j is None else z - j for z, j in zip(log_z.tolist(), own, strict=True)]
    return {"objective": own, "log_z": log_z.tolist(), "log_z_ess": ess.tolist(), "gap": gap}


def _log_means(log_values: Tensor, target: Tensor, num_classes: tuple[int, ...]) -> list[float | None]:
    """Return log of each label's mean value, of `log_values` `[n]`; null of one that was not asked for."""
    asked = _by_label(log_values, target, num_classes)
    return [float(part.logsumexp(0)) - math.log(len(part)) if len(part) else None for part in asked]


def _by_label(values: Tensor, target: Tensor, num_classes: tuple[int, ...]) -> list[Tensor]:
    """Return those of `values` `[n]` that belong to each label, in the order of `every_label`."""
    return [values[(target == label).all(1)] for label in every_label(num_classes)]


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


def picture_grid(
    actor: Guidance, prompts: list[str], *, seed: int = EVALUATION_SEED, labels: Tensor | None = None
) -> Image.Image:
    """Return pictures, one column a prompt and the same noise in each row.

    The first row is the pretrained model's; then one row a label of `labels` `[C, A]`, by default each
    there is, or one row if there are none.
    """
    env = actor.env
    words = (prompts * env.num_envs)[: env.num_envs // actor.population]
    rows: list[Tensor] = []
    names = []
    labels = every_label(env.reward.num_classes) if labels is None else labels
    null = torch.full_like(labels[:1], NO_LABEL)
    for number, label in enumerate(torch.cat([null, labels])):
        generator = torch.Generator(env.device).manual_seed(seed)
        options = {
            "prompts": [word for word in words for _ in range(actor.population)],
            "label": label.expand(env.num_envs, -1),
        }
        drawer = actor if number else Pretrained(actor.policy)
        drawn = rollout(env, drawer, generator, seed=seed, options=options)
        first = torch.arange(len(words)) * actor.population
        rows.append(drawn.images[actor.chosen(generator) if number else first])
        asked = any(y != NO_LABEL for y in label.tolist())
        lines = ["pretrained" if not number else f"label {label_name(label)}" if asked else "trained"]
        for measure in measures_of(env.reward):
            lines.append(f"{float(measure.of(rows[-1]).mean()):.2f} {measure.unit or measure.title}")
        names.append("\n".join(lines))
    return grid(rows, names, words)


def measures_of(reward: Reward) -> list[Measure]:
    """Return the true measures that a reward is about; of a black box, JPEG size."""
    if isinstance(reward, LogLikelihood):
        return [attribute.measure for attribute in reward.attributes]
    return [MEASURES["compressibility"]]


def label_name(label: Tensor) -> str:
    """Return a label `[A]` as it is written on the command line."""
    return ",".join(map(str, label.tolist()))
