"""The solvable model: a Gaussian mixture in one or two dimensions, denoised by a small trained network."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffrl.backbones.gaussian_mixture import GaussianMixtureModel, Mixture
from diffrl.errors import DiffRLError
from diffrl.rewards.closed_form import as_rows
from diffrl.schedule import check_steps


@dataclass
class GaussianMixture:
    """The MDP over a mixture sum_k w_k N(m_k, s_k^2 I): its reward is a classifier in closed form."""

    weights: list[float] = field(default_factory=lambda: [0.6, 0.4])  # w, summing to 1
    means: list[Any] = field(default_factory=lambda: [-1.0, 1.0])  # m; pairs in 2-D: [[-1,0],[1,0]]
    standard_deviations: list[float] = field(default_factory=lambda: [0.35, 0.35])  # s
    num_steps: int = 200  # T; a Gaussian policy cannot come closer to E[V_T] than 1.6 to 1.9 nats / T
    eta: float = 1.0  # DDIM's: 0 deterministic, 1 as much noise as DDPM
    model_seed: int = 0  # of the denoiser's fit; `seed` is the run's

    checkpointing: ClassVar[bool] = False  # so small a network is dearer to run again than to keep
    compile: ClassVar[bool] = False  # it would take longer than all that it saves
    guidance_scale: ClassVar[float] = 1.0  # there is no prompt to guide by
    own_reward: ClassVar[str] = "softmax"  # chosen with this env unless another is asked for

    def __post_init__(self) -> None:
        rows = as_rows("env.means", self.means)
        for name in ("weights", "standard_deviations"):
            count = len(getattr(self, name))
            if count != len(rows):
                raise DiffRLError(
                    f"env.{name}={getattr(self, name)}: {count} of them for {len(rows)} means; give one a "
                    "component."
                )
        if len(rows[0]) > 2:
            raise DiffRLError(f"env.means={self.means}: {len(rows[0])} dimensions; give 1 or 2.")
        for s in self.standard_deviations:
            if not 0 < s < float("inf"):
                raise DiffRLError(
                    f"env.standard_deviations={self.standard_deviations}: {s:g} is not a standard "
                    "deviation; each must be positive."
                )
        total = sum(self.weights)
        if not min(self.weights) > 0:
            raise DiffRLError(f"env.weights={self.weights}: each must be positive; leave a component out.")
        if not abs(total - 1) < 1e-6:
            scaled = ",".join(f"{w / total:.4g}" for w in self.weights)
            raise DiffRLError(f"env.weights={self.weights}: they sum to {total:g}, not 1. Try [{scaled}].")
        check_steps(self.num_steps, self.eta, "env.")

    @property
    def num_dims(self) -> int:
        """Return d."""
        return len(as_rows("env.means", self.means)[0])

    @property
    def reach(self) -> float:
        """How far from 0 a point may lie but for one chance in a billion: of x_T and of x_0."""
        rows = as_rows("env.means", self.means)
        far = [max(map(abs, m)) + 6 * s for m, s in zip(rows, self.standard_deviations, strict=True)]
        return max(6.0, *far)

    def load(self) -> GaussianMixtureModel:
        """Return the denoiser trained on this mixture, from the cache after the first time."""
        rows = as_rows("env.means", self.means)
        mixture = Mixture(self.weights, rows, self.standard_deviations)
        return GaussianMixtureModel.load(mixture, self.model_seed)
