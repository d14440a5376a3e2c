import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from conftest import assert_close, tiny_checkpoint
from original_layout import original_layout
from safetensors.torch import load_file, save_file
from test_cli import FAST

from diffrl.backbones import single_file
from diffrl.backbones.architectures import NETWORKS, SD_V1, SD_V2
from diffrl.backbones.loading import fingerprint
from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.cli import main
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError

V2 = {
    "unet": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "text": {"hidden_act": "gelu", "num_hidden_layers": 2},
    "scheduler": {"prediction_type": "v_prediction"},
}


@pytest.fixture(scope="session")
def v2_path(tmp_path_factory):
    """A checkpoint like 2.1's: another text encoder, heads by level, v-prediction."""
    return tiny_checkpoint(tmp_path_factory.mktemp("v2"), **V2)


@pytest.fixture
def copy(tiny_path, tmp_path):
    return shutil.copytree(tiny_path, tmp_path / "model")


def assert_same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def write_original(folder, path, *, open_clip=False, dtype=torch.float32):
    """Write the checkpoint in `folder` as one file, its configs and tokenizer beside it."""
    backbone = StableDiffusion.load(str(folder))
    tensors = original_layout(backbone.unet, backbone.vae, backbone.text_encoder, open_clip=open_clip)
    path.parent.mkdir(exist_ok=True)
    save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, path)
    for config in folder.glob("*/*config.json"):
        (path.parent / config.parent.name).mkdir(exist_ok=True)
        shutil.copy(config, path.parent / config.parent.name)
    shutil.copytree(folder / "tokenizer", path.parent / "tokenizer", dirs_exist_ok=True)
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestFolder:
    def test_a_weight_that_is_missing_is_named(self, copy):
        path = copy / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        del tensors["conv_out.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(DiffRLError, match=r"no weights for unet 'conv_out.weight'"):
            StableDiffusion.load(str(copy))

    def test_a_missing_weight_of_the_text_encoder_is_named(self, copy):
        path = copy / "text_encoder" / "model.safetensors"
        tensors = {name: t for name, t in load_file(path).items() if "final_layer_norm.bias" not in name}
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(DiffRLError, match=r"no weights for text_encoder '.*final_layer_norm.bias'"):
            StableDiffusion.load(str(copy))

    @pytest.mark.parametrize(
        ("part", "change", "said"),
        [
            (
                "unet",
                {"block_out_channels": [8, 24]},
                r"has shape \[.*16.*\], by its config.json \[.*24.*\]",
            ),
            ("vae", {"block_out_channels": [8, 16]}, r"has shape \[.*8.*\], by its config.json \[.*16.*\]"),
            (
                "text_encoder",
                {"intermediate_size": 24},
                r"has shape \[.*16.*\], by its config.json \[.*24.*\]",
            ),
        ],
    )
    def test_a_weight_of_another_shape_is_named(self, copy, part, change, said):
        edit(copy / part / "config.json", **change)
        with pytest.raises(DiffRLError, match=rf"{part} '.*(weight|bias)' {said}"):
            StableDiffusion.load(str(copy))

    def test_weights_that_are_not_there_are_named(self, copy):
        (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(DiffRLError, match=r"vae/diffusion_pytorch_model.safetensors is missing"):
            StableDiffusion.load(str(copy))

    def test_a_tokenizer_without_its_words_is_refused(self, copy):
        for name in ("tokenizer.json", "vocab.json"):
            (copy / "tokenizer" / name).unlink(missing_ok=True)
        with pytest.raises(DiffRLError, match=r"tokenizer/tokenizer.json is missing"):
            StableDiffusion.load(str(copy))

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_damaged_config_is_named(self, copy, text):
        (copy / "unet" / "config.json").write_text(text)
        with pytest.raises(DiffRLError, match=r"unet/config.json"):
            StableDiffusion.load(str(copy))

    @pytest.mark.parametrize(
        ("name", "part"),
        [("StableDiffusionXL", "text_encoder_2"), ("StableDiffusion3", "transformer")],
    )
    def test_another_family_is_said_to_be_one(self, tmp_path, name, part):
        index = {"_class_name": f"{name}Pipeline", part: ["library", "Class"], "vae": ["diffusers", "A"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(
            DiffRLError, match=f"a {name} checkpoint .* Supported are Stable Diffusion v1.x"
        ):
            StableDiffusion.load(str(tmp_path))

    @pytest.mark.parametrize(
        ("part", "change", "said"),
        [
            ("unet", {"in_channels": 9}, "takes 9 channels .* Inpainting"),
            ("unet", {"addition_embed_type": "text_time"}, "more than a prompt .addition_embed_type"),
            ("unet", {"cross_attention_dim": 24}, "prompts of width 24, its text encoder makes 16"),
            ("vae", {"latent_channels": 16}, "its latents have 16"),
        ],
    )
    def test_an_architecture_that_is_not_supported_is_told_before_weights_are_read(
        self, copy, part, change, said
    ):
        edit(copy / part / "config.json", **change)
        for weights in copy.rglob("*.safetensors"):
            weights.unlink()
        with pytest.raises(DiffRLError, match=said):
            StableDiffusion.load(str(copy))

    def test_a_scheduler_of_another_class_is_read_as_ddim(self, copy):
        path = copy / "scheduler" / "scheduler_config.json"
        config = {"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.012}
        path.write_text(json.dumps(config | {"beta_schedule": "linear", "skip_prk_steps": True}))
        scheduler = StableDiffusion.load(str(copy)).scheduler
        assert not scheduler.config.clip_sample
        assert_close(scheduler.alphas_cumprod[0], 1 - 0.001, atol=1e-6)


class TestPickle:
    def malicious(self, path, witness):
        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {witness}",)

        torch.save({"conv_in.weight": torch.zeros(1), "extra": Payload()}, path)

    @pytest.mark.parametrize(
        ("part", "name"),
        [
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        ],
    )
    def test_in_a_folder_only_one_of_tensors_is_read(self, copy, tmp_path, part, name):
        expected = StableDiffusion.load(str(copy))
        stored = copy / part / f"{name}.safetensors"
        pickle = stored.with_name({"model": "pytorch_model"}.get(name, name) + ".bin")
        torch.save(load_file(stored), pickle)
        stored.unlink()
        assert_same(StableDiffusion.load(str(copy)), expected)

        self.malicious(pickle, tmp_path / "executed")
        with pytest.raises(DiffRLError, match=f"{part} cannot be loaded .* are not run; give .safetensors"):
            StableDiffusion.load(str(copy))
        assert not (tmp_path / "executed").exists()

    def test_as_one_file_only_one_of_tensors_is_read(self, tiny_path, tmp_path):
        path = write_original(tiny_path, tmp_path / "model" / "tiny.safetensors")
        pickle = path.with_suffix(".ckpt")
        torch.save({"state_dict": load_file(path), "global_step": 7}, pickle)
        assert_same(StableDiffusion.load(str(pickle)), StableDiffusion.load(str(tiny_path)))

        self.malicious(pickle, tmp_path / "executed")
        with pytest.raises(DiffRLError, match=r"tiny.ckpt: damaged, or it holds more than tensors"):
            StableDiffusion.load(str(pickle))
        assert not (tmp_path / "executed").exists()


class TestOneFile:
    @pytest.mark.parametrize("open_clip", [False, True], ids=["v1", "v2"])
    def test_it_is_the_same_model_as_the_folder(self, tiny_path, v2_path, tmp_path, open_clip):
        folder = v2_path if open_clip else tiny_path
        path = write_original(folder, tmp_path / "model" / "one.safetensors", open_clip=open_clip)
        ours, theirs = StableDiffusion.load(str(path)), StableDiffusion.load(str(folder))
        assert_same(ours, theirs)
        assert ours.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type
        prompts = ["cat", "a dog"]
        assert_close(ours.encode_prompts(prompts), theirs.encode_prompts(prompts), atol=0)

    @pytest.mark.parametrize(("configs", "counts"), [(SD_V1, (686, 248)), (SD_V2, (686, 248))])
    def test_the_published_files_fit_the_built_in_configs(self, monkeypatch, tmp_path, configs, counts):
        """Without weights: their names and shapes alone."""
        with init_empty_weights(include_buffers=False):
            networks = [part.build(configs[part.name]) for part in NETWORKS]
        tensors = original_layout(*networks, open_clip=configs is SD_V2)
        starts = ("model.diffusion_model.", "first_stage_model.")
        assert tuple(sum(name.startswith(start) for name in tensors) for start in starts) == counts
        # as they stand in sd-v1-4 and v2-1_768
        assert tensors["model.diffusion_model.output_blocks.11.0.skip_connection.weight"].shape[:2] == (
            320,
            640,
        )
        assert tensors["first_stage_model.decoder.up.3.upsample.conv.weight"].shape[:2] == (512, 512)
        assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
        monkeypatch.setattr(single_file, "_tensors", lambda model, path: tensors)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            read, found = single_file.read_file("model", tmp_path / "model.safetensors")
        # 2.x's base models have these names and shapes too
        assert ["predicts noise" in str(each.message) for each in said] == [True] * (configs is SD_V2)
        assert found["text_encoder"] == configs["text_encoder"]
        for network, part in zip(networks, NETWORKS, strict=True):
            assert read[part.name].state_dict().keys() == network.state_dict().keys()

    def test_a_half_precision_file_is_read_as_the_precision_that_is_asked_for(self, tiny_path, tmp_path):
        path = write_original(tiny_path, tmp_path / "model" / "half.safetensors", dtype=torch.float16)
        assert {t.dtype for t in StableDiffusion.load(str(path)).parameters()} == {torch.float32}

    def test_another_width_is_told_by_the_weight_that_does_not_fit(self, tiny_path, tmp_path):
        path = write_original(tiny_path, tmp_path / "model" / "one.safetensors")
        shutil.rmtree(path.parent / "unet")  # v1.5's instead
        shutil.rmtree(path.parent / "text_encoder")
        with pytest.raises(DiffRLError, match=r"unet '.*' has shape \[8.*another architecture"):
            StableDiffusion.load(str(path))

    def test_an_inpainting_one_is_refused_with_the_reason(self, tmp_path):
        first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)}
        save_file(first, tmp_path / "inpainting.safetensors")
        with pytest.raises(DiffRLError, match=r"takes 9 channels .* Inpainting"):
            StableDiffusion.load(str(tmp_path / "inpainting.safetensors"))

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("conditioner.embedders.0.transformer.x", "a Stable Diffusion XL file"),
            ("model.diffusion_model.joint_blocks.0.x", "a Stable Diffusion 3 file"),
            ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA file"),
            ("conv_in.weight", "no weight begins with 'model.diffusion_model.'"),
        ],
    )
    def test_another_kind_of_file_is_said_to_be_one(self, tmp_path, name, said):
        save_file({name: torch.zeros(1)}, tmp_path / "one.safetensors")
        with pytest.raises(DiffRLError, match=said):
            StableDiffusion.load(str(tmp_path / "one.safetensors"))

    def test_a_damaged_one_is_said_to_be_damaged(self, tmp_path):
        (tmp_path / "one.safetensors").write_bytes(b"oh")
        with pytest.raises(DiffRLError, match=r"one.safetensors: damaged or cut short"):
            StableDiffusion.load(str(tmp_path / "one.safetensors"))

    def test_without_a_tokenizer_beside_it_it_says_where_to_get_one(self, tiny_path, tmp_path):
        path = write_original(tiny_path, tmp_path / "model" / "one.safetensors")
        shutil.rmtree(path.parent / "tokenizer")
        with pytest.raises(DiffRLError, match=r"no tokenizer.*hf download openai/clip-vit-large-patch14"):
            StableDiffusion.load(str(path))

    def test_its_fingerprint_is_of_its_content(self, tmp_path, monkeypatch):
        paths = [tmp_path / folder / "one.safetensors" for folder in "ab"]
        for path in paths:
            path.parent.mkdir()
            save_file({"x": torch.zeros(1)}, path)
        assert fingerprint(str(paths[0])) == fingerprint(str(paths[1]))
        monkeypatch.setattr(Path, "open", None)
        assert fingerprint(str(paths[0])) == fingerprint(str(paths[1]))  # which are read once
        monkeypatch.undo()
        save_file({"x": torch.ones(1)}, paths[1])
        assert fingerprint(str(paths[0])) != fingerprint(str(paths[1]))

    def test_one_that_is_not_there_is_named(self):
        with pytest.raises(DiffRLError, match=r"models/one.safetensors: no such file"):
            StableDiffusion.load("models/one.safetensors")


class TestRandomWeights:
    def test_the_built_in_architectures_have_the_published_sizes(self):
        published = {"unet": (859_520_964, 865_910_724), "vae": (83_653_863,) * 2}
        published["text_encoder"] = (123_060_480, 340_387_840)
        for part in NETWORKS:
            with init_empty_weights():
                networks = [part.build(configs[part.name]) for configs in (SD_V1, SD_V2)]
            counts = tuple(sum(p.numel() for p in network.parameters()) for network in networks)
            assert counts == published[part.name]

    def test_the_configs_of_a_folder_are_enough_and_give_the_same_weights_each_time(self, copy):
        for path in copy.rglob("*.safetensors"):
            path.unlink()
        shutil.rmtree(copy / "tokenizer")
        first = StableDiffusion.load(str(copy), random_weights=True)
        torch.rand(1)  # whatever was drawn before
        second = StableDiffusion.load(str(copy), random_weights=True)
        assert_same(first, second)
        assert first.unet.conv_in.weight.std() > 0
        embeds = first.encode_prompts(["cat", "cats", "猫", ""])
        assert embeds.shape == (4, 16, 16)
        assert len({tuple(e.flatten().tolist()) for e in embeds}) == 4

    def test_of_another_hub_id_the_configs_must_be_given(self):
        with pytest.raises(DiffRLError, match=r"random_weights=true: only .* is built in"):
            SD15(model="someone/else", random_weights=True).load()

    @pytest.mark.parametrize("algo", ["ctrl", "ddpo"])
    def test_they_train_in_bf16_at_another_size_and_say_that_it_means_nothing(
        self, algo, tiny_path, tmp_path, capsys
    ):
        for config in tiny_path.glob("*/*config.json"):
            (tmp_path / config.parent.name).mkdir(exist_ok=True)
            shutil.copy(config, tmp_path / config.parent.name)
        shutil.rmtree(tmp_path / "tokenizer")
        words = ["env.random_weights=true", "env.precision=bf16", "env.image_size=24", f"algo={algo}"]
        words += [f"env.model={tmp_path}", f"root={tmp_path}", "name=run"]
        assert main(["train", *FAST, *words]) == 0
        assert "the result means nothing" in capsys.readouterr().out
        last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
        assert last["eval/kl_nats"] == 0.0
        assert main(["eval", str(tmp_path / "run"), "-n", "4"]) == 0


class TestImageSize:
    def test_it_decides_latents_and_pictures(self, tiny_path):
        backbone = StableDiffusion.load(str(tiny_path), image_size=24)
        assert backbone.latent_shape == (4, 12, 12)
        assert backbone.decode(torch.zeros(1, *backbone.latent_shape)).shape == (1, 3, 24, 24)

    def test_one_that_no_latents_have_is_refused(self, tiny_path):
        with pytest.raises(DiffRLError, match=r"env.image_size=510: must be a multiple of 8"):
            SD15(image_size=510)
        with pytest.raises(DiffRLError, match=r"env.image_size=17: must be a multiple of 2"):
            StableDiffusion.load(str(tiny_path), image_size=17)
