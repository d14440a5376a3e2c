"""SVDD: several candidates for each x_{t-1}, one of them kept by the reward of its predicted x_0.

Source: SVDD-PM, arXiv:2408.08252. Shapes: N samples, M candidates.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.algorithms.base import check_choice
from diffrl.algorithms.guidance.base import Guidance, check_count, check_strength
from diffrl.types import ActorStep, Observation, draw


@dataclass
class SVDD(Guidance):
    """Soft value-based decoding: best of M in every step, by r(x0hat) at the candidate's own time.

    Its limit for many candidates is the chain tilted by exp(gamma r(x0hat)) in every step, not the
    posterior: r(x0hat) is no soft value. Any reward will do, gradients are not asked for.

    As published: `selection=argmax last=false`.
    """

    num_candidates: int = 20  # M
    gamma: float = 10.0  # 1 / alpha: candidates are drawn in proportion to exp(gamma r(x0hat))
    selection: str = "soft"  # soft, or argmax: gamma without bound, as published
    last: bool = True  # choose in the last step too, by the reward itself; the published code does not

    needs_gradient: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("num_candidates", self.num_candidates)
        check_strength("gamma", self.gamma)
        check_choice("guidance.selection", self.selection, ("soft", "argmax"))

    @property
    def target_gamma(self) -> float | None:
        """The exponent; none where the best one is taken."""
        return self.gamma if self.selection == "soft" else None

    @property
    def choices(self) -> int:
        """Candidates a step: one where the reward has no say, which is the policy's own draw."""
        return 1 if self.target_gamma == 0 else self.num_candidates

    def begin(self, obs: Observation) -> None:
        """Forget the noise predicted for the last episode's candidates."""
        self._eps: Tensor | None = None  # of the candidate that was kept, at its own time

    @torch.no_grad()
    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return the candidate that was chosen; it has no density."""
        eps = self.policy.guided_eps(obs) if self._eps is None else self._eps
        law = self.schedule.step(obs["latents"], eps, obs["timestep"])
        candidates, values, ahead = [], [], []
        is_last = self.next_observation(obs, obs["latents"]) is None
        for _ in range(1 if is_last and not self.last else self.choices):
            x = draw(law, generator)
            after = self.next_observation(obs, x)
            if after is not None:
                ahead.append(self.policy.guided_eps(after))
            if self.choices > 1:
                values.append(self.reward(x) if after is None else self.value(after, ahead[-1]))
            candidates.append(x)
        kept = torch.zeros(len(obs["latents"]), dtype=torch.int64, device=eps.device)
        if len(candidates) > 1:
            kept = self._choose(torch.stack(values, 1), generator)
        rows = torch.arange(len(kept), device=eps.device)
        self._eps = torch.stack(ahead)[kept, rows] if ahead else None
        return ActorStep(torch.stack(candidates)[kept, rows], None)

    def _choose(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return the index of one candidate a sample, `[N]`, from values `[N, M]`."""
        if self.selection == "argmax":
            return values.argmax(1)
        chances = (self.gamma * values).softmax(1)
        return chances.to(generator.device).multinomial(1, generator=generator)[:, 0].to(values.device)
