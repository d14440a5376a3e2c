import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_close, tiny_checkpoint
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffrl import weights
from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.emoji import ASSET
from diffrl.errors import DiffRLError
from diffrl.policy import LoRA, Policy
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.prompt_fidelity import PromptFidelity
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule


def stock_pipeline(path):
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_deterministic_pictures(path, prompts, latents, guidance_scale, num_steps, lora=None, targets=None):
    """Draw at eta = 0, where stock diffusers and we must agree to rounding."""
    backbone = StableDiffusion.load(str(path))
    schedule = DDIMSchedule(backbone.scheduler, num_steps, 0.0)
    policy = Policy(
        backbone.unet,
        schedule,
        backbone.encode_prompts([""]),
        guidance_scale=guidance_scale,
        num_classes=(3,),
        lora=LoRA(targets=targets) if targets else None,
    )
    if lora is not None:
        weights.load(policy, lora)
    env = DenoisingVectorEnv(backbone, schedule, Jpeg(), prompts, num_envs=len(prompts))
    options = {"latents": latents, "prompts": prompts}
    return rollout(env, policy, torch.Generator(), options=options).images


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_stock_diffusers_draws_the_same_pictures_from_the_emoji_model(guidance_scale):
    prompts = ["cat", "a fish"]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = stock_pipeline(ASSET)(
        prompts, num_inference_steps=5, guidance_scale=guidance_scale, latents=latents, output_type="pt"
    ).images
    ours = our_deterministic_pictures(ASSET, prompts, latents, guidance_scale, 5)
    assert_close(ours, theirs, atol=1e-4)


def test_stock_diffusers_draws_the_same_pictures_from_a_model_like_2_1(tmp_path):
    """Another text encoder, heads by level, linear projections, v-prediction."""
    tiny_checkpoint(
        tmp_path,
        unet={"attention_head_dim": (2, 4), "use_linear_projection": True},
        text={"hidden_act": "gelu", "num_hidden_layers": 2},
        scheduler={"prediction_type": "v_prediction"},
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = stock_pipeline(tmp_path)(
        ["cat", "bee"], num_inference_steps=5, guidance_scale=3.0, latents=latents, output_type="pt"
    ).images
    ours = our_deterministic_pictures(tmp_path, ["cat", "bee"], latents, 3.0, 5)
    assert_close(ours, theirs, atol=1e-4)
    assert ours.std() > 1e-2


def test_the_emoji_model_ships_within_its_budget_and_in_half_precision():
    files = list(ASSET.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 16e6
    for part in ("unet", "vae"):
        weights = load_file(ASSET / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not list(ASSET.rglob("*.bin"))
    assert not list(ASSET.rglob("*.pt"))
    assert (ASSET / "README.md").is_file()


def test_the_emoji_model_has_what_transformers_4_reads():
    """Without it the text encoder starts from random weights there, with a warning only."""
    names = load_file(ASSET / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    model = json.loads((ASSET / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((ASSET / "tokenizer" / "vocab.json").read_text(encoding="utf-8")) == model["vocab"]
    header, *merges = (ASSET / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert header.startswith("#version")
    assert [line.split(" ") for line in merges] == model["merges"]


def test_decoding_what_was_encoded_gives_the_picture_back(emoji):
    """Parts of a grid of emoji: 22 dB is an error of .08 a pixel; without the scale it would be 19.5 dB."""
    with Image.open(ASSET / "grid.png") as grid:
        pixels = torch.from_numpy(np.array(grid.convert("RGB"))[:128, :320])
    images = pixels.reshape(2, 64, 5, 64, 3).permute(0, 2, 4, 1, 3).flatten(0, 1) / 255
    latents = emoji.encode(images)
    assert latents.shape == (10, *emoji.latent_shape)
    error = (emoji.decode(latents) - images).square().flatten(1).mean(1)
    assert (-10 * error.log10()).min() > 22


def test_encoding_with_a_generator_draws_from_the_autoencoder_s_gaussian(tiny):
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    law = tiny.vae.encode(2 * images - 1).latent_dist
    scale = tiny.vae.config.scaling_factor
    assert_close(tiny.encode(images), scale * law.mean, atol=1e-6)
    drawn, again = (tiny.encode(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(drawn, again)
    standard = (drawn / scale - law.mean) / law.std
    assert_close(standard.mean(), 0.0, atol=0.04)  # of 10240: four standard errors
    assert_close(standard.std(), 1.0, atol=0.03)


def test_the_emoji_model_draws_what_the_prompt_says(emoji):
    from diffrl.envs.emoji import Emoji

    settings = Emoji()
    schedule = DDIMSchedule(emoji.scheduler, settings.num_steps, settings.eta)
    policy = Policy(
        emoji.unet, schedule, emoji.encode_prompts([""]), guidance_scale=settings.guidance_scale
    )
    prompts = ["fox", "squirrel", "sheep", "bee", "tiger", "panda", "peacock", "frog"] * 4
    env = DenoisingVectorEnv(emoji, schedule, Jpeg(), prompts, num_envs=len(prompts))
    images = rollout(
        env, policy, torch.Generator().manual_seed(0), seed=0, options={"prompts": prompts}
    ).images
    judge = PromptFidelity.load(ASSET / "judge")
    assert judge(images, prompts).float().mean() >= 0.8  # .97 over many more
    wrong = [*prompts[1:], prompts[0]]
    assert judge(images, wrong).float().mean() <= 0.1


class TestCheckpoint:
    def trained(self, path, **settings):
        from test_policy import learn_a_little, make_policy

        policy = make_policy(StableDiffusion.load(str(path)), **settings)
        learn_a_little(policy)
        return policy

    @pytest.mark.parametrize("more", [[], ["time_emb_proj", "conv1", "conv2"]], ids=str)
    def test_stock_load_lora_weights_reads_it(self, tiny_path, tmp_path, more):
        targets = LoRA().targets + more
        policy = self.trained(tiny_path, lora=LoRA(targets=targets))
        with torch.no_grad():  # the label embedding is not LoRA: leave it out of the comparison
            policy.label_embedding.tables[0].weight.zero_()
        weights.save(policy, tmp_path)
        prompts = ["cat", "bee"]
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pipeline = stock_pipeline(tiny_path)
        arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
        before = pipeline(prompts, latents=latents, **arguments).images
        pipeline.load_lora_weights(tmp_path)
        theirs = pipeline(prompts, latents=latents, **arguments).images
        ours = our_deterministic_pictures(tiny_path, prompts, latents, 2.0, 4, tmp_path, targets)
        assert_close(ours, theirs, atol=1e-4)
        assert (theirs - before).abs().max() > 1e-3

    def test_loading_gives_back_every_weight(self, tiny_path, tmp_path):
        from test_policy import make_policy

        policy = self.trained(tiny_path)
        weights.save(policy, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "control.safetensors",
            "pytorch_lora_weights.safetensors",
        ]
        other = make_policy(StableDiffusion.load(str(tiny_path)))
        weights.load(other, tmp_path)
        for (name, a), (_, b) in zip(policy.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_another_rank_or_label_count_is_named(self, tiny_path, tmp_path):
        from test_policy import make_policy

        from diffrl.policy import LoRA

        weights.save(self.trained(tiny_path), tmp_path)
        backbone = StableDiffusion.load(str(tiny_path))
        schedule = DDIMSchedule(backbone.scheduler, 4, 1.0)
        null = backbone.encode_prompts([""])
        rank2 = Policy(
            backbone.unet, schedule, null, guidance_scale=1.0, num_classes=(3,), lora=LoRA(rank=2)
        )
        with pytest.raises(DiffRLError, match=r"policy\.rank"):
            weights.load(rank2, tmp_path)
        more = make_policy(StableDiffusion.load(str(tiny_path)), num_classes=(5,))
        with pytest.raises(DiffRLError, match=r"control\.safetensors.*shape"):
            weights.load(more, tmp_path)


class TestLoading:
    def test_a_missing_part_is_named(self, tiny_path, tmp_path):
        copy = tmp_path / "model"
        shutil.copytree(tiny_path, copy)
        shutil.rmtree(copy / "vae")
        with pytest.raises(DiffRLError, match="no folder 'vae'"):
            StableDiffusion.load(str(copy))

    def test_truncated_weights_are_named(self, tiny_path, tmp_path):
        copy = tmp_path / "model"
        shutil.copytree(tiny_path, copy)
        path = copy / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DiffRLError, match=r"unet cannot be loaded from .*Unable to load weights"):
            StableDiffusion.load(str(copy))

    @pytest.mark.parametrize(
        ("version", "size", "side"),
        [("0.8.1", 32, 128), ("0.9.0", 32, 64), ("0.8.1", 96, 192), (None, [16, 16], 32)],
    )
    def test_a_folder_of_before_diffusers_0_9_is_as_large_as_stock_has_it(
        self, tiny_path, tmp_path, version, size, side
    ):
        copy = shutil.copytree(tiny_path, tmp_path / "model")
        path = copy / "unet" / "config.json"
        version = version or json.loads(path.read_text())["_diffusers_version"]
        change = {"_diffusers_version": version, "sample_size": size}
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert StableDiffusion.load(str(copy)).image_size == side
        stock = stock_pipeline(copy)
        theirs = stock.unet.config.sample_size
        assert (theirs if isinstance(theirs, int) else theirs[0]) * stock.vae_scale_factor == side

    def test_a_model_that_wants_the_strength_of_guidance_as_an_input_is_refused(self, tiny_path, tmp_path):
        copy = shutil.copytree(tiny_path, tmp_path / "model")
        path = copy / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time_cond_proj_dim": 256}))
        with pytest.raises(DiffRLError, match=r"more than a prompt .time_cond_proj_dim=256.*LCM"):
            StableDiffusion.load(str(copy))

    def test_a_hub_id_without_network_says_where_it_looked(self):
        with pytest.raises(DiffRLError, match="nobody/nothing: no such folder here, not in the cache"):
            StableDiffusion.load("nobody/nothing")

    def test_decoding_in_slices_changes_nothing(self, tiny, monkeypatch):
        latents = torch.randn(5, 4, 8, 8)
        with torch.no_grad():
            at_once = tiny.decode(latents)
            monkeypatch.setattr(tiny, "slice_size", 2)
            assert_close(tiny.decode(latents), at_once, atol=1e-6)

    @pytest.mark.parametrize(("side", "pictures"), [(64, 16), (128, 16), (256, 4), (512, 1), (768, 1)])
    def test_the_autoencoder_takes_one_picture_of_512_pixels_at_a_time(self, tiny_path, side, pictures):
        assert StableDiffusion.load(str(tiny_path), image_size=side).slice_size == pictures
