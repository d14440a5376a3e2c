"""A model whose answers are known: a Gaussian mixture, its optimal denoiser, and a network trained on it.

Shapes: N points of d dimensions as latents `[N, d, 1, 1]`, M components.
Source of the mixture and the schedule: the toy model of CTRL's checks, SD v1.5's betas.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from diffrl import disk
from diffrl.cache import cache_folder
from diffrl.schedule import make_scheduler

_FIT_VERSION = 3  # part of the cache's key: raise it when the network or its fit changes
_FIT_STEPS = 2000  # chosen: root mean square error of eps below .01, in seconds
_FIT_BATCH = 256
_FIT_RATE = 5e-3


class Mixture(nn.Module):
    """sum_k w_k N(m_k, s_k^2 I): x_0, and in closed form x_t = sqrt(A) x_0 + sqrt(1 - A) noise.

    Args:
        weights: w, M of them, summing to 1.
        means: m, `[M, d]`.
        standard_deviations: s, M of them.
    """

    weights: Tensor  # [M], float64 like the others
    means: Tensor  # [M, d]
    variances: Tensor  # [M]

    def __init__(
        self,
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        standard_deviations: Sequence[float],
    ) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("variances", torch.tensor(standard_deviations, dtype=torch.float64).square())

    @property
    def num_dims(self) -> int:
        """Return d."""
        return self.means.shape[1]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` values of x_0, `[count, d, 1, 1]`, float64."""
        component = self.weights.multinomial(count, replacement=True, generator=generator)
        noise = torch.randn(count, self.num_dims, dtype=torch.float64, generator=generator)
        points = self.means[component] + self.variances[component].sqrt()[:, None] * noise
        return points[:, :, None, None]

    def log_prob(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the log density of x_t `[N, d, 1, 1]` at A = `alpha_bar` `[N]`, nats, `[N]`."""
        _, _, joint = self._components(x_t, alpha_bar)
        return joint.logsumexp(1)

    def eps(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the optimal noise prediction E[noise | x_t] = -sqrt(1 - A) grad log p(x_t)."""
        offset, variance, joint = self._components(x_t, alpha_bar)
        score = -(joint.softmax(1) / variance)[:, :, None] * offset
        return -(1 - alpha_bar).sqrt()[:, None, None, None] * score.sum(1)[:, :, None, None]

    def _components(self, x_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t minus each mean `[N, M, d]`, each variance and log w_k N_k(x_t), both `[N, M]`."""
        a = alpha_bar[:, None].double()
        offset = x_t.flatten(1)[:, None, :].double() - a[:, :, None].sqrt() * self.means
        variance = a * self.variances + 1 - a
        normal = -offset.square().sum(2) / (2 * variance)
        normal = normal - 0.5 * self.num_dims * (2 * torch.pi * variance).log()
        return offset, variance, self.weights.log() + normal


class Denoiser(nn.Module):
    """A small residual network eps(x_t, t) with the face of diffusers' U-Net; prompts are ignored.

    Most of a step's time is the calls of so small layers, so what does not change is not computed again.

    Args:
        num_dims: d.
        width: of the hidden layers and the time embedding.
    """

    times: Tensor | None  # of every timestep, [1000, width], once the network is frozen

    def __init__(self, num_dims: int, width: int = 64) -> None:
        super().__init__()
        self.sinusoid = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.register_buffer("times", None, persistent=False)
        self.class_embedding: nn.Module | None = None
        self.first = nn.Linear(num_dims, width)
        self.into, self.of_time, self.out = (nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, num_dims)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.last.weight.device

    def freeze(self, num_timesteps: int) -> None:
        """Learn no more: the time embedding of each timestep is computed here, once."""
        self.requires_grad_(False).eval()
        self.times = self.time_embedding(self.sinusoid(torch.arange(num_timesteps, device=self.device)))

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the predicted noise `[N, d, 1, 1]`, in a tuple as diffusers does."""
        if self.times is None:
            time = self.time_embedding(self.sinusoid(timestep).to(x_t.dtype))
        else:
            time = self.times[timestep]
        if self.class_embedding is not None:
            time = time + self.class_embedding(class_labels)
        time = F.silu(time)
        hidden = self.first(x_t.flatten(1))
        hidden = hidden + self.out(F.silu(self.into(F.silu(hidden)) + self.of_time(time)))
        return (self.last(F.silu(hidden))[:, :, None, None],)


class GaussianMixtureModel(nn.Module):
    """The trained denoiser as a backbone: latents are the points themselves, prompts mean nothing."""

    def __init__(self, mixture: Mixture, unet: Denoiser) -> None:
        super().__init__()
        self.mixture, self.unet, self.scheduler = mixture, unet, make_scheduler()
        unet.freeze(len(self.scheduler.alphas_cumprod))

    @classmethod
    def load(cls, mixture: Mixture, seed: int = 0) -> Self:
        """Return the model of `mixture`, trained now or taken from the cache."""
        facts = [_FIT_VERSION, seed] + [t.tolist() for t in mixture.buffers()]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        path = cache_folder() / f"gaussian-mixture-{key}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = Denoiser(mixture.num_dims)
        try:
            unet.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError):  # none there, or a damaged one: fit again
            fit(unet, mixture, seed)
            _save(unet, path)
        return cls(mixture, unet)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, 1, 1)."""
        return self.mixture.num_dims, 1, 1

    @property
    def image_size(self) -> int:
        """1: a point is its own picture."""
        return 1

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """(L, E) of `encode_prompts`."""
        return 1, 1

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return zeros, `[len(prompts), 1, 1]`: there is nothing to say to a mixture."""
        return torch.zeros(len(prompts), *self.prompt_shape, device=self.unet.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the points themselves, `[N, d, 1, 1]`."""
        return latents


def fit(unet: Denoiser, mixture: Mixture, seed: int, num_steps: int = _FIT_STEPS) -> None:
    """Train `unet` to predict the mixture's optimal noise at every timestep.

    The closed-form prediction is the target instead of the noise drawn: the minimiser is the same, and the
    target has no variance, so seconds are enough.
    """
    alpha_bar = make_scheduler().alphas_cumprod.double()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(unet.parameters(), lr=_FIT_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        timestep = torch.randint(len(alpha_bar), (_FIT_BATCH,), generator=generator)
        a = alpha_bar[timestep]
        x_0 = mixture.draw(_FIT_BATCH, generator)
        noise = torch.randn(x_0.shape, dtype=torch.float64, generator=generator)
        # a little wider than the law itself, so that tails and tilted laws are known as well
        x_t = a.sqrt()[:, None, None, None] * x_0 + 1.5 * (1 - a).sqrt()[:, None, None, None] * noise
        x_t = x_t + 0.3 * torch.randn(x_0.shape, dtype=torch.float64, generator=generator)
        loss = F.mse_loss(unet(x_t.float(), timestep)[0], mixture.eps(x_t, a).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def _save(unet: Denoiser, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as draft:
        save_file(unet.state_dict(), draft)
