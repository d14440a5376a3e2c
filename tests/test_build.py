import itertools
import shutil
from pathlib import Path

import pytest
from PIL import Image

from diffrl import config
from diffrl.build import Setup
from diffrl.envs.denoising import own_seed
from diffrl.envs.emoji import Emoji
from diffrl.errors import DiffRLError
from diffrl.restore import restore
from diffrl.rewards.closed_form import Softmax
from diffrl.settings_file import read


def test_a_device_that_is_full_before_anything_is_drawn_is_named(monkeypatch):
    def load(self):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(Emoji, "load", load)
    why = "device=cpu: out of memory. CUDA error: out of memory. The model alone does not fit beside what"
    with pytest.raises(DiffRLError, match=why):
        Setup(config.load(["device=cpu"]))


def test_the_denoiser_is_compiled_where_it_is_asked_for_and_its_weights_keep_their_names(tiny_path):
    def unet(*words):
        setup = Setup(config.load([f"env.model={tiny_path}", "device=cpu", *words]))
        return setup.make_policy((4,)).unet

    plain, compiled = unet(), unet("env.compile=true")
    assert plain._compiled_call_impl is None
    assert compiled._compiled_call_impl is not None  # compiled by its first call
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_of_a_finished_run_nothing_is_compiled(learnt_run, tmp_path):
    run = shutil.copytree(learnt_run, tmp_path / "run")
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("compile: false", "compile: true"))
    assert read(settings).env.compile
    assert restore(run, {})[1].unet._compiled_call_impl is None


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


def test_of_a_data_set_so_many_are_drawn_by_the_seed(tiny_path, tmp_path):
    for number in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")

    def drawn(*words):
        words = [f"dataset={tmp_path}", f"env.model={tiny_path}", *words]
        return [Path(entry.path).stem for entry in Setup(config.load(words)).dataset.entries]

    assert drawn() == drawn("dataset_pictures=9") == drawn("dataset_pictures=99") == list("012345678")
    some = drawn("dataset_pictures=4")
    assert some == sorted(set(some)) == drawn("dataset_pictures=4")
    assert len(some) == 4
    assert some != drawn("dataset_pictures=4", "seed=1")
    for words in ([f"dataset={tmp_path}", "dataset_pictures=0"], ["dataset_pictures=3"]):
        with pytest.raises(DiffRLError, match="dataset_pictures"):
            Setup(config.load([*words, f"env.model={tiny_path}"]))


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
