"""The learned reward: drawn once, fitted once, and nothing left of what fails."""

import errno
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from safetensors.torch import save_file
from tiny_clip import head, head_state, write_clip

from diffrl import config, learned
from diffrl.build import Setup
from diffrl.cache import cache_folder
from diffrl.errors import DiffRLError
from diffrl.policy import Pretrained
from diffrl.rewards import aesthetic
from diffrl.rewards.jpeg import Jpeg, jpeg_kilobytes
from diffrl.rollout import rollout


def test_of_two_that_want_the_same_classifier_one_fits_it(tiny_path, empty_cache, monkeypatch):
    words = [f"env.model={tiny_path}", "env.num_steps=2", "reward.num_pictures=40", "reward.num_classes=2"]
    setups = [Setup(config.load(words)) for _ in range(2)]
    drawn = []

    def slowly(setup, policy):
        count = setup.config.reward.num_pictures
        drawn.append(count)
        time.sleep(0.5)  # long enough for the other to come
        return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(learned, "_drawn", slowly)
    with ThreadPoolExecutor(2) as pool:
        rewards = list(pool.map(lambda setup: learned.make_reward(setup, setup.make_policy((2,))), setups))
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
        learned.make_reward(refused, policy)
    (file,) = cache_folder().glob("*.pictures")
    stored = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).view(40, 3, 16, 16)
    assert_close(stored / 255, torch.cat(drawn)[:40], atol=0.501 / 255)
    monkeypatch.setattr(learned, "_write_pictures", None)
    reward = learned.make_reward(taken, policy)
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
        learned.make_reward(setup, setup.make_policy((2,)))
    assert not list(cache_folder().glob("*.pictures"))


def test_a_classifier_whose_networks_were_replaced_is_fitted_anew(tiny_path, empty_cache, tmp_path, capsys):
    clip, mlp = write_clip(tmp_path / "clip"), tmp_path / "mlp.safetensors"
    words = [f"env.model={tiny_path}", "env.num_steps=2", "reward=multitask", "reward.num_pictures=40"]
    words += ["reward.measures=[aesthetic]", f"reward.clip={clip}", f"reward.mlp={mlp}"]
    probes, found = [], []
    for seed in (0, 1, 1):
        save_file(head_state(head(1, seed)), mlp)
        aesthetic._head.cache_clear()  # as in another process
        setup = Setup(config.load(words))
        (attribute,) = learned.make_reward(setup, setup.make_policy((2,))).attributes
        probes.append(attribute.probe())
        found.append(attribute.edges.tolist())
    assert abs(probes[0] - probes[1]) > 0.1
    assert found[0] != found[1] == found[2]
    assert len(list(cache_folder().glob("*.safetensors"))) == 1
    assert capsys.readouterr().out.count("from the cache") == 1  # the third
