"""Several rewards as one: by hand numbers."""

import json
import pickle

import pytest
import torch
from conftest import assert_close
from test_cli import fails

import diffrl
from diffrl import config, settings_file
from diffrl.cli import main
from diffrl.errors import DiffRLError
from diffrl.rewards.closed_form import Gaussian, Softmax
from diffrl.rewards.composed import Composed
from diffrl.rewards.jpeg import Jpeg, jpeg_kilobytes
from diffrl.types import Context

FILE = """
from diffrl.rewards.custom import reward

@reward(differentiable=True)
class Light:
    strength: float = 1.0

    def __call__(self, images, context):
        return self.strength * images.mean((1, 2, 3))

@reward(differentiable=True)
def dark(images, context):
    return 1 - images.mean((1, 2, 3))

def boxed(images, context):
    return images.detach().mean((1, 2, 3))
"""
PAIR = "reward=[parts.py:Light,parts.py:dark]"
QUARTER = torch.full((2, 3, 4, 4), 0.25)  # Light is .25, dark .75
NO_LABEL_READ = Context(["x", "x"], torch.zeros(2, 1, 1), torch.zeros(2, 0, dtype=torch.int64))


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    (tmp_path / "parts.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected", "slope"),
    [  # the slope by the mean of the pixels: Light's is its strength, dark's -1
        ("", 0.25 + 0.75, 1 - 1),
        ("reward.weights=[1,2]", 0.25 + 2 * 0.75, 1 - 2),
        ("reward.weights=[1,2] reward.scales=[4,1]", 4 * 0.25 + 2 * 0.75, 4 - 2),
        ("reward.weights=[1,2] reward.scales=[4,1] reward.clip=.8", 0.8 + 2 * 0.75, -2),
        ("reward.weights=[-1,2] reward.scales=[4,-4] reward.clip=.5", -0.5 - 2 * 0.5, 0),
        ("reward.parts.Light.strength=2", 2 * 0.25 + 0.75, 2 - 1),
    ],
)
def test_it_is_the_weighed_sum_of_clipped_scaled_parts_and_so_is_its_gradient(settings, expected, slope):
    reward = config.load([PAIR, *settings.split()]).reward
    images = QUARTER.clone().requires_grad_()
    value = reward(images, NO_LABEL_READ)
    assert_close(value.detach(), [expected] * 2, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert_close(gradient, torch.full_like(gradient, slope / gradient[0].numel()), atol=1e-7)


def test_it_is_differentiable_if_and_only_if_all_parts_are():
    assert config.load([PAIR]).reward.differentiable
    assert not config.load(["reward=[parts.py:Light,parts.py:boxed]"]).reward.differentiable
    assert not config.load(["reward=[jpeg,parts.py:dark]"]).reward.differentiable


def test_each_part_reads_its_own_columns_of_the_label():
    first, second = Softmax(), Gaussian([-1.0, 0.0, 1.0])
    points = torch.tensor([-0.5, 0.7]).view(2, 1, 1, 1)
    label = torch.tensor([[0, 2], [1, 0]])
    both = Context(["x", "x"], torch.zeros(2, 1, 1), label)
    reward = Composed({"first": first, "second": second}, weights=[1.0, 3.0])
    assert reward.num_classes == (2, 3)
    expected = first.log_prob(points)[[0, 1], [0, 1]] + 3 * second.log_prob(points)[[0, 1], [2, 0]]
    assert_close(reward(points, both), expected, atol=1e-6)


def test_it_has_none_of_the_faults_that_a_check_finds():
    diffrl.check_reward(config.load([PAIR, "reward.weights=[1,2]"]).reward)
    diffrl.check_reward(Composed({"jpeg": Jpeg(), "same": Jpeg()}, clip=3.0))


def test_it_is_written_read_and_pickled(tmp_path, monkeypatch):
    words = ["reward=[jpeg,parts.py:Light]", "reward.weights=[1,2]", "reward.parts.Light.strength=3"]
    chosen = config.load(words)
    settings_file.write(chosen, tmp_path / "config.yaml")
    monkeypatch.chdir("/")
    expected = -jpeg_kilobytes(QUARTER) + 2 * 3 * 0.25
    for reward in (
        settings_file.read(tmp_path / "config.yaml").reward,
        pickle.loads(pickle.dumps(chosen.reward)),
    ):
        assert_close(reward(QUARTER, NO_LABEL_READ), expected, atol=1e-6)


def test_it_trains_and_its_run_is_evaluated(tiny_path, tmp_path, capsys):
    words = [f"env.model={tiny_path}", "env.num_steps=2", "env.guidance_scale=1", "algo=reward_backprop"]
    words += ["algo.updates=1", "algo.batch_size=4", "algo.micro_batch_size=4", "eval_pictures=2"]
    assert main(["train", *words, PAIR, "reward.weights=[1,1]", "name=run"]) == 0
    assert main(["eval", "runs/run", "--json", "-n", "2"]) == 0
    measures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert_close(measures["reward_mean"], 1.0, atol=1e-5)  # light and dark are 1 together


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (f"{PAIR} reward.weights=[1]", "reward.weights=[1.0]: 1 of them for 2 parts, Light, dark"),
        (f"{PAIR} reward.clip=0", "reward.clip=0.0: must be positive"),
        (f"{PAIR} reward.scales=[1,inf]", "must be finite"),
        (f"{PAIR} reward.weight=[1,2]", "Did you mean 'reward.weights'?"),
        (f"{PAIR} reward.parts.Light.strenght=1", "Did you mean 'reward.parts.Light.strength'?"),
        ("reward=[jpeg,jpge]", "reward=jpge: no such reward. Did you mean 'jpeg'?"),
        ("reward=[jpeg,jpeg]", "jpeg is there twice"),
        ("reward=[jpeg,compressibility]", "compressibility is fitted to a label, and stands alone"),
        ("algo=[ctrl,ddpo]", "only rewards can be several"),
        ("algo=ctrl reward=[jpeg,parts.py:dark]", "is a black box"),
    ],
)
def test_mistakes_are_named(capsys, words, expected):
    assert expected in fails(capsys, "train", *words.split())


def test_numbers_must_be_finite_in_python_too():
    with pytest.raises(DiffRLError, match="finite"):
        Composed({"jpeg": Jpeg()}, weights=[float("nan")])
