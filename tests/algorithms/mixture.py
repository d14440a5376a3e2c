"""A two-component mixture with its optimal denoiser in the place of a network, 50 steps, to guide."""

from functools import cache
from types import SimpleNamespace

import torch
from test_exact import TOY, solve

from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.exact import moments
from diffrl.rewards.closed_form import Softmax
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule, make_scheduler
from diffrl.types import ActorStep, draw

ALPHA_BAR = make_scheduler().alphas_cumprod.double()


class ClosedFormPolicy:
    """The mixture's optimal denoiser in the place of a network."""

    guidance_scale = 1.0

    def __init__(self, mixture=TOY, num_steps=50):
        self.mixture = mixture
        self.schedule = DDIMSchedule(make_scheduler(), num_steps, 1.0).double()
        self.num_calls = 0

    def guided_eps(self, obs, *, in_chain=False):
        self.num_calls += len(obs["latents"])
        return self.mixture.eps(obs["latents"], ALPHA_BAR[obs["timestep"]])

    def unconditional(self, obs):
        return self.guided_eps(obs) - 0.5

    def begin(self, obs):
        pass

    def act(self, obs, generator):
        law = self.schedule.step(obs["latents"], self.guided_eps(obs), obs["timestep"])
        return ActorStep(draw(law, generator), law)


class Points:
    """A backbone whose latents are the points themselves."""

    unet = SimpleNamespace(device=torch.device("cpu"))
    scheduler, latent_shape, prompt_shape, image_size = make_scheduler(), (1, 1, 1), (1, 1), 1

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def decode(self, latents):
        return latents


class Linear:
    """r(x) = 1.5 x, whatever the label."""

    differentiable, num_classes = True, (2,)

    def __call__(self, images, context):
        return 1.5 * images.flatten(1)[:, 0]


def attach(guidance, count, *, policy=None, reward=None):
    policy = policy or ClosedFormPolicy()
    count *= guidance.population
    env = DenoisingVectorEnv(
        Points(),
        policy.schedule,
        reward or Softmax(),
        ["x"],
        num_envs=count,
        group_size=guidance.population,
    )
    return guidance.attach(policy, env), env


def run(guidance, count, *, label=1, seed=1, **kwargs):
    """Return x_0 of `count` guided samples, those that were chosen, and the actor."""
    actor, env = attach(guidance, count, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    label = torch.as_tensor(label).expand(env.num_envs)[:, None]
    x_0 = rollout(env, actor, generator, seed=seed, options={"label": label}).latents[-1].flatten()
    actor.particles = x_0.view(count, guidance.population)
    return x_0[actor.chosen(generator)], actor


@cache
def target():
    """Mean, standard deviation, log Z of label 1, exactly."""
    toy = solve()
    return *(float(m) for m in moments(toy.target[1], toy.points)), float(toy.log_z[1])


def state(count=5, i=20):
    latents = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timestep = DDIMSchedule(make_scheduler(), 50, 1.0).timesteps[i].expand(count)
    return {
        "latents": latents,
        "timestep": timestep,
        "prompt_embeds": torch.zeros(count, 1, 1),
        "label": torch.zeros(count, 1, dtype=torch.int64),
    }
