"""The pipeline against `diffrl sample` and against stock diffusers."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_close, tiny_checkpoint
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffrl import ControlledStableDiffusionPipeline
from diffrl.cli import main
from diffrl.components import GROUPS
from diffrl.draw import draw
from diffrl.errors import DiffRLError
from diffrl.restore import restore


@pytest.fixture(scope="module")
def pipe(learnt_run):
    return quiet(ControlledStableDiffusionPipeline.from_run(learnt_run))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pictures(pipeline, prompt="cat", **options):
    options = {"output_type": "pt", "generator": seeded(0)} | options
    return pipeline(prompt, **options).images


@pytest.fixture(scope="module")
def sampler(learnt_run):
    return restore(learnt_run, {})


def sampled(sampler, count, label, *, scale=1.0, guidance=1.5):
    """What `diffrl sample` draws."""
    setup, policy, reward = sampler
    policy.control_scale, policy.guidance_scale = scale, guidance
    return draw(setup.guide(policy, reward, count), "cat", torch.tensor(label), 0)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1.5])
@pytest.mark.parametrize("label", [None, 1])
def test_it_draws_what_sample_draws(pipe, sampler, guidance, scale, label):
    theirs = sampled(sampler, 3, [-1 if label is None else label], scale=scale, guidance=guidance)
    options = {"label": label, "control_scale": scale, "guidance_scale": guidance}
    assert_close(pictures(pipe, num_images_per_prompt=3, **options), theirs, atol=1e-5)


@pytest.mark.parametrize("group", ["reward", "algo", "env"])
def test_a_folder_of_a_stranger_runs_no_code(learnt_run, tmp_path, group, monkeypatch):
    monkeypatch.setitem(GROUPS["env"], "custom", GROUPS["env"]["emoji"])  # one of our own was loaded before
    folder = tmp_path / "theirs"
    shutil.copytree(learnt_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    stored["_" + group] = "custom"
    stored[group]["chosen_by"] = f"{folder}/evil.py:f"
    (folder / "config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    if group == "env":
        with pytest.raises(DiffRLError, match="its env 'custom' is none that comes with diffrl"):
            ControlledStableDiffusionPipeline.from_run(folder)
    else:
        pipe = quiet(ControlledStableDiffusionPipeline.from_run(folder))
        assert pictures(pipe, label=1).shape == (1, 3, 16, 16)
    assert not (tmp_path / "pwned").exists()


def test_label_strength_and_noise_each_change_the_pictures(pipe):
    plain = pictures(pipe, label=1)
    for other in ({"label": 0}, {"label": None}, {"control_scale": 0.5}, {"generator": seeded(1)}):
        assert (pictures(pipe, **{"label": 1} | other) - plain).abs().max() > 1e-2


def test_the_files_of_the_sample_command_are_its_pictures(pipe, learnt_run, tmp_path):
    words = ["--prompt=cat", "--label=1", "-n=2", "--seed=7", f"--out={tmp_path}"]
    assert main(["sample", str(learnt_run), *words]) == 0
    ours = pipe("cat", label=1, num_images_per_prompt=2, generator=seeded(7)).images
    for number, picture in enumerate(ours):
        with Image.open(tmp_path / f"cat-label1-{number:02d}.png") as file:
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(file)).max() <= 1  # rounding


def test_strength_0_is_the_pretrained_model_and_no_label_the_lora_alone(pipe, learnt_run, tiny_path):
    stock = quiet(StableDiffusionPipeline.from_pretrained(tiny_path))
    options = {"num_inference_steps": 3, "guidance_scale": 1.5, "eta": 1.0}
    assert_close(pictures(pipe, label=1, control_scale=0), pictures(stock, **options), atol=1e-6)
    stock.load_lora_weights(learnt_run)
    assert_close(pictures(pipe), pictures(stock, **options), atol=1e-6)


def test_each_prompt_may_have_a_label_of_its_own(pipe):
    """At guidance, two prompts of two pictures: the noise is given, so each row can be drawn alone."""
    latents = torch.randn(4, 4, 8, 8, generator=seeded(0))
    together = pictures(
        pipe, ["cat", "bee"], label=[[1], [0]], num_images_per_prompt=2, latents=latents, eta=0.0
    )
    for row, (prompt, label) in enumerate([("cat", 1), ("cat", 1), ("bee", 0), ("bee", 0)]):
        alone = pictures(pipe, prompt, label=label, latents=latents[row : row + 1], eta=0.0)
        assert_close(together[row : row + 1], alone, atol=1e-5)


def test_of_one_attribute_the_prompts_may_have_a_number_each(pipe):
    rows = pictures(pipe, ["cat", "bee"], label=[[1], [0]])
    for label in ([1, 0], torch.tensor([1, 0])):
        assert_close(pictures(pipe, ["cat", "bee"], label=label), rows, atol=0)


def test_adapters_that_somebody_switched_off_stay_off(learnt_run):
    pipe = quiet(ControlledStableDiffusionPipeline.from_run(learnt_run))
    pipe.disable_lora()
    off = pictures(pipe, label=1)
    pictures(pipe, label=1, control_scale=0.5)
    assert_close(pictures(pipe, label=1), off, atol=0)


def test_a_fused_lora_draws_the_same_and_has_no_other_strength(pipe, learnt_run):
    fused = quiet(ControlledStableDiffusionPipeline.from_run(learnt_run))
    fused.fuse_lora()
    for unload in (False, True):
        if unload:
            fused.unload_lora_weights()
        assert_close(pictures(fused, label=1), pictures(pipe, label=1), atol=1e-5)
        with pytest.raises(DiffRLError, match=r"control_scale=0\.5: the LoRA is fused into the weights"):
            pictures(fused, label=1, control_scale=0.5)
        with pytest.raises(DiffRLError, match="another run's LoRA is fused into the weights"):
            fused.load_control(learnt_run)


def test_two_attributes_are_two_numbers(two_controls):
    pipe = quiet(ControlledStableDiffusionPipeline.from_run(two_controls))
    sampler = restore(two_controls, {})
    for label in ([1, 0], [0, 1], [-1, 1]):
        ours = pictures(pipe, label=label, num_images_per_prompt=2)
        assert_close(ours, sampled(sampler, 2, label), atol=1e-5)
    both = pictures(pipe, ["cat", "bee"], label=torch.tensor([[1, 0], [0, 1]]))
    assert both.shape == (2, 3, 16, 16)


def test_stock_arguments_are_stock(pipe):
    embeds = pipe.encode_prompt("cat", "cpu", 1, True)
    given = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    assert_close(pictures(pipe, None, label=1, **given), pictures(pipe, label=1), atol=0)
    assert pipe("cat", label=1, output_type="latent", return_dict=False)[0].shape == (1, 4, 8, 8)
    wide = pipe("cat", num_inference_steps=2, output_type="np", height=16, width=32).images
    assert wide.shape == (1, 16, 32, 3)
    generators = [seeded(0), seeded(1)]
    assert pictures(pipe, ["cat", "bee"], label=0, generator=generators).shape[0] == 2


def test_the_model_is_stock_again_after_a_call_and_after_one_that_fails(pipe):
    before = pictures(pipe)
    pictures(pipe, label=1, control_scale=1.5)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe("cat", label=1, control_scale=0, height=17, width=16)
    assert_close(pictures(pipe), before, atol=0)
    stock = quiet(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    assert_close(pictures(stock, **pipe.call_defaults), before, atol=0)


def test_another_run_takes_the_first_one_s_place(pipe, learnt_run, two_controls, tiny_path):
    other = quiet(ControlledStableDiffusionPipeline.from_pretrained(tiny_path).load_control(two_controls))
    other.load_control(learnt_run)
    assert_close(pictures(other, label=1), pictures(pipe, label=1), atol=0)


def test_mistakes_are_named(pipe, learnt_run, two_controls, tiny_path, tmp_path):
    for label, words in {
        2: "label=2: out of range; attribute 0 has labels 0 to 1",
        (1, 0, 1): r"label=\(1, 0, 1\): this control takes 1 whole number",
        0.5: "takes 1 whole number",
        "1": "label='1': this control takes 1 whole number",
        ((1,), (0,), (1,)): "or such a list a prompt",
    }.items():
        with pytest.raises(DiffRLError, match=words):
            pipe(["cat", "bee"], label=label)
    for scale in ("1", [1.0], math.nan):
        with pytest.raises(DiffRLError, match="must be one finite number"):
            pipe("cat", label=1, control_scale=scale)
    with pytest.raises(ValueError, match="Provide either `prompt`"):  # stock's own words
        pipe()
    with pytest.raises(DiffRLError, match="'diffrl export RUN DIR' writes files that from_run"):
        pipe.save_pretrained(tmp_path / "saved")
    plain = ControlledStableDiffusionPipeline.from_pretrained(tiny_path)
    with pytest.raises(DiffRLError, match="no control is loaded"):
        plain("cat", label=1)
    with pytest.raises(DiffRLError, match="no such run"):
        plain.load_control(tmp_path / "nothing")
    wider = tiny_checkpoint(tmp_path / "wider", unet={"time_embedding_dim": 48})
    with pytest.raises(DiffRLError, match=r"control\.safetensors.*has shape \[3, 32\]"):
        ControlledStableDiffusionPipeline.from_run(learnt_run, model=str(wider))
    hollow = tiny_checkpoint(tmp_path / "hollow", unet={"mid_block_type": None})  # stock only warns
    with pytest.raises(DiffRLError, match=r"lora_weights\.safetensors.*'mid_block"):
        ControlledStableDiffusionPipeline.from_run(learnt_run, model=str(hollow))


def test_importing_diffrl_does_not_import_torch():
    code = "import diffrl, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
