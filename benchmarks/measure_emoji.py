"""Is the embedded model any good? `python -m diffrl.benchmarks.measure_emoji`.

Three numbers: the autoencoder's PSNR on fresh composites; prompt fidelity on the simple-animal prompts
(with the judge's own accuracy on fresh composites); the spread of true JPEG size within a prompt. And a
picture to look at. Needs the glyphs, as training does.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.benchmarks import emoji_data
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.emoji import Emoji
from diffrl.envs.prompts import load_prompts
from diffrl.log import grid
from diffrl.policy import Policy, Pretrained
from diffrl.rewards.jpeg import Jpeg, jpeg_kilobytes
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule


@torch.no_grad()
def measure(model: Path, glyphs: tuple[list[str], Tensor], *, per_prompt: int, seed: int) -> dict[str, Any]:
    """Return the numbers and write `grid.png` beside the model.

    Args:
        model: folder of the checkpoint.
        glyphs: names and premultiplied RGBA, as `load_atlas` returns them.
        per_prompt: pictures of each of the 45 simple-animal prompts.
        seed: of everything that is drawn.
    """
    settings = Emoji(model=str(model))
    backbone = StableDiffusion.load(settings.model)
    judge = PromptFidelity.load(model / "judge")
    generator = torch.Generator().manual_seed(seed)

    names, atlas = glyphs
    index = torch.randint(len(names), (1024,), generator=generator)
    fresh = emoji_data.Composites(atlas).draw(index, generator)
    rebuilt = _rebuild(backbone, fresh)
    psnr = -10 * (rebuilt - fresh).square().mean((1, 2, 3)).log10()

    prompts = load_prompts("simple_animals")
    schedule = DDIMSchedule(backbone.scheduler, settings.num_steps, settings.eta)
    policy = Policy(
        backbone.unet,
        schedule,
        backbone.encode_prompts([""]),
        guidance_scale=settings.guidance_scale,
    )
    env = DenoisingVectorEnv(backbone, schedule, Jpeg(), prompts, num_envs=len(prompts))
    pictures = []
    for number in range(per_prompt):
        options = {"prompts": prompts}
        first = seed if number == 0 else None
        pictures.append(rollout(env, Pretrained(policy), generator, seed=first, options=options).images)
    sizes = torch.stack([jpeg_kilobytes(images) for images in pictures])
    bounds = sizes.quantile(torch.tensor([0.1, 0.9]), dim=0)
    spread = bounds[1] - bounds[0]
    hits = torch.stack([judge(images, prompts) for images in pictures]).float()
    worst = hits.mean(0).argsort()[:5].tolist()
    rows = [pictures[i][start : start + 12] for i, start in enumerate((0, 12, 24, 33, 0, 12))]
    grid(rows, [""] * len(rows)).save(model / "grid.png")
    return {
        "psnr_db": float(psnr.mean()),
        "judge_accuracy": float(judge(fresh, [names[i] for i in index.tolist()]).float().mean()),
        "prompt_fidelity": float(hits.mean()),
        "spread_kb_mean": float(spread.mean()),
        "spread_kb_least": float(spread.min()),
        "spread_kb_pooled": float(sizes.quantile(0.9) - sizes.quantile(0.1)),
        "pictures": sizes.numel(),
        "least_faithful": {prompts[i]: float(hits[:, i].mean()) for i in worst},
    }


def _rebuild(backbone: StableDiffusion, images: Tensor) -> Tensor:
    scale = backbone.vae.config.scaling_factor
    parts = (scale * backbone.vae.encode(2 * part - 1).latent_dist.mode() for part in images.split(64))
    return torch.cat([backbone.decode(part) for part in parts])


def main() -> None:
    """Read the command line and print the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.measure_emoji", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(Emoji().model))
    parser.add_argument("--font", type=Path, default=emoji_data.FONT, help="Noto Color Emoji")
    parser.add_argument("--names", type=Path, default=emoji_data.NAMES, help="emoji-test.txt")
    parser.add_argument("--per-prompt", type=int, default=48, help="pictures a prompt (default 48)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        atlas = Path(folder) / "glyphs.npz"
        emoji_data.save_atlas(atlas, options.font, options.names)
        glyphs = emoji_data.load_atlas(atlas)
    numbers = measure(options.model, glyphs, per_prompt=options.per_prompt, seed=options.seed)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
