"""Every fault of an env is found in one that has it, and the project's own have none."""

import random

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode

import diffrl
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.emoji import Emoji
from diffrl.envs.gaussian_mixture import GaussianMixture
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError
from diffrl.rewards.closed_form import Softmax
from diffrl.schedule import DDIMSchedule

pytestmark = pytest.mark.usefixtures("unfitted")


def test_ours_have_no_fault(tiny_path):
    diffrl.check_env(GaussianMixture(num_steps=3))
    diffrl.check_env(Emoji(num_steps=2))
    diffrl.check_env(SD15(model=str(tiny_path), num_steps=2))


class Whole(DenoisingVectorEnv):
    """Ours; the ones below break it."""


class NotLockStep(Whole):
    metadata = DenoisingVectorEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}


class OtherActions(Whole):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.action_space = Box(-np.inf, np.inf, (self.num_envs, 7), np.float32)


class Observes(Whole):
    def change(self, obs):
        return obs

    def reset(self, **options):
        obs, info = super().reset(**options)
        return self.change(dict(obs)), info

    def step(self, actions):
        obs, *rest = super().step(actions)
        return self.change(dict(obs)), *rest


class Doubles(Observes):
    def change(self, obs):
        return obs | {"latents": obs["latents"].double()}


class Secret(Observes):
    def change(self, obs):
        return obs | {"more": torch.zeros(self.num_envs)}


class Arrays(Observes):
    def change(self, obs):
        return obs | {"timestep": obs["timestep"].numpy()}


class OneClock(Observes):
    def change(self, obs):
        return obs | {"timestep": torch.full_like(obs["timestep"], 7)}


class NewLabels(Observes):
    def change(self, obs):
        self.turn = getattr(self, "turn", 0) + 1
        return obs | {"label": (obs["label"] + self.turn) % 2}


class Unseeded(Whole):
    def reset(self, *, seed=None, options=None):
        return super().reset(options=options)


class SameEpisode(Whole):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=0, options=options)


class Stuck(Whole):
    def reset(self, *, seed=None, options=None):
        self.last = getattr(self, "last", 0) if seed is None else seed
        return super().reset(seed=self.last, options=options)


class DrawsGlobally(Whole):
    def step(self, actions):
        random.random()
        return super().step(actions)


class AddsNoise(Whole):
    def step(self, actions):
        obs, *rest = super().step(actions)
        return obs | {"latents": obs["latents"] + 0.01}, *rest


class Steps(Whole):
    def change(self, reward, ended, truncated, info):
        return reward, ended, truncated, info

    def step(self, actions):
        obs, *rest = super().step(actions)
        return obs, *self.change(*rest)


class RewardsOnTheWay(Steps):
    def change(self, reward, ended, truncated, info):
        return reward + 1, ended, truncated, info


class OneReward(Steps):
    def change(self, reward, ended, truncated, info):
        return reward.sum(), ended, truncated, info


class NoisyReward(Steps):
    noise = torch.Generator().manual_seed(0)

    def change(self, reward, ended, truncated, info):
        if ended.all():
            reward = reward + torch.randn(len(reward), generator=self.noise)
        return reward, ended, truncated, info


class FirstEndsEarly(Steps):
    def change(self, reward, ended, truncated, info):
        return reward, ended | (torch.arange(self.num_envs) == 0), truncated, info


class Truncates(Steps):
    def change(self, reward, ended, truncated, info):
        return reward, ended, ended, info


class FloatFlags(Steps):
    def change(self, reward, ended, truncated, info):
        return reward, ended.float(), truncated, info


class NoPictures(Steps):
    def change(self, reward, ended, truncated, info):
        return reward, ended, truncated, {}


class LightPictures(Steps):
    def change(self, reward, ended, truncated, info):
        if info:
            info = {"images": info["images"].repeat(1, 1, 2, 2) + 9}
        return reward, ended, truncated, info


class Endless(Steps):
    def change(self, reward, ended, truncated, info):
        self._clock = 0
        return torch.zeros_like(reward), torch.zeros_like(ended), truncated, info

    def _observe(self):
        obs = super()._observe()
        self.now = getattr(self, "now", 10**6) - 1
        return obs | {"timestep": torch.full_like(obs["timestep"], self.now % 1000)}


class OtherValue(Whole):
    def value(self, x_0, context):
        return 2 * super().value(x_0, context) - 1


class Placed(Whole):
    def _score(self, images, context):
        return super()._score(images, context) + torch.arange(self.num_envs)


class GoesOn(Whole):
    def step(self, actions):
        if self._clock == self.schedule.num_steps:
            self._clock = 0
        return super().step(actions)


class Broadcasts(Whole):
    def step(self, actions):
        return super().step(actions.expand(self.num_envs, -1, -1, -1))


class Detaches(Whole):
    def step(self, actions):
        return super().step(actions.detach())


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (NotLockStep, "run in lock-step, and it does not say so"),
        (OtherActions, "action_space is not 4 times single_action_space"),
        (Doubles, "observation 'latents', torch.float64 of shape .* does not lie in its space"),
        (Secret, "'more' is only in its observation"),
        (Arrays, "observation 'timestep' is a ndarray"),
        (OneClock, "the timestep goes from 7 to 7"),
        (NewLabels, "'label' changes within an episode"),
        (Unseeded, r"reset\(seed=1\) twice gives two 'latents'"),
        (SameEpisode, r"reset\(seed=1\) and reset\(seed=2\) give the same latents"),
        (Stuck, r"reset\(\) after reset\(seed=2\) repeats"),
        (DrawsGlobally, "draws from, or seeds, a global generator"),
        (AddsNoise, "the next latents are not the action"),
        (RewardsOnTheWay, "reward is not 0 before the last step"),
        (OneReward, r"the reward is not a tensor \[4\]"),
        (NoisyReward, "the same seed and actions give another reward"),
        (FirstEndsEarly, "some envs end before others"),
        (Truncates, "an episode is truncated"),
        (FloatFlags, r"terminated is not a bool tensor \[4\]"),
        (NoPictures, "no tensor 'images'"),
        (LightPictures, r"Decode to \[0, 1\]"),
        (Endless, "no episode ends within"),
        (OtherValue, "is not the terminal reward"),
        (Placed, "envs in another order score otherwise"),
        (GoesOn, "a step past the end"),
        (Broadcasts, "one action for 4 envs"),
        (Detaches, "its gradient does not reach the first action"),
    ],
)
def test_a_fault_is_found(broken, fault, monkeypatch):
    monkeypatch.setattr("diffrl.checks.env._LONGEST", 50)

    def env(kind):
        backbone = GaussianMixture().load()
        schedule = DDIMSchedule(backbone.scheduler, 3, 1.0)
        return kind(backbone, schedule, Softmax(), ["cat", "dog"], num_envs=4)

    diffrl.check_env(env(Whole))
    with pytest.raises(DiffRLError, match=rf"(?s){broken.__name__}: .*{fault}"):
        diffrl.check_env(env(broken))


def test_what_is_no_env_is_refused():
    with pytest.raises(DiffRLError, match="int: neither a gymnasium"):
        diffrl.check_env(7)
