"""Algorithms, envs and rewards that are not ours: of a file, of an installed package."""

import json
import pickle
import sys

import pytest
import torch
from conftest import assert_close
from test_cli import fails

from diffrl import components, config, learned, settings_file
from diffrl.build import Setup
from diffrl.cli import main
from diffrl.errors import DiffRLError

ALGORITHM = """
from __future__ import annotations
import torch
from typing import ClassVar
from diffrl.algorithms.base import Algorithm
from diffrl.rollout import rollout

class Ascent(Algorithm):
    "Go up the reward's gradient at the last step alone."
    strength: float = 1.0  # of the step

    needs_gradient: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = False

    def collect(self, env, policy, generator):
        return rollout(env, policy, generator, grad_steps=1)

    def update(self, trajectories, policy, optimizer):
        rewards = []
        for trajectory in trajectories:
            (-self.strength * trajectory.reward.mean()).backward()
            rewards.append(trajectory.reward.detach())
        return {"rollout/reward_mean": float(torch.cat(rewards).mean())} | self.step(policy, optimizer)

class NoUpdate(Algorithm):
    needs_gradient: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = False

    def collect(self, env, policy, generator):
        pass

class NoAlgorithm:
    pass

class Unset(Ascent):
    count: int

class Strange(Ascent):
    net: torch.nn.Linear = None

def function():
    pass
"""
ENV = """
from dataclasses import dataclass
from diffrl.envs.emoji import Emoji

@dataclass
class Dim(Emoji):
    "The emoji model, its pictures darker."
    light: float = 0.5

    def load(self):
        backbone = super().load()
        decode = backbone.decode
        backbone.decode = lambda latents: self.light * decode(latents)
        return backbone

class Unset:
    num_steps: int

class Unloaded:
    num_steps: int = 4
"""
PLAIN = """
from diffrl.envs.emoji import Emoji

class Plain(Emoji):
    "Another model, and no setting of its own."
    def load(self):
        return super().load()
"""
PACKAGE = """
import torch

class Brightness:
    "How bright a picture is."
    differentiable = True
    strength: float = 1.0

    def __call__(self, images, context):
        return self.strength * images.mean((1, 2, 3))

def darkness(images, context):
    return 1 - images.mean((1, 2, 3))
"""
POINTS = """[diffrl.rewards]
brightness = their_rewards:Brightness
darkness = their_rewards:darkness
broken = their_lost_module:Anything
[diffrl.algorithms]
theirs = their_algorithms:Ascent
[diffrl.envs]
plain = their_envs:Plain
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "my_algo.py").write_text(ALGORITHM)
    (tmp_path / "my_env.py").write_text(ENV)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution as pip would leave it: modules and a dist-info."""
    site = tmp_path / "site"
    info = site / "their_package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (site / "their_rewards.py").write_text(PACKAGE)
    (site / "their_algorithms.py").write_text(ALGORITHM)
    (site / "their_envs.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(components, "GROUPS", known := {k: dict(v) for k, v in components.GROUPS.items()})
    monkeypatch.setattr(config, "GROUPS", known)
    yield
    for name in ("their_rewards", "their_algorithms", "their_envs"):
        sys.modules.pop(name, None)


def test_an_algorithm_and_an_env_of_files_train_and_the_run_is_read_from_elsewhere(
    files, tiny_path, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text(PACKAGE)
    words = ["env=my_env.py:Dim", f"env.model={tiny_path}", "env.num_steps=2", "env.light=0.25"]
    words += ["algo=my_algo.py:Ascent", "algo.strength=2", "reward=mine.py:Brightness", "eval_pictures=2"]
    words += ["algo.updates=1", "algo.batch_size=4", "algo.micro_batch_size=4", "name=run"]
    assert main(["train", *words]) == 0
    monkeypatch.chdir("/")
    stored = settings_file.read(tmp_path / "runs" / "run" / "config.yaml")
    assert (stored.algo.strength, stored.env.light, stored.env.num_steps) == (2.0, 0.25, 2)
    assert main(["eval", str(tmp_path / "runs" / "run"), "--json", "-n", "2"]) == 0
    brightness = json.loads(capsys.readouterr().out.splitlines()[-1])["reward_mean"]
    assert 0 < brightness <= 0.25  # of pictures that are a quarter as light


def test_a_class_that_is_no_dataclass_has_its_own_settings_checked_and_pickled(files):
    algo = config.load(["algo=my_algo.py:Ascent", "algo.strength=3", "algo.batch_size=32"]).algo
    again = pickle.loads(pickle.dumps(algo))
    assert (again.strength, again.batch_size, again.micro_batch_size) == (3.0, 32, 16)
    assert type(again).__name__ == "Ascent"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("algo=my_algo.py:Ascend", "my_algo.py:Ascent'?"),
        ("algo=my_algo.py:NoUpdate", "NoUpdate has no update(self, trajectories, policy, optimizer)"),
        ("algo=my_algo.py:NoAlgorithm", "derive it from diffrl.algorithms.base.Algorithm"),
        ("algo=my_algo.py:Unset", "non-default argument 'count' follows default argument"),
        ("env=my_env.py:Unset", "Unset.num_steps has no default"),
        ("algo=my_algo.py:Strange", "Strange cannot have these settings"),
        ("algo=my_algo.py:function", "is no class"),
        ("algo=none.py:Ascent", "algo=none.py:Ascent: no such file"),
        ("algo=my_algo.py:Ascent algo.strenght=2", "Did you mean 'algo.strength'?"),
        ("algo=my_algo.py:Ascent algo.strength=much", "algo.strength=much: Value 'much'"),
        ("algo=my_algo.py:Ascent algo.updates=0", "algo.updates=0: must be 1 or more"),
        ("env=my_env.py:Unloaded", "Unloaded has no load(self)"),
        ("env=my_env.py:Dim env.eta=2", "env.eta=2.0: must be between 0 and 1"),
    ],
)
def test_mistakes_are_named(files, capsys, words, expected):
    assert expected in fails(capsys, "train", *words.split())


def test_a_changed_file_is_another_run(files, tmp_path):
    words = ["algo=my_algo.py:Ascent", "reward=jpeg"]
    before = settings_file.facts(config.load(words))
    assert settings_file.same(before, config.load(words))
    (tmp_path / "my_algo.py").write_text(ALGORITHM + "\n# other\n")
    assert not settings_file.same(before, config.load(words))


class TestInstalledPackages:
    def test_theirs_are_chosen_and_set_like_ours_and_come_back(self, package, tmp_path):
        chosen = config.load(["reward=brightness", "reward.strength=2", "algo=theirs"])
        assert config.chosen(chosen, "reward") == "brightness"
        assert config.chosen(chosen, "algo") == "theirs"
        images = torch.full((2, 3, 4, 4), 0.25)
        assert_close(chosen.reward(images, None), [0.5, 0.5], atol=1e-7)
        assert_close(pickle.loads(pickle.dumps(chosen.reward))(images, None), [0.5, 0.5], atol=1e-7)
        settings_file.write(chosen, tmp_path / "config.yaml")
        assert settings_file.read(tmp_path / "config.yaml").reward.strength == 2.0
        assert_close(config.load(["reward=darkness"]).reward(images, None), [0.75, 0.75], atol=1e-7)

    def test_nothing_is_imported_until_it_is_asked_for(self, package):
        assert set(components.installed("reward")) == {"brightness", "darkness", "broken"}
        config.load(["reward=jpeg", "algo=ddpo"])
        assert "their_rewards" not in sys.modules

    def test_a_broken_one_is_a_line_that_names_the_package(self, package, capsys):
        line = "package their-package fails at their_lost_module:Anything: ModuleNotFoundError"
        with pytest.raises(DiffRLError, match=f"reward=broken: {line}"):
            config.load(["reward=broken"])
        assert main(["list"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "reward=brightness How bright a picture is." in shown
        assert "reward=darkness darkness of package their-package." in shown
        assert line in shown

    def test_a_misspelt_one_is_found(self, package):
        with pytest.raises(DiffRLError, match="Did you mean 'brightness'"):
            config.load(["reward=brigtness"])

    def test_an_env_of_theirs_has_its_own_classifier_and_another_version_another(
        self, package, tiny_path, tmp_path
    ):
        def places(env):
            setup = Setup(config.load([f"env={env}", f"env.model={tiny_path}"]))
            return learned.classifier_file(setup), learned._pictures_file(setup)

        before = places("plain")
        about = tmp_path / "site" / "their_package-1.0.dist-info" / "METADATA"
        about.write_text(about.read_text().replace("1.0", "1.1"))
        del components.GROUPS["env"]["plain"]  # as in another process
        assert all(
            len(set(found)) == 3 for found in zip(places("emoji"), before, places("plain"), strict=True)
        )
