"""The only training loop, and the folder it writes.

`runs/<name>/`: `config.yaml`, `metrics.jsonl`, `tensorboard/`, `pictures/`, `classifier.safetensors`,
`pytorch_lora_weights.safetensors`, `control.safetensors`.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffrl import checkpoint
from diffrl import config as settings
from diffrl.algorithms.averaging import WeightAverage
from diffrl.build import Setup, is_learned
from diffrl.config import Config
from diffrl.errors import DiffRLError
from diffrl.evaluate import evaluate, load_judge, picture_grid
from diffrl.evaluate_mixture import MixtureEvaluation
from diffrl.log import RunLog, console, progress
from diffrl.policy import Policy
from diffrl.rewards.closed_form import ClosedForm
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.types import EVALUATION_SEED, Reward, Trajectory

CONFIG_FILE = "config.yaml"
CLASSIFIER_FILE = "classifier.safetensors"
_GRID_COLUMNS = 8


def train(config: Config) -> Path:
    """Fit the reward if it is a learned one, train the policy, and return the run's folder."""
    begin = time.perf_counter()
    folder = _folder(config)
    setup, policy, reward = pretrained(config)
    folder.mkdir(parents=True)
    settings.write(config, folder / CONFIG_FILE)
    if isinstance(reward, LogLikelihood):
        reward.save(folder / CLASSIFIER_FILE)
        console.print(describe(reward))
    torch.manual_seed(config.seed)
    with RunLog(folder) as log:
        log.write(0, {"time/setup_seconds": time.perf_counter() - begin} | _report(reward))
        try:
            Run(setup, policy, reward, log).loop()
        finally:  # a reward that breaks down must not cost what was learnt before it
            checkpoint.save(policy, folder)
    minutes = (time.perf_counter() - begin) / 60
    console.print(f"[bold]{folder}[/]: done in {minutes:.1f} minutes. Next: diffrl eval {folder}")
    return folder


class Run:
    """One policy in one env with one algorithm, for `algo.updates` updates."""

    def __init__(self, setup: Setup, policy: Policy, reward: Reward, log: RunLog) -> None:
        self.config, self.setup, self.policy, self.reward, self.log = (
            setup.config, setup, policy, reward, log,
        )  # fmt: skip
        self.env = setup.make_env(reward, self.config.algo.micro_batch_size)
        self.env.reset(seed=self.config.seed)
        self.generator = setup.generator(2)
        self.mixture = MixtureEvaluation(setup, policy, reward) if isinstance(reward, ClosedForm) else None
        # on training so far: pictures drawn, forward passes (backward ones aside) and seconds
        self.spent = {"spent/pictures": 0.0, "spent/network_calls": 0.0, "spent/seconds": 0.0}

    def loop(self) -> None:
        """Train, evaluating every `eval_every` updates and at the end."""
        algo = self.config.algo
        optimizer = algo.make_optimizer(self.policy)
        base = [group["lr"] for group in optimizer.param_groups]
        average = WeightAverage(self.policy.lora_parameters() + self.policy.embedding_parameters())
        if algo.updates:
            self._evaluate(0, self.config.eval_pictures)
        with progress(settings.chosen(self.config, "algo"), algo.updates) as bar:
            for update in range(algo.updates):
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * algo.rate(update)
                begin, calls = time.perf_counter(), self.policy.num_calls
                hits: list[torch.Tensor] = []
                metrics = algo.update(self._collect(hits), self.policy, optimizer)
                if algo.averaged(update):
                    average.add()
                if hits:
                    metrics["rollout/accuracy"] = float(torch.cat(hits).float().mean())
                seconds, calls = time.perf_counter() - begin, self.policy.num_calls - calls
                self.spent["spent/pictures"] += algo.batch_size
                self.spent["spent/network_calls"] += calls
                self.spent["spent/seconds"] += seconds
                metrics |= {
                    "time/seconds_per_image": seconds / algo.batch_size,
                    "time/calls_per_image": calls / algo.batch_size,
                    "train/learning_rate": base[0] * algo.rate(update),
                }
                self.log.write(update + 1, metrics | self.spent)
                bar.advance(note=_note(metrics))
                if (update + 1) % self.config.eval_every == 0 and update + 1 < algo.updates:
                    self._evaluate(update + 1, self.config.eval_pictures)
        average.apply()
        self._evaluate(algo.updates, 4 * self.config.eval_pictures)

    def _collect(self, hits: list[torch.Tensor]) -> Iterator[Trajectory]:
        """Yield an update's micro-batches one by one, noting which pictures hit their class."""
        algo = self.config.algo
        for _ in range(algo.batch_size // algo.micro_batch_size):
            trajectory = algo.collect(self.env, self.policy, self.generator)
            if isinstance(self.reward, LogLikelihood):
                label = trajectory.context.label.cpu()
                hits.append((self.reward.true_class(trajectory.images) == label).all(1))
            yield trajectory

    def _evaluate(self, update: int, num_pictures: int) -> None:
        checkpoint.save(self.policy, self.log.folder)  # a killed run keeps what is measured here
        if self.mixture is not None:
            self.log.write(update, self.mixture.report(update, self.log) | self.spent)
            return
        seed = EVALUATION_SEED + self.config.seed  # over seeds, an untrained row varies too
        measures = measure(self.setup, self.policy, self.reward, num_pictures, seed)
        for scale in self.config.eval_scales if update == self.config.algo.updates else ():
            self.policy.control_scale = scale
            scaled = measure(self.setup, self.policy, self.reward, num_pictures, seed)
            self.policy.control_scale = 1.0
            measures |= {f"scale_{scale:g}/{name}": value for name, value in scaled.items()}
        self.log.write(update, {f"eval/{name}": value for name, value in measures.items()} | self.spent)
        actor = self.setup.make_guided(self.policy, self.reward, _GRID_COLUMNS)
        picture = picture_grid(actor, self.setup.eval_prompts[:_GRID_COLUMNS])
        path = self.log.picture(update, "grid", picture)
        said = [f"reward {measures['reward_mean']:.3f}"]
        said += [f"accuracy {measures['accuracy']:.2f}"] if "accuracy" in measures else []
        said += [] if measures["kl_nats"] is None else [f"KL {measures['kl_nats']:.1f} nats"]
        console.print(f"update {update}: {', '.join(said)}, {path}")


def measure(
    setup: Setup, policy: Policy, reward: Reward, num_pictures: int, seed: int = EVALUATION_SEED
) -> dict[str, Any]:
    """Return `evaluate`'s measures with this setup's model, prompts and gamma."""
    if isinstance(reward, ClosedForm):
        return MixtureEvaluation(setup, policy, reward).measure(seed)
    actor = setup.make_guided(policy, reward, num_pictures)
    gamma = setup.target_gamma
    judge = load_judge(setup.config.env.model)
    if judge is not None:
        judge.to(setup.device)
    clip = setup.config.clip
    return evaluate(actor, num_pictures=num_pictures, gamma=gamma, seed=seed, judge=judge, clip=clip)


def pretrained(config: Config) -> tuple[Setup, Policy, Reward]:
    """Return the model of these settings with nothing learnt yet, and its reward, fitted if it must be."""
    setup = Setup(config)
    policy = setup.make_policy(setup.num_classes())
    return setup, policy, setup.make_reward(policy)


def restore(path: Path, overrides: dict[str, Any]) -> tuple[Setup, Policy, Reward]:
    """Return a finished run's model, its trained policy and its reward.

    Args:
        path: the run's folder.
        overrides: settings of `Config` to replace, such as the prompts.
    """
    if not path.is_dir():
        raise DiffRLError(f"{path}: no such run. 'ls runs' shows those in the default place.")
    config = settings.read(path / CONFIG_FILE)
    for name, value in overrides.items():
        setattr(config, name, value)
    setup = Setup(config)
    if is_learned(config.reward):
        reward: Reward = LogLikelihood.load(path / CLASSIFIER_FILE).to(setup.device)
    else:
        reward = config.reward
    policy = setup.make_policy(reward.num_classes)
    checkpoint.load(policy, path)
    return setup, policy, reward


def describe(reward: LogLikelihood) -> str:
    """Return the fit's report, a line or two each attribute."""
    lines = []
    for attribute in reward.attributes:
        report, measure = attribute.report, attribute.measure
        edges = ", ".join(f"{edge:.2f}" for edge in attribute.edges.tolist())
        lines.append(
            f"classifier of {measure.title}: accuracy {report.accuracy:.3f}, NLL {report.nll_before:.3f} "
            f"-> {report.nll:.3f} at temperature {report.temperature:.2f}, ECE {report.ece:.3f} on "
            f"{report.num_held_out} held-out pictures; edges {f'{edges} {measure.unit}'.rstrip()}, "
            f"{list(report.class_counts)} pictures a class"
        )
    return "\n".join(lines)


def _report(reward: Any) -> dict[str, Any]:
    if not isinstance(reward, LogLikelihood):
        return {}
    return {
        f"classifier/{attribute.name}/{name}": value
        for attribute in reward.attributes
        for name, value in asdict(attribute.report).items()
    }


def _note(metrics: dict[str, float]) -> str:
    shown = {"reward_mean": "reward", "kl": "KL", "objective": "J", "accuracy": "accuracy"}
    known = {word: metrics.get(f"rollout/{name}") for name, word in shown.items()}
    return "  ".join(f"{word} {value:.2f}" for word, value in known.items() if value is not None)


def _folder(config: Config) -> Path:
    parts = [settings.chosen(config, group) for group in ("algo", "env", "reward")]
    folder = Path(config.root) / (config.name or "-".join([*parts, f"seed{config.seed}"]))
    if folder.exists():
        raise DiffRLError(f"{folder}: the run directory exists. Give another with name=..., or delete it.")
    return folder
