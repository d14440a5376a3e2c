"""What every guidance method is: settings, bound to a policy and an env, choosing each x_{t-1}.

Shapes: N envs, C,H,W latent. Notation: A = alpha_bar_t, r the env's reward of a finished picture.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Independent, Normal
from typing_extensions import Self

from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.schedule import DDIMSchedule
from diffrl.types import ActorStep, Observation

FORMS = ("eps", "sigma2")


class _Attached(ABC):
    """What an actor has besides its settings; not fields, or they would be settings too."""

    policy: Policy
    env: DenoisingVectorEnv
    schedule: DDIMSchedule


@dataclass
class Guidance(_Attached):
    """A dataclass whose fields are its settings; `attach` makes it an actor.

    No sample's law depends on another one, but within a population of `smc`. At strength 0 (a label's: 1),
    or with one candidate, every method draws what the policy draws, to the bit.
    """

    needs_gradient: ClassVar[bool]  # of the reward
    needs_noise: ClassVar[bool] = False  # eta > 0
    needs_training: ClassVar[bool] = False  # of the policy, which must know its label

    def attach(self, policy: Policy, env: DenoisingVectorEnv) -> Self:
        """Return these settings as an actor that guides `policy` towards the reward of `env`."""
        actor = replace(self)
        actor.policy, actor.env, actor.schedule = policy, env, policy.schedule
        return actor

    @property
    def target_gamma(self) -> float | None:
        """Gamma of the law that this aims at, p(x_0|c) p(y|x_0, c)^gamma / Z; None: of no such law."""
        return None

    @property
    def log_z_hat(self) -> Tensor | None:
        """Log of an unbiased estimate of that law's Z for each picture of the last episode, or None."""
        return None

    @property
    def population(self) -> int:
        """K, the consecutive envs that share a prompt and a label and yield one picture."""
        return 1

    def begin(self, obs: Observation) -> None:
        """Forget the last episode; `obs` is the first of a new one."""

    @abstractmethod
    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return the guided x_{t-1}, without a graph."""

    def chosen(self, generator: torch.Generator) -> Tensor:
        """Return which envs' pictures to keep after an episode, one a population, `[N / K]`."""
        return torch.arange(self.env.num_envs, device=self.env.device)

    def value(self, obs: Observation, eps: Tensor) -> Tensor:
        """Return r of the predicted x_0 at `obs`, `[N]`: the value function of all these methods."""
        return self.reward(self.schedule.predict_x_0(obs["latents"], eps, obs["timestep"]))

    def reward(self, x_0: Tensor) -> Tensor:
        """Return the env's reward of finished latents, `[N]`."""
        return self.env.value(x_0, self.env.context)

    def next_observation(self, obs: Observation, x: Tensor) -> Observation | None:
        """Return the state in which x_{t-1} = `x` will be seen; None after the last step."""
        later = self.schedule.index(obs["timestep"]) + 1
        if int(later[0]) == self.schedule.num_steps:
            return None
        return {**obs, "latents": x, "timestep": self.schedule.timesteps[later]}

    def steered(self, obs: Observation, eps: Tensor, gradient: Tensor, form: str) -> Independent:
        """Return the step whose score has `gradient` added, in one of two discretisations.

        eps: the noise prediction becomes eps - sqrt(1 - A) gradient. sigma2: the mean moves by
        sigma^2 gradient. They agree in the limit of many steps.
        """
        x_t, timestep = obs["latents"], obs["timestep"]
        if form == "eps":
            a, _ = self.schedule.signals(obs)
            return self.schedule.step(x_t, eps - (1 - a).sqrt() * gradient, timestep)
        law = self.schedule.step(x_t, eps, timestep)
        return shifted(law, law.variance * gradient)


def shifted(law: Independent, move: Tensor) -> Independent:
    """Return the Gaussian with its mean moved by `move`."""
    normal = Normal(law.mean + move, law.stddev, validate_args=False)
    return Independent(normal, law.mean.dim() - 1, validate_args=False)


def check_strength(name: str, value: float) -> None:
    """Raise DiffRLError unless a strength is 0 or more and finite."""
    if not 0 <= value < float("inf"):
        raise DiffRLError(f"guidance.{name}={value}: must be 0 or more, and finite.")


def check_count(name: str, value: int) -> None:
    """Raise DiffRLError unless a number of candidates or particles is 1 or more."""
    if value < 1:
        raise DiffRLError(f"guidance.{name}={value}: must be 1 or more.")


@dataclass
class Unguided(Guidance):
    """No guidance: the policy as it is."""

    needs_gradient: ClassVar[bool] = False

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return the policy's own action."""
        with torch.no_grad():
            return self.policy.act(obs, generator)
