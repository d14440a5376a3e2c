"""Does the control work? Classes by the true measure, KL and objective in nats, pictures to look at.

Shapes: n pictures, A attributes of a label, C labels in all.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor

from diffrl.algorithms.guidance.base import Guidance
from diffrl.envs.prompts import LabelledPrompt
from diffrl.log import grid
from diffrl.meter import now
from diffrl.policy import Pretrained
from diffrl.quality import brisque, clip_score, diversity, image_statistics
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.measures import MEASURES, Measure
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rewards.scoring import score
from diffrl.rollout import rollout
from diffrl.types import EVALUATION_SEED, NO_LABEL, Actor, Reward, every_label

GRID_COLUMNS = 8
"""Pictures in a row of the grid that an evaluation draws."""


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
    drawn = _draw(actor, num_pictures, seed, stand_in)
    measures: dict[str, Any] = {
        "reward_mean": float(drawn.reward.mean()),
        "reward_std": float(drawn.reward.std(unbiased=False)),
        "kl_nats": None if drawn.kl is None else float(drawn.kl.mean()),
        "n": num_pictures,
    }
    if isinstance(env.reward, LogLikelihood):
        assert drawn.log_prob is not None
        measures |= _control(env.reward, drawn.label, env.reward.true_class(drawn.images))
        measures["mean_logp"] = float(drawn.log_prob.mean())
        measures["claimed_accuracy"] = float(drawn.log_prob.exp().mean())
        if drawn.kl is not None:
            objective = gamma * drawn.reward - drawn.kl
            measures |= _optimality(env.reward, drawn.label, objective, gamma if z_known else None)
    if drawn.log_z is not None:
        measures["log_z_hat"] = _log_means(drawn.log_z, drawn.label, env.reward.num_classes)
    if drawn.claimed is not None:
        measures["claimed_reward"] = float(drawn.claimed.mean())
    if judge is not None:
        known = judge(drawn.images.to(env.device), drawn.prompts)
        measures["prompt_fidelity"] = float(known.float().mean())
    alike = list(zip(drawn.prompts, map(tuple, drawn.label.tolist()), strict=True))
    measures |= {
        "diversity": diversity(drawn.images, alike),
        "brisque": brisque(drawn.images),
        "clip_score": clip_score(drawn.images, drawn.prompts, clip),
    }
    return measures | image_statistics(drawn.images) | _cost(actor, seed)


class _Drawn(NamedTuple):
    """An evaluation's pictures, and what each of them has: `[n]`, on the CPU; None where none has it."""

    prompts: list[str]
    images: Tensor  # [n, 3, S, S]
    label: Tensor  # [n, A], the one that was asked for
    reward: Tensor
    kl: Tensor | None = None  # of the whole chain, nats
    log_prob: Tensor | None = None  # log p(y|x), without the reward's ceiling
    log_z: Tensor | None = None  # SMC's estimate
    claimed: Tensor | None = None  # the stand-in's reward


def _draw(actor: Guidance, num_pictures: int, seed: int, stand_in: Reward | None) -> _Drawn:
    """Draw the pictures of `evaluate`, as many at a time as the env has room for."""
    env = actor.env
    generator = torch.Generator(env.device).manual_seed(seed)
    labels = every_label(env.reward.num_classes)
    blocks = labels[torch.arange(num_pictures) * len(labels) // num_pictures]
    own = all(isinstance(prompt, LabelledPrompt) for prompt in env.prompts)
    reference = actor.policy.reference if env.schedule.eta > 0 else None
    prompts: list[str] = []
    parts: dict[str, list[Tensor]] = {}
    at_once = env.num_envs // actor.population
    for start in range(0, num_pictures, at_once):
        # the last batch is filled up and trimmed: N is fixed
        index = torch.arange(start, start + at_once).clamp(max=num_pictures - 1)
        options = {} if own else {"label": blocks[index].repeat_interleave(actor.population, 0)}
        first = seed if start == 0 else None
        trajectory = rollout(env, actor, generator, reference=reference, seed=first, options=options)
        kept = actor.chosen(generator)[: num_pictures - start]
        images, context = trajectory.images[kept], trajectory.context.rows(kept)
        found = {"images": images, "label": context.label, "reward": trajectory.reward[kept]}
        if trajectory.kl is not None:
            found["kl"] = trajectory.kl.sum(0)[kept]
        if isinstance(env.reward, LogLikelihood):
            with torch.no_grad():
                found["log_prob"] = env.reward.log_prob(images, context)
        if (log_z := actor.log_z_hat) is not None:
            found["log_z"] = log_z[: len(kept)]
        if stand_in is not None:
            found["claimed"] = score(stand_in, images, context).detach()
        prompts += context.prompts
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    return _Drawn(prompts, **{name: torch.cat(values) for name, values in parts.items()})


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
    env, policy, cuda = actor.env, actor.policy, actor.env.device.type == "cuda"
    calls, scored, begin = policy.num_calls, env.num_scored, now(cuda)
    rollout(env, actor, torch.Generator(env.device).manual_seed(seed), seed=seed)
    seconds, pictures = now(cuda) - begin, env.num_envs / actor.population
    return {
        "nfe_per_image": (policy.num_calls - calls) / pictures,
        # the env scores every picture once at the end, which sampling by itself does not ask for
        "reward_calls_per_image": (env.num_scored - scored - env.num_envs) / pictures,
        "seconds_per_image": seconds / pictures,
    }


def picture_grid(
    actor: Guidance,
    prompts: list[str],
    *,
    seed: int = EVALUATION_SEED,
    labels: Tensor | None = None,
) -> Image.Image:
    """Return pictures: a column for each of the first prompts, again from the first where they are too few.

    The first row is the pretrained model's; then one row a label of `labels` `[C, A]`, by default each
    there is, or one row if there are none. Every row has the same noise.
    """
    env, words = actor.env, (prompts * GRID_COLUMNS)[:GRID_COLUMNS]
    labels = every_label(env.reward.num_classes) if labels is None else labels
    null = torch.full_like(labels[:1], NO_LABEL)
    rows: list[Tensor] = []
    names = []
    for number, label in enumerate(torch.cat([null, labels])):
        drawer = actor if number else Pretrained(actor.policy)
        rows.append(_row(drawer, actor, words, label, seed))
        asked = any(y != NO_LABEL for y in label.tolist())
        lines = ["pretrained" if not number else f"label {label_name(label)}" if asked else "trained"]
        for measure in measures_of(env.reward):
            lines.append(f"{float(measure.of(rows[-1]).mean()):.2f} {measure.unit or measure.title}")
        names.append("\n".join(lines))
    return grid(rows, names, words)


def _row(drawer: Actor, actor: Guidance, words: list[str], label: Tensor, seed: int) -> Tensor:
    """Return `drawer`'s picture of each of the `words`, as many at once as the env has room for."""
    env, population = actor.env, actor.population
    at_once = env.num_envs // population
    generator = torch.Generator(env.device).manual_seed(seed)
    parts = []
    for start in range(0, len(words), at_once):
        here = (words[start:] + words[-1:] * at_once)[:at_once]
        options = {
            "prompts": [word for word in here for _ in range(population)],
            "label": label.expand(env.num_envs, -1),
        }
        drawn = rollout(env, drawer, generator, seed=None if start else seed, options=options)
        kept = actor.chosen(generator) if drawer is actor else torch.arange(at_once) * population
        parts.append(drawn.images[kept])
    return torch.cat(parts)[: len(words)]


def measures_of(reward: Reward) -> list[Measure]:
    """Return the true measures that a reward is about; of a black box, JPEG size."""
    if isinstance(reward, LogLikelihood):
        return [attribute.measure for attribute in reward.attributes]
    return [MEASURES["compressibility"]]


def label_name(label: Tensor) -> str:
    """Return a label `[A]` as it is written on the command line."""
    return ",".join(map(str, label.tolist()))
