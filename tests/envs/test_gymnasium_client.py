"""Clients nobody here wrote: Gymnasium's vector wrappers, and Stable-Baselines3's PPO on top of them."""

import math

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers.vector import ArrayConversion, FlattenObservation, TransformAction
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

STEPS, ENVS = 4, 64


def make():
    """Return the solvable env in NumPy, its observations flat, its actions within what PPO can bound."""
    env = gymnasium.make_vec("diffrl:diffrl/GaussianMixture-v0", num_envs=ENVS, num_steps=STEPS)
    env = FlattenObservation(ArrayConversion(env, env_xp=torch, target_xp=np))
    points = Box(-4, 4, env.single_action_space.shape, np.float32)
    return TransformAction(env, lambda action: action, single_action_space=points)


class LockStep(VecEnv):
    """Stable-Baselines3's interface to a Gymnasium vector env whose episodes run in lock-step."""

    def __init__(self, env):
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self):
        return self.env.reset(seed=self._seeds[0])[0]

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        obs, reward, terminated, _, _ = self.env.step(self.actions)
        infos = [{} for _ in obs]
        if terminated.all():
            infos = [{"terminal_observation": last} for last in obs]
            obs = self.env.reset()[0]
        return obs, reward, terminated, infos

    def close(self):
        self.env.close()

    def get_attr(self, name, indices=None):
        return [getattr(self.env, name)] * self.num_envs

    def set_attr(self, *_):
        raise NotImplementedError

    env_method = set_attr

    def env_is_wrapped(self, *_):
        return [False] * self.num_envs


def test_ppo_learns_to_obey_the_label(unfitted):  # PPO asks the denoiser nothing
    env = VecMonitor(LockStep(make()))
    batch = 4 * STEPS * ENVS
    ppo = PPO(
        "MlpPolicy", env, n_steps=batch // ENVS, batch_size=256, learning_rate=3e-3, gamma=1.0, seed=0
    )
    ppo.set_logger(Logger(None, []))  # its own makes a folder that outlives the test
    before, _ = evaluate_policy(ppo, env, ENVS)
    ppo.learn(4 * batch)
    log_p, lengths = evaluate_policy(ppo, env, ENVS, return_episode_rewards=True)
    assert lengths == [STEPS] * ENVS
    # of two labels, equally frequent: a policy that cannot see which is asked for has log(1/2) at most
    assert before < math.log(0.5)
    assert np.mean(log_p) > 0.2 * math.log(0.5)
