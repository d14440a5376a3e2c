"""Rewards in a file of the user's own."""

import json
import pickle

import pytest
import torch
from conftest import assert_close
from test_cli import fails

from diffrl import config
from diffrl.cli import main

FILE = """
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

def broken(images, context):
    return images[:, 9]
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


def test_a_class_has_settings_and_may_have_a_gradient(file, tiny_path):
    words = ["algo=reward_backprop", "reward=mine.py:Brightness", "reward.strength=2"]
    assert main(train(tiny_path, *words)) == 0
    reward = config.load(words).reward
    assert (reward.differentiable, reward.num_classes, reward.strength) == (True, (), 2.0)
    images = torch.full((2, 3, 4, 4), 0.25)
    assert_close(reward(images, None), [0.5, 0.5], atol=1e-7)
    assert_close(pickle.loads(pickle.dumps(reward))(images, None), [0.5, 0.5], atol=1e-7)
    assert config.chosen(config.load(words), "reward") == "custom"
    assert config.same(config.facts(config.load(words)), config.load(words))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("none.py:redness", "no such file"),
        ("mine.py:rednes", "mine.py:redness'?"),
        ("mine.py:Nothing", "Nothing has no __call__(self, images, context)"),
        ("mine.py:Brightness reward.strenght=2", "Did you mean 'reward.strength'?"),
        ("mine.py:redness algo=ctrl", "is a black box"),
        ("mine.py:broken", "reward broken failed at"),
    ],
)
def test_mistakes_are_named(file, tiny_path, capsys, word, expected):
    words = ["algo=ddpo", "algo.minibatches=1"] if "algo=ctrl" not in word else []
    assert expected in fails(capsys, *train(tiny_path, *words, *f"reward={word}".split()))


def test_a_file_that_fails_says_why(file, tiny_path, capsys):
    file.write_text("1 / 0")
    line = fails(capsys, *train(tiny_path, "algo=ddpo", "reward=mine.py:redness"))
    assert "fails: ZeroDivisionError: division by zero" in line
