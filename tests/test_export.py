"""What leaves the toolkit: each format read back by other means than ours, and nothing half-written."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_close, learnt
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import fails
from torch import nn

import diffrl.export
from diffrl import ControlledStableDiffusionPipeline, processes, settings_file, weights
from diffrl import config as settings
from diffrl.cli import main
from diffrl.draw import draw
from diffrl.errors import DiffRLError
from diffrl.restore import restore

SEED = 3


def stock(path):
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline, count=2, **options):
    how = {"num_inference_steps": 3, "guidance_scale": 1.5, "eta": 1.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(SEED)
    return pipeline("cat", num_images_per_prompt=count, generator=generator, **how | options).images


def without_label(run, count=2):
    setup, policy, reward = restore(run, {})
    no_label = torch.full((len(reward.num_classes),), -1)
    return draw(setup.guide(policy, reward, count), "cat", no_label, SEED)


@pytest.fixture(scope="module")
def exported(learnt_run, tmp_path_factory):
    """Return `{format: folder}`, each of the same run."""
    root = tmp_path_factory.mktemp("exported")
    for form in ("diffrl", "diffusers", "kohya"):
        out = root / f"my-{form}"
        assert main(["export", str(learnt_run), str(out), "--format", form, "-n", "4"]) == 0
    return {folder.name.removeprefix("my-"): folder for folder in root.iterdir()}


def test_each_format_holds_what_it_says(exported):
    about = {"README.md", "config.yaml", "grid.png", "curves.png"}
    lora, control = "pytorch_lora_weights.safetensors", "control.safetensors"
    found = {form: {path.name for path in folder.iterdir()} for form, folder in exported.items()}
    assert found == {
        "diffrl": {*about, lora, control, "classifier.safetensors"},
        "diffusers": {*about, lora},
        "kohya": {*about, "my-kohya.safetensors"},
    }


@pytest.mark.parametrize("form", ["diffrl", "diffusers", "kohya"])
def test_stock_diffusers_reads_the_lora_of_each(exported, learnt_run, tiny_path, form):
    pipeline = stock(tiny_path)
    before = pictures(pipeline)
    pipeline.load_lora_weights(exported[form])
    assert_close(pictures(pipeline), without_label(learnt_run), atol=1e-5)
    assert (pictures(pipeline) - before).abs().max() > 1e-2


def test_kohya_s_file_means_alpha_over_rank_times_up_times_down(exported, learnt_run, tiny_path):
    """As ComfyUI and A1111 read it: added to the weight of the module that the underscores name."""
    stored = load_file(exported["kohya"] / "my-kohya.safetensors")
    pipeline = stock(tiny_path)
    modules = {f"lora_unet_{name.replace('.', '_')}": m for name, m in pipeline.unet.named_modules()}
    names = {key.partition(".")[0] for key in stored}
    assert len(stored) == 3 * len(names)
    for name in names:
        down, up = stored[f"{name}.lora_down.weight"], stored[f"{name}.lora_up.weight"]
        strength = stored[f"{name}.alpha"].item() / len(down)
        # of a convolution `up` is 1 x 1, and `down` has its window
        modules[name].weight.data += strength * torch.tensordot(up.flatten(1), down, 1)
    assert_close(pictures(pipeline), without_label(learnt_run), atol=1e-5)


def test_kohya_and_diffusers_can_say_every_layer_of_the_denoiser(tmp_path):
    """Every kind of layer that LoRA can sit on, in Stable Diffusion v1.5's blocks: nothing is lost."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    size = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16}

    def denoiser():
        return UNet2DConditionModel(attention_head_dim=2, sample_size=8, **blocks, **size)

    unet = denoiser()
    layers = [name for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=layers), unet)
    lora = {name: torch.randn_like(tensor) for name, tensor in get_peft_model_state_dict(unet).items()}
    assert len(lora) == 2 * len(layers) > 200
    named = {f"unet.{name}": tensor for name, tensor in lora.items()}
    for file, written in {"d": named, "k": diffrl.export.convert_state_dict_to_kohya(named)}.items():
        save_file(written, tmp_path / f"{file}.safetensors")
        pipeline = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
        found, alphas, _ = pipeline.lora_state_dict(
            tmp_path, weight_name=f"{file}.safetensors", return_lora_metadata=True
        )
        read = denoiser()
        pipeline.load_lora_into_unet(found, alphas, read, adapter_name="default")
        loaded = get_peft_model_state_dict(read, adapter_name="default")
        assert loaded.keys() == lora.keys()
        assert all(torch.equal(loaded[name], lora[name]) for name in lora)
        scalings = {layer.scaling["default"] for layer in read.modules() if hasattr(layer, "scaling")}
        assert scalings == {1.0}


def test_the_whole_of_a_run_is_in_ours(exported, learnt_run, capsys):
    ours = ControlledStableDiffusionPipeline.from_run(exported["diffrl"])
    ours.set_progress_bar_config(disable=True)
    theirs = ControlledStableDiffusionPipeline.from_run(learnt_run)
    for label in (0, 1):
        assert_close(pictures(ours, label=label), pictures(theirs, label=label), atol=0)
    said = []
    for folder in (learnt_run, exported["diffrl"]):  # and our commands take it for a run
        capsys.readouterr()
        assert main(["eval", str(folder), "--json", "-n", "4"]) == 0
        said.append(json.loads(capsys.readouterr().out) | {"seconds_per_image": 0})
    assert said[0] == said[1]


def test_a_run_of_two_attributes_is_exported(two_controls, tmp_path, capsys):
    out = tmp_path / "two"
    assert main(["export", str(two_controls), str(out), "-n", "4"]) == 0
    assert "6 differ by at most" in " ".join(capsys.readouterr().out.split())
    pipeline = ControlledStableDiffusionPipeline.from_run(out)
    assert pipeline("cat", label=[1, 0], output_type="pt").images.shape == (1, 3, 16, 16)
    card = (out / "README.md").read_text()
    assert "A label decides the JPEG size and the colourfulness of a picture" in card
    assert "label=[1, 1]" in card


def test_an_export_needs_no_list_and_no_data_set_of_the_machine_it_was_made_on(tiny_path, tmp_path, capsys):
    words, pictures = tmp_path / "words.txt", tmp_path / "pictures"
    words.write_text("cat\nbee\n")
    pictures.mkdir()
    for number in range(40):
        Image.new("RGB", (16, 16), (6 * number, 80, 200)).save(pictures / f"{number}.png")
    asked = [f"prompts={words}", f"dataset={pictures}", "dataset_pictures=40"]
    run = learnt(tmp_path / "run", f"env.model={tiny_path}", "algo.updates=1", *asked)
    assert main(["export", str(run), str(tmp_path / "out"), "-n", "2"]) == 0
    words.unlink()
    shutil.rmtree(pictures)
    assert (tmp_path / "out" / "prompts.txt").read_text() == "cat\nbee\n"
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["eval", str(moved), "--json", "-n", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4


def test_a_run_of_a_schedule_without_offset_is_exported(tiny_path, tmp_path):
    """Stock pipelines correct the offset of the schedule they are given; a run keeps it."""
    model = shutil.copytree(tiny_path, tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps_offset": 0}))
    words = [f"env.model={model}", "env.eta=0", "algo=reward_backprop", "algo.updates=1"]
    run = learnt(tmp_path / "run", *words)
    assert main(["export", str(run), str(tmp_path / "out"), "-n", "2"]) == 0
    pipeline = ControlledStableDiffusionPipeline.from_run(tmp_path / "out")
    pipeline.scheduler.set_timesteps(2)
    assert pipeline.scheduler.timesteps.tolist() == [500, 0]


def test_a_run_without_labels_is_whole_as_a_lora(tiny_path, tmp_path, capsys):
    run = learnt(tmp_path / "run", f"env.model={tiny_path}", "algo=ddpo", "reward=jpeg", "algo.updates=1")
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "x"), "--format", "kohya", "-n", "2"]) == 0
    assert "label=" not in capsys.readouterr().out
    assert "label" not in (tmp_path / "x" / "README.md").read_text()


class TestCard:
    def test_it_has_what_the_hub_reads(self, exported):
        card = ModelCard.load(exported["diffrl"] / "README.md")
        assert card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "text-to-image"
        assert {"diffrl", "lora", "ctrl"} <= set(card.data.tags)
        with (
            Image.open(exported["diffrl"] / "grid.png") as grid,
            Image.open(exported["diffrl"] / "curves.png") as curves,
        ):
            assert grid.height > 3 * 128  # the pretrained model and two labels
            assert curves.width > 3 * 400  # reward, accuracy, KL

    def test_its_numbers_are_what_its_command_prints(self, exported, capsys):
        text = (exported["diffrl"] / "README.md").read_text()
        assert "diffrl eval my-diffrl -n 4 --seed 42" in text
        assert main(["eval", str(exported["diffrl"]), "--json", "-n", "4", "--seed", "42"]) == 0
        measures = json.loads(capsys.readouterr().out)
        assert f"| reward | {measures['reward_mean']:.3f} |" in text
        assert f"| accuracy by the true measure | {measures['accuracy']:.3f} |" in text

    def test_its_command_asks_for_the_run_s_settings(self, exported, learnt_run):
        text = (exported["diffrl"] / "README.md").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("diffrl train")]
        asked, run = settings.load(shlex.split(line)[2:]), settings_file.read(learnt_run / "config.yaml")
        run.name, run.root = asked.name, asked.root
        run.env.model = Path(run.env.model).name  # no place of this machine
        assert asked == run

    def test_it_says_where_the_label_is_not(self, exported):
        texts = {form: (folder / "README.md").read_text() for form, folder in exported.items()}
        says = {form: "The label is not in here" in text for form, text in texts.items()}
        assert says == {"diffrl": False, "diffusers": True, "kohya": True}

    def test_its_pictures_are_those_that_its_files_draw(self, exported):
        """Rows of 128 px and a gap of 4: the pretrained model's, then one a label or the LoRA's alone."""
        rows = {}
        for form, folder in exported.items():
            with Image.open(folder / "grid.png") as grid:
                rows[form] = (grid.height - 24) / 132
        assert rows == {"diffrl": 3, "diffusers": 2, "kohya": 2}


@pytest.mark.parametrize(
    "words",
    [
        ["algo=ddpo", "reward=jpeg", "prompts=eval_animals", "clip=null"],
        ["env=gaussian_mixture", "algo.gamma=3", "reward.slopes=[-1.0,2.5]"],
        ["+experiment=emoji_full", "eval_scales=[0.5,2.0]", "dataset='my pictures'"],
        ["algo=ddpo", "reward=[jpeg,examples/redness.py:redness]", "reward.weights=[1,2]"],
        ["env=sd15", "env.revision='1.0'", "env.image_size=256", "guidance=svdd"],
    ],
    ids=" ".join,
)
def test_the_words_of_settings_ask_for_these_settings(words, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    config = settings.load(words)
    again = settings_file.words(config)
    assert not any(word.endswith("=custom") for word in again)
    assert settings_file.facts(settings.load(again)) == settings_file.facts(config)
    assert settings_file.words(settings.load([])) == []


def test_the_emoji_model_is_found_wherever_the_run_was_trained():
    elsewhere = "/home/someone/lib/python3.12/site-packages/diffrl/assets/emoji"
    assert settings.load([f"env.model={elsewhere}"]) == settings.load([])


class TestNothingIsHalfWritten:
    def nothing_in(self, folder):
        return [path.name for path in folder.iterdir()] == []

    def test_a_wrong_alpha_is_seen_in_the_pictures(self, learnt_run, tmp_path, capsys, monkeypatch):
        true = diffrl.export.convert_state_dict_to_kohya

        def doubled(lora):
            return {name: 2 * t if "alpha" in name else t for name, t in true(lora).items()}

        monkeypatch.setattr(diffrl.export, "convert_state_dict_to_kohya", doubled)
        line = fails(capsys, "export", learnt_run, tmp_path / "x", "--format", "kohya", "-n", "2")
        assert "reloaded, it draws other pictures; they differ by up to 0." in line
        assert self.nothing_in(tmp_path)

    def test_they_are_compared_in_whole_float32_whatever_the_run_drew_in(
        self, learnt_run, tmp_path, monkeypatch
    ):
        run, seen, join = tmp_path / "run", [], processes.join
        shutil.copytree(learnt_run, run)
        settings = run / "config.yaml"
        settings.write_text(settings.read_text().replace("precision: fp32", "precision: bf16"))
        monkeypatch.setattr(
            processes, "join", lambda device, tf32: seen.append(tf32) or join(device, tf32=tf32)
        )
        diffrl.export.export(run, tmp_path / "out", "diffusers", num_pictures=1)
        assert seen == [False]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "env.precision=bf16" in card  # the command is the run's own

    def test_a_layer_that_the_format_loses_is_named(self, learnt_run, tmp_path, capsys, monkeypatch):
        true = diffrl.export.convert_state_dict_to_kohya

        def without_middle(lora):
            return {name: t for name, t in true(lora).items() if "mid_block" not in name}

        monkeypatch.setattr(diffrl.export, "convert_state_dict_to_kohya", without_middle)
        line = fails(capsys, "export", learnt_run, tmp_path / "x", "--format", "kohya", "-n", "2")
        assert "has no 'mid_block" in line
        assert self.nothing_in(tmp_path)

    def test_a_full_disk_is_one_line(self, learnt_run, tmp_path, capsys, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", full)
        line = fails(capsys, "export", learnt_run, tmp_path / "x", "-n", "2")
        assert "x: cannot be written (No space left on device)" in line
        assert self.nothing_in(tmp_path)

    def test_mistakes_are_one_line(self, learnt_run, tiny_path, tmp_path, capsys):
        def refused(run, *words, out=tmp_path / "x"):
            return fails(capsys, "export", run, out, *words)

        there = tmp_path / "there"
        there.mkdir()
        assert "there: is there already" in refused(learnt_run, out=there)
        assert "format=khoya: no such format. Did you mean 'kohya'?" in refused(
            learnt_run, "--format=khoya"
        )
        assert "-n 0: must be 1 or more" in refused(learnt_run, "-n", "0")
        assert "no such run" in refused(tmp_path / "nothing")
        fast = ["env.num_steps=2", "eval_pictures=2", f"root={tmp_path}"]
        plain = ["algo=none", "reward=jpeg", f"env.model={tiny_path}"]
        assert main(["train", *fast, *plain, "name=plain"]) == 0
        assert "algo=none, so there is nothing learnt" in refused(tmp_path / "plain")
        points = tmp_path / "points"
        points.mkdir()
        settings_file.write(settings.load(["env=gaussian_mixture"]), points / "config.yaml")
        assert "draws points, not pictures" in refused(points)
        early = tmp_path / "early"
        early.mkdir()
        for file in ("config.yaml", "classifier.safetensors"):
            shutil.copyfile(learnt_run / file, early / file)
        assert "pytorch_lora_weights.safetensors: missing" in refused(early)
        assert {path.name for path in tmp_path.iterdir()} == {"there", "plain", "points", "early"}


class TestHub:
    def test_the_folder_is_uploaded(self, learnt_run, tmp_path, capsys, monkeypatch):
        calls = []

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        words = [str(learnt_run), str(tmp_path / "x"), "-n", "2", "--push-to-hub", "me/cats", "--private"]
        assert main(["export", *words]) == 0
        assert "https://huggingface.co/me/cats" in capsys.readouterr().out
        created, uploaded = calls
        assert created == ("create", "me/cats", {"private": True, "exist_ok": True})
        assert uploaded[:2] == ("upload", "me/cats")
        assert {"README.md", weights.LORA_FILE, weights.CONTROL_FILE} <= set(uploaded[2])

    def test_without_token_or_network_it_says_how_to_go_on(self, exported):
        folder = exported["diffrl"]
        with pytest.raises(DiffRLError, match=r"me/cats: not pushed \(.+\)") as error:  # tests are offline
            diffrl.export.push(folder, "me/cats", private=False)
        assert str(error.value).endswith(f"hf upload me/cats {folder}")
        assert "\n" not in str(error.value)

    def test_a_name_that_is_none_is_refused_at_once(self, learnt_run, tmp_path, capsys):
        line = fails(capsys, "export", learnt_run, tmp_path / "x", "--push-to-hub", "me/cats/dogs")
        assert "--push-to-hub me/cats/dogs" in line
        assert not (tmp_path / "x").exists()
