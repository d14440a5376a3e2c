"""A checkpoint that CTRL's authors have published, as a run that `diffrl eval` and `sample` read.

Theirs is a folder of `accelerate`: LoRA in the layout of diffusers 0.17, and `class_embedding.pth`, a row a
class and the null label's last. Source: github.com/zhaoyl18/CTRL.
"""

import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor

from diffrl import config as settings
from diffrl import settings_file
from diffrl.errors import DiffRLError
from diffrl.foreign_weights import read_weights
from diffrl.restore import CLASSIFIER_FILE, CONFIG_FILE
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.weights import CONTROL_FILE

_LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_EMBEDDING_FILE = "class_embedding.pth"


def import_checkpoint(source: Path, words: list[str]) -> Path:
    """Write the checkpoint in `source` as a run, and return the run's folder.

    Args:
        source: holds `pytorch_lora_weights.bin` or `.safetensors`, and `class_embedding.pth`.
        words: settings over those of `+experiment=ctrl_paper`; `reward.classifier` is needed.

    Raises:
        DiffRLError: files missing, damaged or of another layout, and labels the reward does not have.
    """
    lora, table = _read_lora(source), _read_table(source)
    config = settings.load(["+experiment=ctrl_paper", *words])
    if not getattr(config.reward, "classifier", None):
        raise DiffRLError(
            "reward.classifier=null: give the one it was trained with, such as "
            "CNN_5class_v1_64_final_calibrated.pth of CTRL's repository, or one of 'diffrl fit'."
        )
    reward: LogLikelihood = config.reward.load()
    if reward.num_classes != (len(table) - 1,):
        has = " x ".join(map(str, reward.num_classes))
        raise DiffRLError(
            f"{source / _EMBEDDING_FILE}: has {len(table) - 1} labels, the reward {has}. Give the "
            "classifier it was trained with; of CTRL's multitask, reward.joint=true."
        )
    run_name = source.resolve().parts[-3:]  # multitask_bs=512/checkpoints/checkpoint_47
    if any(part.startswith("multitask") for part in run_name) and not reward.joint:
        raise DiffRLError(
            f"{source}: of CTRL's multitask, whose label is 2 aesthetic + compressibility. Give "
            "reward=multitask reward.joint=true reward.measures=[aesthetic,compressibility], and the "
            "classifier of each."
        )
    config.policy.rank = next(len(down) for name, down in lora.items() if name.endswith("lora_A.weight"))
    folder = Path(config.root) / (config.name or source.resolve().name)
    if folder.exists():
        raise DiffRLError(f"{folder}: the run directory exists. Give another with name=..., or delete it.")
    folder.mkdir(parents=True)
    settings_file.write(config, folder / CONFIG_FILE)
    reward.save(folder / CLASSIFIER_FILE)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=lora)
    counts = json.dumps(reward.num_classes)
    save_file({"tables.0.weight": table}, folder / CONTROL_FILE, metadata={"num_classes": counts})
    return folder


def _read_lora(source: Path) -> dict[str, Tensor]:
    """Return the adapters under the names of today's peft; their scale is 1 in both."""
    path = next(
        (source / name for name in _LORA_FILES if (source / name).is_file()), source / _LORA_FILES[1]
    )
    stored = read_weights(path)
    for name in stored:
        if not name.endswith(("_lora.down.weight", "_lora.up.weight")):
            raise DiffRLError(
                f"{path}: {name!r} is no LoRA of diffusers 0.17, '...processor.to_q_lora.down.weight'."
            )
    return {name: t.contiguous() for name, t in convert_unet_state_dict_to_peft(stored).items()}


def _read_table(source: Path) -> Tensor:
    path = source / _EMBEDDING_FILE
    table = read_weights(path).get("weight")
    if table is None or table.ndim != 2:
        raise DiffRLError(f"{path}: no label embedding, it has no table 'weight' of a row a label.")
    if table[-1].any():
        raise DiffRLError(
            f"{path}: its last row, of the null label, is not zero: the reference would change."
        )
    return table.contiguous()
