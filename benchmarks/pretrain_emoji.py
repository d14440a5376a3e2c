"""Train the embedded emoji model from nothing: `python -m diffrl.benchmarks.pretrain_emoji`.

Three networks, one after the other: the autoencoder, the denoiser with its text encoder (first on
patterns of any kind, then on those the finished model draws), and the judge of prompt fidelity, which
sees composites only, never a generated picture. Every stage is
seeded and checkpointed in `--work`, so the same command goes on where it stopped. The finished model
is written to `--out` in the Stable Diffusion layout; the numbers that say whether it is any good
come from `python -m diffrl.benchmarks.measure_emoji`.
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffrl import disk
from diffrl.benchmarks import emoji_data
from diffrl.envs.emoji import ASSET
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.schedule import make_scheduler

MAX_TOKENS = 16  # chosen: the longest name has three words


@dataclasses.dataclass
class Recipe:
    """What decides the weights. Those of the shipped model are in its recipe.json."""

    seed: int = 0
    autoencoder_steps: int = 8000
    autoencoder_batch: int = 32
    denoiser_steps: int = 12000
    denoiser_batch: int = 64
    refine_steps: int = 12000
    refine_batch: int = 64
    judge_steps: int = 1500
    judge_batch: int = 64
    pool: int = 40_000  # latents encoded once, from which the denoiser's batches are drawn


class Stage:
    """One training loop: AdamW, warm-up and cosine decay, averaged weights, checkpoints."""

    def __init__(
        self, name: str, module: nn.Module, steps: int, lr: float, work: Path, ema: float = 0.999
    ) -> None:
        self.name, self.module, self.steps, self.lr = name, module, steps, lr
        self.path = work / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-3)
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self.step, self.seconds = 0, 0.0

    def run(self, loss: Callable[[torch.Generator], Tensor], seed: int) -> Any:
        """Train to the last step, saving every minute, and return the averaged module.

        The generator is seeded by the step, so a resumed run draws what an unbroken one would.
        """
        generator = torch.Generator(next(self.module.parameters()).device)
        if self.path.is_file():
            self._load()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[loss]}")) as bar:
            task = bar.add_task(self.name, total=self.steps, completed=self.step, loss="")
            since = time.monotonic()
            while self.step < self.steps:
                generator.manual_seed(seed * 1_000_003 + self.step)
                value = loss(generator)
                self.optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * self._decay()
                self.optimizer.step()
                self.average.update_parameters(self.module)
                self.step += 1
                if self.step % 100 == 0 or self.step == self.steps:
                    bar.update(task, completed=self.step, loss=f"loss {value.item():.4f}")
                if time.monotonic() - since > 60 or self.step == self.steps:
                    self.seconds += time.monotonic() - since
                    since = time.monotonic()
                    self._save()
                    bar.console.print(f"{self.name} {self.step}/{self.steps}: loss {value.item():.4f}")
        print(f"{self.name}: {self.step} steps in {self.seconds:.0f} s", flush=True)
        return self.average.module.eval().requires_grad_(False)

    def _decay(self) -> float:
        warm_up = min(200, self.steps // 10 + 1)
        return min((self.step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))

    def _save(self) -> None:
        parts = ("module", "average", "optimizer")
        state = {name: getattr(self, name).state_dict() for name in parts}
        with disk.replacing(self.path) as draft:
            torch.save(state | {"step": self.step, "seconds": self.seconds}, draft)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        for name in ("module", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]


def autoencoder_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """L1 + 2 MSE + L1 of the image gradient (the JPEG size lives in the edges) + 1e-4 KL."""
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample()).sample.float() - images
    gradient = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error.abs().mean() + 2 * error.square().mean() + gradient + 1e-4 * kl


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer, byte-level so that any prompt has tokens, with merges for `captions`."""
    trainer_model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_model.normalizer = normalizers.Lowercase()
    trainer_model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", show_progress=False)
    trainer_model.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trainer_model.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Write a checkpoint that transformers 4 reads as well, as it reads Stable Diffusion v1.5's own.

    It wants a tokenizer's older two files, and the text encoder's weights below `text_model.`; without that
    prefix it starts from random ones, with no more than a warning.
    """
    pipeline.save_pretrained(out)
    weights = out / "text_encoder" / "model.safetensors"
    named = {"text_model." + name.removeprefix("text_model."): w for name, w in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})
    model = json.loads((out / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (out / "tokenizer" / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
    )
    (out / "tokenizer" / "merges.txt").write_text(merges + "\n", encoding="utf-8")


class Denoiser(nn.Module):
    """The denoiser and its text encoder, which train together."""

    def __init__(self, vocabulary: int, end_of_text: int) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(48, 96, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=64,
            norm_num_groups=16,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=64,
                bos_token_id=end_of_text - 1,
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
            )
        )

    def loss(
        self, noisy: Tensor, timestep: Tensor, tokens: Tensor, caption: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared error of the predicted noise; `caption` indexes the rows of `tokens`."""
        embeds = self.text_encoder(tokens).last_hidden_state[caption]
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda):
            predicted = self.unet(noisy, timestep, embeds).sample
        return F.mse_loss(predicted.float(), noise)


def train(recipe: Recipe, atlas: Path, work: Path, out: Path, device: str) -> None:
    """Run every stage from where it stopped and write the model."""
    names, glyphs = emoji_data.load_atlas(atlas)
    composites = emoji_data.Composites(glyphs.to(device))
    on_cuda = device.startswith("cuda")
    layout = torch.channels_last if on_cuda else torch.contiguous_format
    torch.manual_seed(recipe.seed)

    def draw(count: int, generator: torch.Generator, *, tidy: bool) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(names), (count,), device=device, generator=generator)
        return index, composites.draw(index, generator, tidy=tidy)

    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=emoji_data.SIZE,
    ).to(device, memory_format=layout)

    def vae_loss(generator: torch.Generator) -> Tensor:
        _, images = draw(recipe.autoencoder_batch, generator, tidy=False)
        with torch.autocast("cuda" if on_cuda else "cpu", torch.bfloat16, enabled=on_cuda):
            return autoencoder_loss(vae, 2 * images - 1)

    stage = Stage("autoencoder", vae, recipe.autoencoder_steps, 2e-3, work)
    seconds = {}
    vae = stage.run(vae_loss, recipe.seed)
    seconds["autoencoder"] = stage.seconds

    def encode(*, tidy: bool) -> tuple[Tensor, Tensor]:
        index, latents = encode_pool(
            vae, functools.partial(draw, tidy=tidy), recipe.pool, recipe.seed + 7, device
        )
        return index, latents.half()

    pool_index, pool = encode(tidy=False)
    scale = 1 / pool.std().item()
    vae.register_to_config(scaling_factor=scale)

    captions = [*names, *emoji_data.ALIASES.values(), ""]
    other = emoji_data.second_names(names).to(device)
    tokenizer = make_tokenizer(captions)
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
    denoiser = Denoiser(len(tokenizer), tokenizer.eos_token_id).to(device)
    denoiser.unet.to(memory_format=layout)
    scheduler = make_scheduler()
    alpha_bar = scheduler.alphas_cumprod.to(device)

    def denoiser_loss(generator: torch.Generator, count: int) -> Tensor:
        row = torch.randint(len(pool), (count,), device=device, generator=generator)
        timestep = torch.randint(1000, (count,), device=device, generator=generator)
        noise = torch.randn(count, *pool.shape[1:], device=device, generator=generator)
        u = torch.rand(2, count, device=device, generator=generator)
        caption = torch.where(u[0] < 0.5, pool_index[row], other[pool_index[row]])
        caption = torch.where(u[1] < 0.1, len(captions) - 1, caption)  # as in classifier-free guidance
        a = alpha_bar[timestep, None, None, None]
        noisy = a.sqrt() * scale * pool[row].float() + (1 - a).sqrt() * noise
        return denoiser.loss(noisy, timestep, tokens, caption, noise)

    stage = Stage("denoiser", denoiser, recipe.denoiser_steps, 2e-3, work)
    denoiser = stage.run(lambda draws: denoiser_loss(draws, recipe.denoiser_batch), recipe.seed + 1)
    seconds["denoiser"] = stage.seconds
    pool_index, pool = encode(tidy=True)
    stage = Stage("refine", denoiser.requires_grad_(True), recipe.refine_steps, 1e-3, work)
    denoiser = stage.run(lambda draws: denoiser_loss(draws, recipe.refine_batch), recipe.seed + 3)
    seconds["refine"] = stage.seconds

    judge = PromptFidelity(names, emoji_data.ALIASES).to(device)

    def judge_loss(generator: torch.Generator) -> Tensor:
        index, images = draw(recipe.judge_batch, generator, tidy=True)
        return F.cross_entropy(judge.logits(emoji_data.worsen(images, generator)), index)

    stage = Stage("judge", judge, recipe.judge_steps, 2e-3, work)
    judge = stage.run(judge_loss, recipe.seed + 2)
    seconds["judge"] = stage.seconds

    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        text_encoder=denoiser.text_encoder.cpu(),  # float32: transformers loads the stored dtype
        tokenizer=tokenizer,
        unet=denoiser.unet.to("cpu", torch.float16),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipeline, out)
    judge.half().save(out / "judge")
    card = dataclasses.asdict(recipe) | {
        "seconds": {name: round(value) for name, value in seconds.items()},
        "hardware": torch.cuda.get_device_name() if on_cuda else platform.processor() or "CPU",
        "torch": torch.__version__,
    }
    (out / "recipe.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"wrote {out}")


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, draw: Callable, count: int, seed: int, device: str
) -> tuple[Tensor, Tensor]:
    """Return glyph indices `[P]` and latents `[P, 4, 16, 16]`, not yet scaled, of `count` composites.

    Args:
        vae: encodes.
        draw: `(number, generator)` to glyph indices and pictures.
        count: P.
        seed: of everything that is drawn.
        device: to draw and encode on.
    """
    generator = torch.Generator(device).manual_seed(seed)
    indices, latents = [], []
    for start in range(0, count, 1000):
        index, images = draw(min(1000, count - start), generator)
        moments = vae.encode(2 * images - 1).latent_dist
        indices.append(index)
        latents.append(moments.sample(generator).float())
    return torch.cat(indices), torch.cat(latents)


def read_command(parser: argparse.ArgumentParser, kind: type) -> tuple[Any, Path, argparse.Namespace]:
    """Return the recipe asked for, the atlas of glyphs (made if it is not there) and every option.

    Args:
        parser: with the script's own options, `--work` among them.
        kind: dataclass of the recipe; each field becomes an option.
    """
    parser.add_argument("--out", type=Path, default=ASSET, help="where the model is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--font", type=Path, default=emoji_data.FONT, help="Noto Color Emoji")
    parser.add_argument("--names", type=Path, default=emoji_data.NAMES, help="emoji-test.txt")
    fields = dataclasses.fields(kind)
    for field in fields:
        flag, number = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(flag, type=number, default=field.default, help=f"default {field.default}")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    atlas = options.work / "glyphs.npz"
    if not atlas.is_file():
        emoji_data.save_atlas(atlas, options.font, options.names)
    return kind(**{field.name: getattr(options, field.name) for field in fields}), atlas, options


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.pretrain_emoji", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain-emoji"))
    recipe, atlas, options = read_command(parser, Recipe)
    train(recipe, atlas, options.work, options.out, options.device)


if __name__ == "__main__":
    main()
