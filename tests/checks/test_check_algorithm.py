"""Every fault of an algorithm is found in one that has it, and the project's own have none."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import diffrl
from diffrl.algorithms.base import Algorithm
from diffrl.components import GROUPS
from diffrl.errors import DiffRLError
from diffrl.rollout import rollout

SMALL = {"rwr": {"batch_size": 32, "epochs": 1}, "classifier_free": {"batch_size": 64, "epochs": 1}}


pytestmark = pytest.mark.usefixtures("unfitted")


@pytest.mark.parametrize("name", GROUPS["algo"])
def test_ours_have_no_fault(name):
    diffrl.check_algorithm(GROUPS["algo"][name](**SMALL.get(name, {})))


@dataclass
class Ascent(Algorithm):
    """Go up the reward's gradient; the ones below break it."""

    needs_gradient: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = False

    def collect(self, env, policy, generator):
        return rollout(env, policy, generator, grad_steps=env.schedule.num_steps)

    def update(self, trajectories, policy, optimizer):
        rewards = []
        for trajectory in trajectories:
            self.loss(trajectory.reward).backward()
            rewards.append(trajectory.reward.detach())
        norms = self.move(policy, optimizer)
        return self.metrics(torch.cat(rewards)) | norms

    def loss(self, reward):
        return -reward.mean()

    def move(self, policy, optimizer):
        return self.step(policy, optimizer)

    def metrics(self, rewards):
        return {"rollout/reward_mean": float(rewards.mean())}


class Unchecked(Ascent):
    def __post_init__(self):
        pass


class Raises(Ascent):
    def loss(self, reward):
        raise RuntimeError("shapes differ")


class SaysBlackBox(Ascent):
    needs_gradient: ClassVar[bool] = False


class TensorMetric(Ascent):
    def metrics(self, rewards):
        return {"rollout/reward_mean": rewards.mean()}


class NanMetric(Ascent):
    def metrics(self, rewards):
        return {"rollout/reward_std": float("nan")}


class BareMetric(Ascent):
    def metrics(self, rewards):
        return {"reward": 0.0}


class NanGradient(Ascent):
    def loss(self, reward):
        return (reward - reward).sqrt().sum()


class MovesFrozen(Ascent):
    def move(self, policy, optimizer):
        with torch.no_grad():
            next(p for name, p in policy.named_parameters() if "time_embedding" in name).add_(0.1)
        return super().move(policy, optimizer)


class MovesNothing(Ascent):
    def move(self, policy, optimizer):
        optimizer.zero_grad()
        return {}


class MovesNull(Ascent):
    def move(self, policy, optimizer):
        with torch.no_grad():
            policy.embedding_parameters()[0].add_(0.1)
        return super().move(policy, optimizer)


class LeavesGradient(Ascent):
    def move(self, policy, optimizer):
        optimizer.step()
        return {}


class Random(Ascent):
    noise = torch.Generator()

    def loss(self, reward):
        return super().loss(reward) * torch.rand((), generator=self.noise)


class Forgets(Ascent):
    """Learns a baseline, as a moving mean, and does not save it."""

    def __post_init__(self):
        super().__post_init__()
        self.seen = 0

    def loss(self, reward):
        self.seen += 1
        return super().loss(reward) * self.seen


class Unwritable(Forgets):
    def state_dict(self):
        return {"seen": torch.tensor(self.seen)}


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (Unchecked, r"algo\.updates=-1 is taken\. Call super\(\)\.__post_init__\(\)"),
        (Raises, "its first update fails: RuntimeError: shapes differ"),
        (SaysBlackBox, "fails on a black box, which needs_gradient=False promises"),
        (TensorMetric, r"'rollout/reward_mean' is tensor\(.*by float\(\)"),
        (NanMetric, "'rollout/reward_std' is nan"),
        (BareMetric, "'reward' has no namespace"),
        (NanGradient, "the gradient of its first update is not finite"),
        (MovesFrozen, "moves unet.time_embedding.*, which is frozen"),
        (MovesNothing, r"an update moves nothing\. Call backward\(\)"),
        (MovesNull, "the null label's row"),
        (LeavesGradient, "a gradient is left in"),
        (Random, "the same seed gives other numbers"),
        (Forgets, r"stopped and resumed it gives other numbers\. Return from state_dict\(\)"),
        (Unwritable, "it cannot be resumed: TypeError"),
    ],
)
def test_a_fault_is_found_and_its_mending_said(broken, fault):
    with pytest.raises(DiffRLError, match=rf"(?s){broken.__name__}: .*{fault}"):
        diffrl.check_algorithm(broken())


def test_one_that_is_sound_has_none_and_its_class_will_do():
    diffrl.check_algorithm(Ascent)


def test_what_is_no_algorithm_is_refused():
    with pytest.raises(DiffRLError, match="int: no algorithm"):
        diffrl.check_algorithm(7)


def test_the_global_generator_is_where_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    diffrl.check_algorithm(Ascent())
    assert torch.equal(torch.rand(3), expected)
