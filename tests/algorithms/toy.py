"""A chain whose objective is known in closed form: eps_theta = eps_ref + theta, theta a number a label.

eps_ref = sqrt(1 - A) x_t is the optimal denoiser of N(0, I). x_0 is Gaussian with mean linear in theta
and known variance, the KL is d theta^2 sum kappa, and the reward, the mean over dims of -(x_0 - 1)^2, has a
closed-form mean. d = 1, unless `num_dims` says otherwise: there a sum over dims is a mean.
"""

import torch
from torch import nn

from diffrl.benchmarks.pretrain_emoji import make_scheduler
from diffrl.schedule import DDIMSchedule
from diffrl.types import NO_LABEL, ActorStep, Context, draw


def linear_gain(schedule):
    """Derivative of the reference's mean by x_t, [T]."""
    return schedule.x_gain + schedule.eps_gain * (1 - schedule.alpha_bar).sqrt()


class ToyPolicy(nn.Module):
    guidance_scale = 2.0  # of `guided_eps`

    def __init__(self, num_steps=4, num_labels=2, num_dims=1):
        super().__init__()
        self.num_dims = num_dims
        self.schedule = DDIMSchedule(make_scheduler(), num_steps, 1.0).double()
        self.theta = nn.Parameter(torch.linspace(-0.2, 0.3, num_labels, dtype=torch.float64))

    def lora_parameters(self):
        return [self.theta]

    def embedding_parameters(self):
        return []

    def _law(self, obs, theta):
        signal = self.schedule.train_alpha_bar[obs["timestep"]].view(-1, 1, 1, 1)
        shift = theta[obs["label"][:, 0]].view(-1, 1, 1, 1)
        eps = (1 - signal).sqrt() * obs["latents"] + shift
        return self.schedule.step(obs["latents"], eps, obs["timestep"])

    def forward(self, obs):
        return self._law(obs, self.theta)

    def reference(self, obs):
        return self._law(obs, torch.zeros_like(self.theta))

    def eps(self, obs):
        """theta alone: its denoising loss is |theta - noise|^2, minimal at the weighted mean noise, 0.

        Without a label it is 0.
        """
        label = obs["label"][:, 0]
        theta = torch.where(label == NO_LABEL, 0.0, self.theta[label])
        return theta.view(-1, 1, 1, 1).expand_as(obs["latents"])

    def guided_eps(self, obs):
        """Away from an empty prompt whose eps is 0: `guidance_scale` theta."""
        return self.guidance_scale * self.eps(obs)

    def begin(self, obs):
        pass

    def act(self, obs, generator):
        law = self(obs)
        return ActorStep(draw(law, generator), law)


class ToyEnv:
    def __init__(self, schedule, num_envs, num_labels=2, num_dims=1):
        self.schedule, self.num_envs, self.num_labels = schedule, num_envs, num_labels
        self.num_dims = num_dims
        self.generator = torch.Generator().manual_seed(0)

    def _obs(self):
        now = int(self.schedule.timesteps[self.i]) if self.i < self.schedule.num_steps else 0
        return {
            "latents": self.x,
            "timestep": torch.full((self.num_envs,), now),
            "prompt_embeds": self.context.prompt_embeds,
            "label": self.context.label,
        }

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.i = 0
        shape = (self.num_envs, self.num_dims, 1, 1)
        self.x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        label = torch.arange(self.num_envs)[:, None] % self.num_labels
        self.context = Context(["x"] * self.num_envs, torch.zeros(self.num_envs, 1, 1), label)
        return self._obs(), {}

    def value(self, x_0, context):
        return -((x_0.flatten(1) - 1) ** 2).mean(1)

    def step(self, action):
        self.x, self.i = action, self.i + 1
        if self.i < self.schedule.num_steps:
            return self._obs(), torch.zeros(self.num_envs), None, None, {}
        return self._obs(), self.value(action, self.context), None, None, {"images": action}


def objective(policy, kl=0.0):
    """E[r - kl sum_t KL] for each label, in closed form and differentiable."""
    schedule = policy.schedule
    gain = linear_gain(schedule)
    mean, variance = torch.zeros_like(policy.theta), torch.ones((), dtype=torch.float64)
    for i in range(schedule.num_steps):
        mean = gain[i] * mean + schedule.eps_gain[i] * policy.theta
        variance = gain[i] ** 2 * variance + schedule.sigma[i] ** 2
    return -((mean - 1) ** 2) - variance - kl * policy.num_dims * schedule.kappa.sum() * policy.theta**2


class Recorder:
    """Stands in for the optimiser: keeps the gradient of every step, and moves nothing."""

    def __init__(self, policy):
        self.policy, self.gradients, self.param_groups = policy, [], []

    def step(self):
        self.gradients.append(self.policy.theta.grad.clone())

    def zero_grad(self):
        self.policy.theta.grad = None
