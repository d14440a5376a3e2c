"""Fold classifier-free guidance into the emoji model: `python -m diffrl.benchmarks.distil_emoji`.

After `pretrain_emoji`. A copy of the denoiser learns to predict in one call what the model predicts with
guidance in two, eps_u + w (eps_c - eps_u), so that a faithful picture costs half as much: the finished
model is sampled at guidance 1. How strong that is can be set afterwards, by how far the weights go from
the old ones to the distilled: more is more faithful and less varied. For the empty prompt it learns the
unguided prediction, so that guidance can still be added on top. Sources: Meng et al., arXiv:2210.03142,
stage one, at a single w; interpolated weights, Wortsman et al., arXiv:2109.01903.
"""

import argparse
import copy
import dataclasses
import json
import platform
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from diffrl.benchmarks import emoji_data
from diffrl.benchmarks.pretrain_emoji import Stage, encode_pool, read_command, save
from diffrl.envs.emoji import ASSET


@dataclasses.dataclass
class Distillation:
    """What decides the distilled weights. Those of the shipped model are in its recipe.json."""

    guidance: float = 2.0
    blend: float = 0.4  # of the way from the old weights to the distilled ones
    steps: int = 2000
    batch: int = 32
    learning_rate: float = 4e-4
    pool: int = 8_000
    seed: int = 11


def distil(recipe: Distillation, model: Path, atlas: Path, work: Path, out: Path, device: str) -> None:
    """Train from where it stopped and write the model to `out`."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(device)
    names, glyphs = emoji_data.load_atlas(atlas)
    composites = emoji_data.Composites(glyphs.to(device))

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(names), (count,), device=device, generator=generator)
        return index, composites.draw(index, generator)

    index, pool = encode_pool(pipeline.vae, draw, recipe.pool, recipe.seed, device)
    pool = pool * pipeline.vae.config.scaling_factor
    captions = [*names, *emoji_data.ALIASES.values(), ""]
    other = emoji_data.second_names(names).to(device)
    tokens = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
    with torch.no_grad():
        embeds = pipeline.text_encoder(tokens).last_hidden_state
    teacher = pipeline.unet.eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    alpha_bar = pipeline.scheduler.alphas_cumprod.to(device)
    empty = len(captions) - 1

    def loss(generator: torch.Generator) -> Tensor:
        row = torch.randint(len(pool), (recipe.batch,), device=device, generator=generator)
        timestep = torch.randint(1000, (recipe.batch,), device=device, generator=generator)
        noise = torch.randn(recipe.batch, *pool.shape[1:], device=device, generator=generator)
        u = torch.rand(2, recipe.batch, device=device, generator=generator)
        caption = torch.where(u[0] < 0.5, index[row], other[index[row]])
        caption = torch.where(u[1] < 0.1, empty, caption)
        a = alpha_bar[timestep, None, None, None]
        noisy = a.sqrt() * pool[row] + (1 - a).sqrt() * noise
        with torch.no_grad():
            conditional = teacher(noisy, timestep, embeds[caption]).sample
            unconditional = teacher(noisy, timestep, embeds[empty].expand_as(embeds[caption])).sample
        target = unconditional + recipe.guidance * (conditional - unconditional)
        return F.mse_loss(student(noisy, timestep, embeds[caption]).sample, target)

    stage = Stage("distil", student, recipe.steps, recipe.learning_rate, work, ema=0.99)
    distilled = stage.run(loss, recipe.seed)
    with torch.no_grad():
        for new, old in zip(distilled.parameters(), teacher.parameters(), strict=True):
            new.lerp_(old, 1 - recipe.blend)
    pipeline.unet = distilled.to("cpu", torch.float16)
    pipeline.vae.to("cpu", torch.float16)
    save(pipeline, out)
    if out != model:
        shutil.copytree(model / "judge", out / "judge", dirs_exist_ok=True)
    path = out / "recipe.json"
    card = json.loads((model / path.name).read_text())
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {platform.machine()}"
    card["distillation"] = dataclasses.asdict(recipe) | {
        "seconds": round(stage.seconds), "hardware": hardware, "torch": torch.__version__,
    }  # fmt: skip
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(f"wrote {out}")


def main() -> None:
    """Read the command line and distil."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.distil_emoji", description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSET, help="what pretrain_emoji wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/distil-emoji"))
    recipe, atlas, options = read_command(parser, Distillation)
    distil(recipe, options.model, atlas, options.work, options.out, options.device)


if __name__ == "__main__":
    main()
