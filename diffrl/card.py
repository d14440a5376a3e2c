"""The model card of an export: what it is, its use, numbers, curves and pictures, and how it was made."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from diffrl import __version__, settings_file
from diffrl import config as settings
from diffrl.benchmarks.charts import over_training
from diffrl.benchmarks.summary import as_text
from diffrl.build import Setup
from diffrl.config import Config
from diffrl.envs.emoji import Emoji
from diffrl.evaluate import GRID_COLUMNS, picture_grid
from diffrl.log import evaluations
from diffrl.plot import picture, training
from diffrl.policy import Policy
from diffrl.restore import measure, settings_of
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.tables import control_rows
from diffrl.types import EVALUATION_SEED, NO_LABEL, Reward, every_label

CARD_FILE = "README.md"

_TEMPLATE = Path(__file__).parent / "assets" / "card.md"
_CURVES: dict[str, str | list[str]] = {
    "reward": "eval/reward_mean",
    "accuracy": "eval/accuracy",
    "KL (nats)": "eval/kl_nats",
    "prompt fidelity": "eval/prompt_fidelity",
}
_NUMBERS = {
    "reward": "reward_mean",
    "accuracy by the true measure": "accuracy",
    "macro F1": "macro_f1",
    "KL to the pretrained model (nats)": "kl_nats",
    "prompt fidelity": "prompt_fidelity",
    "diversity": "diversity",
    "CLIPScore": "clip_score",
    "network calls a picture": "nfe_per_image",
}
_LIBRARIES = ("diffusers", "peft", "transformers", "safetensors")


@dataclass(frozen=True)
class Comparison:
    """What came out of drawing with reloaded files, in units of a pixel's range."""

    pictures: int
    difference: float  # largest, to the run's pictures of the same noise
    distance: float  # largest, of the run's pictures to the pretrained model's
    label_left_out: bool  # the run has labels, and these files cannot hold them


def write(
    folder: Path,
    name: str,
    form: str,
    run: Path,
    sampler: tuple[Setup, Policy, Reward],
    compared: Comparison,
    num_pictures: int,
) -> None:
    """Write the card, its picture grid and, where the run has a log, its curves.

    Args:
        folder: of the export.
        name: that it will have.
        form: the format.
        run: the folder it comes from.
        sampler: the run, restored.
        compared: how its pictures compare.
        num_pictures: that its numbers are measured on.
    """
    setup, policy, reward = sampler
    config = setup.config
    alone = compared.label_left_out
    actor = setup.make_guided(policy, reward, GRID_COLUMNS)
    labels = torch.full((1, len(reward.num_classes)), NO_LABEL) if alone else None
    picture_grid(actor, setup.eval_prompts, labels=labels).save(folder / "grid.png")
    measures = measure(setup, policy, reward, num_pictures)
    known = {title: measures.get(key) for title, key in _NUMBERS.items()}
    numbers = {title: as_text(x, x) for title, x in known.items() if isinstance(x, int | float)}
    algo = settings.chosen(config, "algo")
    data = ModelCardData(
        base_model=_hub_id(config),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffrl", "lora", "stable-diffusion", "reinforcement-learning", algo],
    )
    text = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        form=form,
        alone=alone,
        controlled=bool(reward.num_classes),
        base=_base(config),
        base_model=_hub_id(config) or ("PATH" if not isinstance(config.env, Emoji) else None),
        algo=algo,
        reward=settings.chosen(config, "reward"),
        titles=[a.measure.title for a in reward.attributes] if isinstance(reward, LogLikelihood) else [],
        env=asdict(config.env),
        rank=config.policy.rank,
        prompt=setup.eval_prompts[0],
        label=_example(reward),
        numbers=numbers,
        num_pictures=num_pictures,
        seed=EVALUATION_SEED,
        table=control_rows(measures, reward) if isinstance(reward, LogLikelihood) else [],
        curves=_draw_curves(run, folder / "curves.png"),
        command=settings_file.command(settings_of(run), here=False),
        versions={"diffrl": __version__, "torch": torch.__version__, "Python": platform.python_version()}
        | {library: version(library) for library in _LIBRARIES},
        compared=compared,
    )
    (folder / CARD_FILE).write_text(str(text), encoding="utf-8")


def _hub_id(config: Config) -> str | None:
    model = config.env.model
    return None if Path(model).expanduser().exists() else model


def _base(config: Config) -> str:
    """Return what the run started from, in words, with no path of this machine."""
    if hub_id := _hub_id(config):
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    return "diffrl's emoji model" if isinstance(config.env, Emoji) else f"`{Path(config.env.model).name}`"


def _example(reward: Reward) -> str:
    """Return a label as it is written in Python."""
    label = every_label(reward.num_classes)[-1].tolist() if reward.num_classes else []
    return str(label[0] if len(label) == 1 else label)


def _draw_curves(run: Path, path: Path) -> bool:
    """Draw what the run's evaluations measured, if there were two of them, and return whether."""
    points = list(evaluations(run))
    panels = over_training(points, _CURVES) if points else {}
    if panels:
        picture(training, panels, "pictures drawn", len(panels)).save(path)
    return bool(panels)
