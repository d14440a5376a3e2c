import errno
import io
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from PIL import Image

from diffrl import config
from diffrl.build import Setup
from diffrl.cache import cache_folder
from diffrl.envs.denoising import own_seed
from diffrl.envs.emoji import Emoji
from diffrl.errors import DiffRLError
from diffrl.policy import Pretrained
from diffrl.rewards.closed_form import Softmax
from diffrl.rewards.jpeg import Jpeg, jpeg_kilobytes
from diffrl.rollout import rollout


def test_of_two_that_want_the_same_classifier_one_fits_it(tiny_path, empty_cache, monkeypatch):
    words = [f"env.model={tiny_path}", "env.num_steps=2", "reward.num_pictures=40", "reward.num_classes=2"]
    setups = [Setup(config.load(words)) for _ in range(2)]
    drawn = []

    def slowly(setup, policy, count):
        drawn.append(count)
        time.sleep(0.5)  # long enough for the other to come
        return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(Setup, "_draw", slowly)
    with ThreadPoolExecutor(2) as pool:
        rewards = list(pool.map(lambda setup: setup.make_reward(setup.make_policy((2,))), setups))
    assert drawn == [40]
    first, second = (reward.attributes[0].edges.tolist() for reward in rewards)
    assert first == second


def test_pictures_that_a_fit_refuses_need_not_be_drawn_again(tiny_path, empty_cache, monkeypatch, capsys):
    words = [f"env.model={tiny_path}", "env.num_steps=2", "reward.num_pictures=40", "eval_batch=16"]
    refused, taken = (
        Setup(config.load([*words, f"reward.{w}"])) for w in ("edges=[9000]", "num_classes=2")
    )
    policy = taken.make_policy((2,))
    env, generator = taken.make_env(Jpeg(), 16), taken.generator(1)
    drawn = [rollout(env, Pretrained(policy), generator, seed=seed).images for seed in (0, None, None)]
    with pytest.raises(DiffRLError, match="too few to fit"):
        refused.make_reward(policy)
    (file,) = cache_folder().glob("*.pictures")
    stored = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).view(40, 3, 16, 16)
    assert_close(stored / 255, torch.cat(drawn)[:40], atol=0.501 / 255)
    monkeypatch.setattr(Setup, "_write_pictures", None)
    reward = taken.make_reward(policy)
    assert "drawn before" in capsys.readouterr().out
    sizes = jpeg_kilobytes(stored / 255)
    assert reward.attributes[0].edges.tolist() == pytest.approx([float(sizes.quantile(0.5))])
    assert not file.exists()


def test_a_disk_that_fills_up_with_pictures_keeps_none_and_says_where(tiny_path, empty_cache, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    words = [f"env.model={tiny_path}", "env.num_steps=2", "reward.num_pictures=40", "reward.num_classes=2"]
    setup = Setup(config.load(words))
    monkeypatch.setattr(Path, "open", lambda path, mode: (path.touch(), Full())[1])
    why = r"\.pictures: No space left on device\. Make room, or set DIFFRL_CACHE"
    with pytest.raises(DiffRLError, match=why):
        setup.make_reward(setup.make_policy((2,)))
    assert not [*cache_folder().glob("*.pictures"), *cache_folder().glob("*.tmp")]


def test_a_device_that_is_full_before_anything_is_drawn_is_named(monkeypatch):
    def load(self):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(Emoji, "load", load)
    why = "device=cpu: out of memory. CUDA error: out of memory. The model alone does not fit beside what"
    with pytest.raises(DiffRLError, match=why):
        Setup(config.load(["device=cpu"]))


def test_no_stream_of_a_run_is_the_env_s_own():
    setup = Setup(config.load(["env=gaussian_mixture", "seed=3"]))
    assert own_seed(3) not in {
        3,
        *(setup.seed(*stream) for stream in itertools.product(range(9), repeat=2)),
    }
    assert own_seed(3) not in {setup.seed(purpose) for purpose in range(100)}


def test_a_data_set_s_joint_labels_are_a_number_for_each_measure(tiny_path, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,1;0\n")
    words = ["reward=multitask", "reward.joint=true", f"dataset={tmp_path}", f"env.model={tiny_path}"]
    (entry,) = Setup(config.load(words)).dataset.entries
    assert entry.label == {"compressibility": 1, "colourfulness": 0}


def test_prompts_with_labels_are_checked_against_the_reward_s_and_drawn_with_them(tiny_path, tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("prompt,label\ncat,2\n")
    words = [f"env.model={tiny_path}", "env.num_steps=2", f"prompts={path}"]
    with pytest.raises(DiffRLError, match=r"words.csv, line 2: label='2' is unknown"):
        Setup(config.load([*words, "reward.num_classes=2"]))
    env = Setup(config.load(words)).make_env(Softmax([0.0] * 3, [0.0] * 3), 3)  # any with 3 classes
    obs, _ = env.reset(seed=0)
    assert obs["label"].tolist() == [[2]] * 3
    assert env.context.prompts == ["cat"] * 3
