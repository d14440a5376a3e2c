"""Rewards in a file of the user's own."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file
from test_cli import fails

from diffrl import config, settings_file
from diffrl.cli import main

FILE = """
from pathlib import Path

import torch
from diffrl.rewards.custom import reward

def redness(images, context):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

@reward(differentiable=True)
class Brightness:
    "How bright a picture is, times a strength."
    strength: float = 1.0  # of it

    def __call__(self, images, context):
        return self.strength * images.mean((1, 2, 3))

class Nothing:
    pass

class Constructed(Brightness):
    def __init__(self):
        self.strength = 3.0

class Ready(torch.nn.Module):
    strength: float = 1.0

    def __post_init__(self):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, images, context):
        return self.strength * self.share * images.mean((1, 2, 3))

class Network(torch.nn.Module):
    def __call__(self, images, context):
        return images.mean((1, 2, 3))

class Table:
    where: Path = Path("scores.csv")  # of a score a line

    def __call__(self, images, context):
        return images.mean((1, 2, 3)) + len(self.where.name)

def broken(images, context):
    return images[:, 9]


def restless(images, context):
    torch.rand(3)
    return redness(images, context)
"""
SMALL = [
    "env.num_steps=2",
    "env.guidance_scale=1",
    "algo.updates=1",
    "algo.batch_size=4",
    "eval_pictures=2",
]


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.py"


def train(tiny_path, *words):
    return [
        "train",
        f"env.model={tiny_path}",
        "root=runs",
        "name=run",
        *SMALL,
        "algo.micro_batch_size=4",
        *words,
    ]


def test_a_function_trains_and_its_run_is_read_from_elsewhere(
    file, tiny_path, tmp_path, monkeypatch, capsys
):
    assert main(train(tiny_path, "algo=ddpo", "algo.minibatches=1", "reward=mine.py:redness")) == 0
    run = tmp_path / "runs" / "run"
    monkeypatch.chdir("/")
    assert main(["eval", str(run), "--json", "-n", "2"]) == 0
    assert "reward_mean" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_a_reward_draws_decides_nothing_that_processes_must_draw_alike(file, tiny_path, tmp_path):
    """Each process asks it about other pictures; all must deal the same minibatches."""
    learnt = []
    for name in ("redness", "restless"):
        words = ["algo=ddpo", "algo.minibatches=2", f"reward=mine.py:{name}", f"root={name}"]
        assert main(train(tiny_path, *words)) == 0
        learnt.append(load_file(tmp_path / name / "run" / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(learnt[1][key], value) for key, value in learnt[0].items())


def test_a_class_has_settings_and_may_have_a_gradient(file, tiny_path):
    words = ["algo=reward_backprop", "reward=mine.py:Brightness", "reward.strength=2"]
    assert main(train(tiny_path, *words)) == 0
    reward = config.load(words).reward
    assert (reward.differentiable, reward.num_classes, reward.strength) == (True, (), 2.0)
    images = torch.full((2, 3, 4, 4), 0.25)
    assert_close(reward(images, None), [0.5, 0.5], atol=1e-7)
    assert_close(pickle.loads(pickle.dumps(reward))(images, None), [0.5, 0.5], atol=1e-7)
    assert config.chosen(config.load(words), "reward") == "custom"
    assert settings_file.same(settings_file.facts(config.load(words)), config.load(words))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("none.py:redness", "no such file"),
        ("mine.py:rednes", "mine.py:redness'?"),
        ("mine.py:Nothing", "Nothing has no __call__(self, images, context)"),
        ("mine.py:Brightness reward.strenght=2", "Did you mean 'reward.strength'?"),
        ("mine.py:redness algo=ctrl", "is a black box"),
        ("mine.py:broken", "reward broken failed at"),
        ("mine.py:Constructed", "Constructed.__init__ would never be called. Write Constructed's settings"),
        ("mine.py:Network", "Module.__init__ would never be called. Write Network's settings"),
    ],
)
def test_mistakes_are_named(file, tiny_path, capsys, word, expected):
    words = ["algo=ddpo", "algo.minibatches=1"] if "algo=ctrl" not in word else []
    assert expected in fails(capsys, *train(tiny_path, *words, *f"reward={word}".split()))


def test_a_run_is_gone_on_with_when_its_files_were_moved(file, tiny_path, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("cat\n")
    words = ["algo=ddpo", "algo.minibatches=1", "reward=mine.py:redness", "prompts=words.txt"]
    assert main(train(tiny_path, *words)) == 0
    (tmp_path / "moved").mkdir()
    for name in ("mine.py", "words.txt"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    line = fails(capsys, "train", "--resume", "runs/run")
    assert "no such file" in line
    assert "So it stands in runs/run/config.yaml, at chosen_by" in line
    stored = tmp_path / "runs" / "run" / "config.yaml"
    text = stored.read_text()
    stored.write_text(text.replace(f"{tmp_path}/", f"{tmp_path}/moved/").replace("moved/tiny", "tiny"))
    assert main(["train", "--resume", "runs/run"]) == 0
    assert "finished already" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "why"), [("1 / 0", "ZeroDivisionError: division by zero"), ("exit(3)", "SystemExit: 3")]
)
def test_a_file_that_fails_says_why(file, tiny_path, capsys, text, why):
    file.write_text(text)
    line = fails(capsys, *train(tiny_path, "algo=ddpo", "reward=mine.py:redness"))
    assert f"fails: {why}" in line


def test_a_file_imports_what_lies_beside_it(file, monkeypatch):
    (file.parent / "my_helpers.py").write_text("def half(images):\n    return images.mean((1, 2, 3)) / 2\n")
    file.write_text("from my_helpers import half\n\ndef dim(images, context):\n    return half(images)\n")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    reward = config.load(["algo=ddpo", "reward=mine.py:dim"]).reward
    assert_close(reward(torch.ones(1, 3, 4, 4), None), [0.5], atol=1e-7)


def test_files_of_two_folders_import_their_own_neighbours_whose_content_counts(tmp_path):
    rewards, known = [], []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "same_name.py").write_text(f"SIGN = {number}\n")
        (folder / "r.py").write_text(
            "from same_name import SIGN\n\ndef f(images, context):\n    return SIGN * images[:, 0, 0, 0]\n"
        )
        config_of = config.load(["algo=ddpo", f"reward={folder}/r.py:f"])
        rewards.append(config_of.reward)
        known.append(settings_file.facts(config_of)["reward"]["chosen_by"])
    assert [float(reward(torch.ones(1, 3, 4, 4), None)) for reward in rewards] == [1.0, 2.0]
    assert known[0] != known[1]


def test_a_network_is_made_after_its_settings(file):
    reward = config.load(["algo=ddpo", "reward=mine.py:Ready", "reward.strength=3"]).reward
    assert_close(reward(torch.ones(1, 3, 4, 4), None), [1.5], atol=1e-7)


def test_a_setting_may_be_a_path(file, tmp_path, capsys):
    words = ["algo=ddpo", "reward=mine.py:Table", "reward.where=other/table.csv"]
    chosen = config.load(words)
    assert chosen.reward.where == Path("other/table.csv")
    settings_file.write(chosen, tmp_path / "config.yaml")
    again = settings_file.read(tmp_path / "config.yaml")
    assert again.reward.where == Path("other/table.csv")
    assert settings_file.same(settings_file.facts(chosen), again)
    assert config.load(settings_file.words(chosen)).reward.where == Path("other/table.csv")
    assert main(["train", "--help", *words]) == 0
    assert "reward.where=other/table.csv" in capsys.readouterr().out
