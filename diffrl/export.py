"""A run as files that other tools read: reloaded, and their pictures compared, before they are there.

| format | weights | read by |
|---|---|---|
| diffrl | all of it, and lists of prompts | `ControlledStableDiffusionPipeline`, our commands |
| diffusers | the LoRA | `pipe.load_lora_weights(DIR)` |
| kohya | the LoRA, in one file | ComfyUI, A1111, and stock diffusers |

A LoRA alone draws what the policy draws without a label: only the first carries the label embedding.
"""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save_file
from torch import Tensor

from diffrl import card, settings_file, weights
from diffrl.algorithms.guidance.base import Unguided
from diffrl.algorithms.untrained import Untrained
from diffrl.build import Setup
from diffrl.card import Comparison
from diffrl.config import Config
from diffrl.draw import draw
from diffrl.envs.emoji import ASSET
from diffrl.envs.prompts import split_path
from diffrl.errors import DiffRLError, unknown
from diffrl.pipeline import ControlledStableDiffusionPipeline, call_settings, of_model, of_pictures
from diffrl.policy import Policy
from diffrl.restore import CLASSIFIER_FILE, CONFIG_FILE, restore, settings_of
from diffrl.types import NO_LABEL, Reward, every_label

FORMATS = ("diffrl", "diffusers", "kohya")

_AT_ONCE = 2  # pictures of each label that are compared
_SEED = 0  # of the noise that both draw from
_HALF_A_LEVEL = 0.5 / 255  # of 8 bits: a larger difference could be seen in a file


def export(run: Path, out: Path, form: str = "diffrl", num_pictures: int = 64) -> Comparison:
    """Write what a run has learnt to the new folder `out`, and return how its pictures compare.

    Args:
        run: the folder of a run that draws pictures.
        out: is there only if all went well.
        form: one of `FORMATS`.
        num_pictures: that the numbers of the model card are measured on.

    Raises:
        DiffRLError: `out` is there, nothing was trained, or the reloaded files draw other pictures.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if num_pictures < 1:
        raise DiffRLError(f"-n {num_pictures}: must be 1 or more.")
    if out.exists():
        raise DiffRLError(f"{out}: is there already. Give another folder, or delete it.")
    config = settings_of(run)
    of_pictures(run, config.env)
    if isinstance(config.algo, Untrained) or config.env.random_weights:
        why = "algo=none" if isinstance(config.algo, Untrained) else "env.random_weights=true"
        raise DiffRLError(f"{run}: {why}, so there is nothing learnt to export.")
    fp32 = replace(config.env, precision="fp32")
    sampler = restore(run, {"env": fp32, "guidance": Unguided()})
    draft = out.with_name(f".{out.name}.draft-{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        lora_file = _write(run, config, draft, form, out.name)
        compared = _compare(sampler, draft, form, draft / lora_file, weights.read_lora(run))
        card.write(draft, out.name, form, run, sampler, compared, num_pictures)
        draft.rename(out)
    except OSError as error:
        raise DiffRLError(f"{out}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return compared


def check_repo_id(repo_id: str) -> None:
    """Raise DiffRLError unless `repo_id` can be the name of a repository on the hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DiffRLError(f"--push-to-hub {repo_id}: not a hub id, such as 'owner/name'.") from error


def push(out: Path, repo_id: str, *, private: bool) -> str:
    """Upload an export to the hub, and return its address there.

    Raises:
        DiffRLError: no token, no network, or no right to.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=out, commit_message="diffrl export")
    except Exception as error:  # of many kinds, by what went wrong
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DiffRLError(
            f"{repo_id}: not pushed ({reason.rstrip('.')}). {out} is whole; after 'hf auth login': "
            f"hf upload {repo_id} {out}"
        ) from error
    return address


def _write(run: Path, config: Config, draft: Path, form: str, name: str) -> str:
    """Write weights and settings, and return the name of the LoRA's file."""
    if config.env.model == str(ASSET):  # no path of this machine
        config.env.model = "/".join(ASSET.parts[-3:])
    if config.clip is not None and Path(config.clip).is_dir():
        config.clip = None
    if form == "diffrl":
        _bring_prompts(config, draft)
    settings_file.write(config, draft / CONFIG_FILE, here=False)
    if form == "kohya":
        lora = {f"unet.{key}": tensor for key, tensor in weights.read_lora(run).items()}
        save_file(convert_state_dict_to_kohya(lora), draft / f"{name}.safetensors")
        return f"{name}.safetensors"
    copied = [weights.LORA_FILE]
    if form == "diffrl":
        copied += [weights.CONTROL_FILE, *([CLASSIFIER_FILE] if (run / CLASSIFIER_FILE).is_file() else [])]
    for file in copied:
        shutil.copyfile(run / file, draft / file)
    return weights.LORA_FILE


def _bring_prompts(config: Config, draft: Path) -> None:
    """Copy the user's own lists of prompts, which our commands draw from, and name the copies."""
    for name in ("prompts", "eval_prompts"):
        kind, file = split_path(getattr(config, name) or "")
        if file is not None and file.is_file():
            shutil.copyfile(file, draft / f"{name}{file.suffix}")
            setattr(config, name, f"{kind}{name}{file.suffix}")


def _compare(
    sampler: tuple[Setup, Policy, Reward], draft: Path, form: str, lora_file: Path, lora: dict[str, Tensor]
) -> Comparison:
    """Draw with the reloaded files and with the run's policy, from the same noise."""
    setup, policy, reward = sampler
    env, prompt = setup.config.env, setup.eval_prompts[0]
    no_label = torch.full((len(reward.num_classes),), NO_LABEL)
    labels = [no_label]
    if form == "diffrl":
        pipeline: StableDiffusionPipeline = ControlledStableDiffusionPipeline.from_run(draft)
        every = every_label(reward.num_classes)
        labels += [every[0], every[-1]] if reward.num_classes else []
    else:
        pipeline = of_model(StableDiffusionPipeline, env.model, env.revision)
        weights.load_lora(pipeline, lora_file, lora, "default")
    pipeline.to(setup.device)
    pipeline.set_progress_bar_config(disable=True)
    actor = setup.guide(policy, reward, _AT_ONCE)
    difference = distance = 0.0
    for label in labels:
        ours = draw(actor, prompt, label, _SEED)
        asked = {"label": label} if form == "diffrl" and len(label) else {}
        theirs = pipeline(
            prompt,
            **asked,
            **call_settings(env),
            num_images_per_prompt=_AT_ONCE,
            generator=torch.Generator(setup.device).manual_seed(_SEED),
            output_type="pt",
        ).images
        policy.control_scale = 0.0
        pretrained = draw(actor, prompt, label, _SEED)
        policy.control_scale = 1.0
        difference = max(difference, float((theirs - ours).abs().max()))
        distance = max(distance, float((ours - pretrained).abs().max()))
    if not difference < _HALF_A_LEVEL:
        raise DiffRLError(
            f"format {form}: reloaded, it draws other pictures; they differ by up to {difference:.3f} of a "
            "pixel's range. Nothing was written; this is a bug, please report it."
        )
    left_out = form != "diffrl" and bool(reward.num_classes)
    return Comparison(_AT_ONCE * len(labels), difference, distance, left_out)
