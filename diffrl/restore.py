"""From settings, or from a run's folder, to a model, its policy and its reward; and what these measure."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffrl import settings_file, weights
from diffrl.build import Setup
from diffrl.config import Config
from diffrl.conflicts import is_learned, judge_folder
from diffrl.envs.prompts import split_path
from diffrl.errors import DiffRLError
from diffrl.evaluate import evaluate
from diffrl.evaluate_mixture import MixtureEvaluation
from diffrl.learned import make_reward
from diffrl.policy import Policy
from diffrl.rewards.closed_form import ClosedForm
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.types import EVALUATION_SEED, Reward

CONFIG_FILE = "config.yaml"
CLASSIFIER_FILE = "classifier.safetensors"


def measure(
    setup: Setup, policy: Policy, reward: Reward, num_pictures: int, seed: int = EVALUATION_SEED
) -> dict[str, Any]:
    """Return `evaluate`'s measures with this setup's model, prompts and gamma."""
    if isinstance(reward, ClosedForm):
        return MixtureEvaluation(setup, policy, reward).measure(seed)
    asked = isinstance(reward, OnlineSurrogateReward) and reward.num_queries
    actor = setup.make_guided(policy, reward, num_pictures)
    gamma = setup.target_gamma
    folder = judge_folder(setup.config.env)
    judge = PromptFidelity.load(folder).to(setup.device) if folder is not None else None
    clip = setup.config.clip
    return evaluate(
        actor,
        num_pictures=num_pictures,
        gamma=gamma,
        z_known=setup.z_known,
        seed=seed,
        judge=judge,
        clip=clip,
        stand_in=reward if asked else None,
    )


def pretrained(setup: Setup) -> tuple[Policy, Reward]:
    """Return the model of a setup with nothing learnt yet, and its reward, fitted if it must be."""
    policy = setup.make_policy(setup.num_classes())
    return policy, make_reward(setup, policy)


def restore(path: Path, overrides: dict[str, Any]) -> tuple[Setup, Policy, Reward]:
    """Return a finished run's model, its trained policy and its reward.

    Args:
        path: the run's folder.
        overrides: settings of `Config` to replace, such as the prompts.
    """
    config = settings_of(path)
    config.dataset = config.dataset_pictures = None  # it has been learnt from, and may be gone
    for name in ("prompts", "eval_prompts"):
        kind, file = split_path(getattr(config, name) or "")
        if file is not None and (path / file.name).is_file():  # that an export brings along
            setattr(config, name, f"{kind}{path / file.name}")
    for name, value in overrides.items():
        setattr(config, name, value)
    config.env.compile = False  # it would take longer than what is drawn of a finished run
    setup, policy, reward = untrained(path, config)
    weights.load(policy, path)
    return setup, policy, reward


def settings_of(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of the run in a folder, with some `key=value` words that override them."""
    return settings_file.read(_config_file(path), overrides)


def env_of(path: Path) -> Any:
    """Return the settings of the env alone, of a run or an export whoever made it: nothing is imported."""
    return settings_file.read_env(_config_file(path))


def _config_file(path: Path) -> Path:
    if not path.is_dir():
        raise DiffRLError(f"{path}: no such run. 'ls runs' shows those in the default place.")
    return path / CONFIG_FILE


def untrained(path: Path, config: Config) -> tuple[Setup, Policy, Reward]:
    """Return a run's model as `pretrained` made it, with the reward that was fitted then."""
    setup = Setup(config)
    if is_learned(config.reward):
        reward: Reward = LogLikelihood.load(path / CLASSIFIER_FILE).to(setup.device)
    else:
        reward = config.reward
    return setup, setup.make_policy(reward.num_classes), reward


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


def fit_metrics(reward: Any) -> dict[str, Any]:
    """Return how good a learned reward's classifiers are, as metrics; nothing of another reward."""
    if not isinstance(reward, LogLikelihood):
        return {}
    return {
        f"classifier/{attribute.name}/{name}": value
        for attribute in reward.attributes
        for name, value in asdict(attribute.report).items()
    }
