"""CTRL: a pretrained model learns p(x_0|c) p(y|x_0, c)^gamma / Z by back-propagating a classifier.

Source: CTRL, arXiv:2406.12120, algorithms 1 and 2. Step 1, the classifier, is `rewards/fit.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.optim import Optimizer

from diffrl.algorithms.pathwise import Pathwise
from diffrl.errors import DiffRLError
from diffrl.policy import Policy
from diffrl.types import Trajectory


@dataclass
class CTRL(Pathwise):
    """Maximise J = E[gamma log p(y|x_0, c) - sum_t KL(p_theta || p_ref)] by its pathwise gradient.

    With the KL summed over latent dims, J <= log Z, and its maximiser is p_ref(x_0|c) p(y|x_0, c)^gamma / Z
    up to the law of x_T. Differs from CTRL's code, which takes the mean over the d latent dims:
    `kl_reduction=mean` reproduces it, and makes gamma d times as strong. The loss is -J / gamma, so that
    the gradient's size, and its clipping, do not depend on gamma.

    By default the gradient is another as well: `truncation` keeps `count` steps, weighed up to those of its
    window; the reward has none at the steps after it, and it reaches the kept ones past the chain.
    `+experiment=ctrl_paper` has the published gradient, `truncation.kind=fixed truncation.path=network
    kl_steps=null` that of J itself.
    """

    gamma: float = 750.0  # of log p(y|x), chosen on emoji; the paper's 10, with its mean KL, is 10 d

    needs_noise: ClassVar[bool] = True
    restraint: ClassVar[str] = "Lower algo.gamma, or give algo.kl_budget=NATS."

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:  # the KL's weight is made of it
            raise DiffRLError(f"algo.gamma={self.gamma}: must be positive and finite.")
        super().__post_init__()

    @property
    def kl_weight(self) -> float:
        """1 / gamma: the reward is log p(y|x_0, c) itself."""
        return 1 / self.gamma

    def update(
        self, trajectories: Iterable[Trajectory], policy: Policy, optimizer: Optimizer
    ) -> dict[str, float]:
        """Take one step, and report J in nats besides; with `kl_reduction=mean` J over the latent dims."""
        metrics = super().update(trajectories, policy, optimizer)
        kl = metrics["rollout/kl" if self.kl_reduction == "sum" else "rollout/kl_mean"]
        objective = self.gamma * metrics["rollout/reward_mean"] - kl
        return metrics | {"rollout/objective": objective}
