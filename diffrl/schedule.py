"""The DDIM step as a Gaussian policy: coefficients as data, one line of mathematics each.

Shapes: N samples, T steps. Notation: A = alpha_bar_t, P = alpha_bar of the step's target.
Source: DDIM, arXiv:2010.02502, eq. 12 and 16.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from diffrl.errors import DiffRLError
from diffrl.types import Observation

_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Stable Diffusion v1.5's `scheduler_config.json`."""


def check_steps(num_steps: int, eta: float, prefix: str = "") -> None:
    """Raise DiffRLError unless T >= 1 and eta lies in [0, 1]; `prefix` stands before their names."""
    if not 0 <= eta <= 1:
        raise DiffRLError(f"{prefix}eta={eta}: must be between 0 and 1.")
    if num_steps < 1:
        raise DiffRLError(f"{prefix}num_steps={num_steps}: must be 1 or more.")


class DDIMSchedule(nn.Module):
    """T steps of DDIM at `eta`, spaced and bounded as a diffusers scheduler says.

    Args:
        scheduler: gives alpha_bar, the spacing, and alpha_bar after the last step.
        num_steps: T.
        eta: 0 is deterministic, 1 is DDPM's posterior variance.
    """

    timesteps: Tensor  # [T], falling
    alpha_bar: Tensor  # A, [T]
    alpha_bar_prev: Tensor  # P, [T]
    train_alpha_bar: Tensor  # of every timestep the model was trained on, [1000]
    sigma: Tensor  # [T]
    x_gain: Tensor  # d mean / d x_t at fixed eps, [T]
    eps_gain: Tensor  # d mean / d eps at fixed x_t, [T]
    _index: Tensor

    def __init__(self, scheduler: DDIMScheduler, num_steps: int, eta: float) -> None:
        super().__init__()
        limit = scheduler.config.num_train_timesteps
        check_steps(num_steps, eta)
        if num_steps > limit:
            raise DiffRLError(f"num_steps={num_steps}: must be {limit} or less, the model's own steps.")
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise DiffRLError(
                f"prediction_type={self.prediction_type}: the checkpoint's scheduler says so; only "
                "'epsilon' and 'v_prediction' are supported."
            )
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            raise DiffRLError(
                "the scheduler clips x_0 (clip_sample or thresholding): latents have no such range. "
                "Set both to false in scheduler_config.json."
            )
        scheduler = DDIMScheduler.from_config(scheduler.config)
        scheduler.set_timesteps(num_steps)
        timesteps = scheduler.timesteps.long()
        if int(timesteps.max()) >= limit:
            raise DiffRLError(
                f"num_steps={num_steps}: with the scheduler's steps_offset the first would be past the "
                f"last timestep, {limit - 1}. Take fewer."
            )
        stride = limit // num_steps
        prev = timesteps - stride
        every = scheduler.alphas_cumprod.double()
        a = every[timesteps]
        if not a.min() > 0:
            raise DiffRLError(
                "the scheduler begins at pure noise (rescale_betas_zero_snr): there the noise says nothing "
                "about x_0, and the step has no mean. Set it to false in scheduler_config.json."
            )
        p = torch.where(prev >= 0, every[prev.clamp(min=0)], scheduler.final_alpha_cumprod.double())
        sigma = eta * ((1 - p) / (1 - a) * (1 - a / p)).clamp(min=0).sqrt()
        if eta > 0 and not sigma.min() > 0:
            raise DiffRLError(
                f"the scheduler gives the step at timestep {int(timesteps[sigma.argmin()])} no noise: it "
                "has no density and no KL. Set steps_offset to 1, set_alpha_to_one to false and "
                "timestep_spacing to 'leading' in scheduler_config.json, or use env.eta=0."
            )

        self.num_steps, self.eta = num_steps, eta
        self.register_buffer("timesteps", timesteps, persistent=False)
        index = torch.full((limit,), -1)
        index[timesteps] = torch.arange(num_steps)
        self.register_buffer("_index", index, persistent=False)
        # mu = x_gain * x_t + eps_gain * eps, the two coefficients of DDIM eq. 12
        x_gain = (p / a).sqrt()
        eps_gain = (1 - p - sigma**2).sqrt() - (p * (1 - a) / a).sqrt()
        table = {"alpha_bar": a, "alpha_bar_prev": p, "train_alpha_bar": every, "sigma": sigma}
        table |= {"x_gain": x_gain, "eps_gain": eps_gain}
        for name, values in table.items():
            self.register_buffer(name, values.float(), persistent=False)

    @property
    def kappa(self) -> Tensor:
        """KL in nats of one step for a unit change of |eps|^2, [T]: eps_gain^2 / (2 sigma^2)."""
        return self.eps_gain.square() / (2 * self.sigma.square())

    def step(self, x_t: Tensor, eps: Tensor, timestep: Tensor) -> Independent:
        """Return the law of x_{t-1} given x_t and the predicted noise; event shape [C, H, W].

        Args:
            x_t: `[N, C, H, W]`.
            eps: `[N, C, H, W]`.
            timestep: `[N]`, each one of `timesteps`.
        """
        index = self.index(timestep)
        shape = (-1,) + (1,) * (x_t.dim() - 1)
        x_gain, eps_gain, sigma = (
            table[index].view(shape) for table in (self.x_gain, self.eps_gain, self.sigma)
        )
        mean = x_gain * x_t + eps_gain * eps
        normal = Normal(mean, sigma.expand_as(mean), validate_args=False)
        return Independent(normal, x_t.dim() - 1, validate_args=False)

    def index(self, timestep: Tensor) -> Tensor:
        """Return i, the number of the step, 0 to T - 1, of each of `timesteps`, `[N]`."""
        return self._index[timestep]

    def signals(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Return A and P at `obs`, `[N, 1, 1, 1]`."""
        index, shape = self.index(obs["timestep"]), (-1,) + (1,) * (obs["latents"].dim() - 1)
        return self.alpha_bar[index].view(shape), self.alpha_bar_prev[index].view(shape)

    def to_eps(self, prediction: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Return the noise that the network's output means at x_t, `[N, C, H, W]`.

        Of v-prediction, v = sqrt(A) eps - sqrt(1 - A) x_0, it is sqrt(A) v + sqrt(1 - A) x_t
        (arXiv:2202.00512, appendix D). At one x_t it is affine in v, so guidance may mix either. An error
        in v counts sqrt(A) times in eps: a denoising loss in eps weighs the noisy times of a v-model less
        than its own training did.
        """
        if self.prediction_type == "epsilon":
            return prediction
        a = self._signal(timestep, x_t)
        return a.sqrt() * prediction + (1 - a).sqrt() * x_t

    def predict_x_0(self, x_t: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """Return (x_t - sqrt(1 - A) eps) / sqrt(A), `[N, C, H, W]`: DDIM's "predicted x_0", eq. 12."""
        a = self._signal(timestep, x_t)
        return (x_t - (1 - a).sqrt() * eps) / a.sqrt()

    def normal_mean(self, obs: Observation) -> Tensor:
        """Return E[x_0|x_t] of latents of law N(0, I), sqrt(A) x_t, `[N, C, H, W]`."""
        return self._signal(obs["timestep"], obs["latents"]).sqrt() * obs["latents"]

    def add_noise(self, x_0: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        """Return x_t = sqrt(A) x_0 + sqrt(1 - A) eps at any training timestep, `[N, C, H, W]`."""
        a = self._signal(timestep, x_0)
        return a.sqrt() * x_0 + (1 - a).sqrt() * eps

    def _signal(self, timestep: Tensor, like: Tensor) -> Tensor:
        return self.train_alpha_bar[timestep].view((-1,) + (1,) * (like.dim() - 1))


def make_scheduler(config: Mapping[str, Any] | None = None) -> DDIMScheduler:
    """Return the scheduler of a checkpoint's config as DDIM, whatever class the config names.

    What it leaves out, other classes having no such setting (`clip_sample`, `set_alpha_to_one`), is as in
    Stable Diffusion v1.5, which is also the default: DDIM's own clip x_0 and give the last step no noise.
    That of a scheduler in memory lists what its class filled in, which counts as left out.
    """
    given = dict(config or {})
    for name in given.pop("_use_default_values", ()):
        given.pop(name, None)
    return DDIMScheduler.from_config(_STABLE_DIFFUSION | given)
