"""Shared fixtures: tiny random checkpoints of the Stable Diffusion layout, and the only comparison."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TERM="dumb")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # beside other work, threads that spin cost minutes

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffrl.backbones import gaussian_mixture
from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.benchmarks.pretrain_emoji import make_tokenizer
from diffrl.envs.emoji import ASSET
from diffrl.schedule import make_scheduler

torch.set_num_threads(1)  # two workers share two cores


def assert_close(actual, expected, *, atol, rtol=0.0):
    """The only comparison of numbers: refuses tolerances that cannot fail, and NaN."""
    assert rtol <= 0.1, f"rtol={rtol} accepts anything"
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.isfinite().all(), actual
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol, check_device=False)


def tiny_checkpoint(folder: Path, *, unet=None, text=None, scheduler=None) -> Path:
    """Write a random Stable Diffusion checkpoint: 8 x 8 latents, 16 px pictures.

    `unet` and `text` are more settings of these networks, `scheduler` those of the schedule.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["cat", "dog", "bee"])
    end = tokenizer.eos_token_id
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
            **{"num_hidden_layers": 1} | (text or {}),
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        **{"attention_head_dim": 2} | (unet or {}),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def learnt(folder: Path, *words: str) -> Path:
    """Write a run whose weights are random numbers, the null label's aside: as after long training."""
    from test_cli import FAST
    from test_policy import learn_a_little

    from diffrl import weights
    from diffrl.cli import main
    from diffrl.restore import restore

    fast = [word for word in FAST if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    if any(word.startswith("reward=") for word in words):  # its settings are others
        fast = [word for word in fast if not word.startswith("reward.")]
    assert main(["train", f"root={folder.parent}", f"name={folder.name}", *fast, *words]) == 0
    _, policy, _ = restore(folder, {})
    learn_a_little(policy)
    weights.save(policy, folder)
    return folder


@pytest.fixture(scope="session")
def learnt_run(tiny_path, tmp_path_factory) -> Path:
    """One label of two classes; guidance, and noise at each of three steps."""
    words = [f"env.model={tiny_path}", "env.num_steps=3", "algo.updates=1"]
    return learnt(tmp_path_factory.mktemp("learnt") / "one", *words)


@pytest.fixture(scope="session")
def two_controls(tiny_path, tmp_path_factory) -> Path:
    """Labels of two attributes, two classes each."""
    words = [f"env.model={tiny_path}", "reward=multitask", "reward.num_pictures=40", "algo.updates=1"]
    return learnt(tmp_path_factory.mktemp("learnt") / "two", *words)


@pytest.fixture
def tiny(tiny_path) -> StableDiffusion:
    return StableDiffusion.load(str(tiny_path))


@pytest.fixture
def emoji() -> StableDiffusion:
    return StableDiffusion.load(str(ASSET))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory):
    """What one test has fitted, another need not: never the user's own."""
    os.environ["DIFFRL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def empty_cache(tmp_path_factory, monkeypatch):
    """For tests of what is fitted, or how."""
    monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def hasty(empty_cache, monkeypatch):
    """Fit the solvable model's denoiser for a moment only."""
    fit = gaussian_mixture.fit
    monkeypatch.setattr(gaussian_mixture, "fit", lambda *args: fit(*args, num_steps=60))


@pytest.fixture
def unfitted(empty_cache, monkeypatch):
    """Leave the solvable model's denoiser as it begins, where it does not matter what it predicts."""
    monkeypatch.setattr(gaussian_mixture, "fit", lambda *_: None)


@pytest.fixture
def browser():
    """Chromium, through Playwright; a test is skipped without them."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
