"""A gradient for a reward that has none: a regression on the pictures that it has scored so far.

`algo=ctrl reward=surrogate[jpeg] reward.queries=2000` asks the true reward about the pictures that training
draws, refits after every update, and stops asking when the queries are spent; so methods that follow a
gradient and black-box ones can be compared at equally many true queries.
Shapes: M queries so far, F features, N pictures `[N, 3, S, S]` in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl import processes
from diffrl.errors import DiffRLError
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.fit import descend
from diffrl.rewards.scoring import score
from diffrl.types import Context


@dataclass
class OnlineSurrogateReward:
    """A differentiable stand-in for another reward, which sees the picture alone, not its prompt.

    Before the first round of queries it is 0 everywhere, so a run's first update only asks.
    """

    of: Any = None  # the true reward; reward.of.x is a setting of it
    queries: int = 2048  # pictures that the true reward is asked about in training, at most
    seed: int = 0  # of each fit

    differentiable: ClassVar[bool] = True
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise DiffRLError(f"reward.queries={self.queries}: must be 1 or more.")
        if self.of.num_classes:
            raise DiffRLError(
                f"reward=surrogate[{type(self.of).__name__}]: a surrogate sees no label, and this reward "
                "reads one. Give it a reward of the picture alone."
            )
        self._net = self._untrained()
        self._seen = torch.empty(0, self._net.features.size)  # [M, F]
        self._scores = torch.empty(0)  # [M]

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return the predicted reward, `[N]`."""
        if not self.num_queries:
            return 0 * images.mean((1, 2, 3))
        net = self._net.to(images.device)
        standard = net.logits(net.features(images))[:, 0]
        return self._scores.mean() + self._scores.std(unbiased=False) * standard

    @property
    def num_queries(self) -> int:
        """So many pictures the true reward was asked about."""
        return len(self._scores)

    def observe(
        self, parts: Sequence[tuple[Tensor, Context]], timeout: float | None = None
    ) -> dict[str, float]:
        """Ask the true reward about pictures just drawn, as long as queries are left, and refit.

        Every process gives its own pictures, and all learn from all.

        Args:
            parts: pictures with what they were drawn for.
            timeout: seconds a part's scores may take; see `score`.

        Returns:
            `reward/queries`, so many were made; while there are new ones `reward/surrogate_error`, the root
            mean square error of the prediction on them before it knew them.
        """
        place = processes.place(sum(len(images) for images, _ in parts))
        left = self.queries - self.num_queries - place.start
        seen, scores, guesses = [self._seen[:0]], [self._scores[:0]], [self._scores[:0]]
        with torch.no_grad():
            for images, context in parts:
                count = min(max(left, 0), len(images))
                if count:
                    asked, own = images[:count], context.rows(torch.arange(count))
                    scores.append(score(self.of, asked, own, timeout).detach().float().cpu())
                    seen.append(self._net.to(images.device).features(asked).cpu())
                    guesses.append(self(asked, own).cpu())
                left -= len(images)
        new = [processes.joined(torch.cat(values)) for values in (seen, scores, guesses)]
        metrics = {}
        if len(new[1]):
            if self.num_queries:
                metrics["reward/surrogate_error"] = float((new[1] - new[2]).square().mean().sqrt())
            self._seen, self._scores = torch.cat([self._seen, new[0]]), torch.cat([self._scores, new[1]])
            self._refit()
        return metrics | {"reward/queries": float(self.num_queries)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the queries; the regression follows from them."""
        return {"seen": self._seen, "scores": self._scores}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        self._seen, self._scores = state["seen"].cpu(), state["scores"].cpu()
        if self.num_queries:
            self._refit()

    def _untrained(self) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Classifier(1, "mixed")  # fixed features: a query is remembered by them, not as a picture

    def _refit(self) -> None:
        """Fit a new regression to all queries: it depends on them alone, not on the rounds they came in."""
        net = self._net = self._untrained()
        net.standardise(self._seen)
        spread = self._scores.std(unbiased=False).clamp(min=1e-6)
        target = (self._scores - self._scores.mean()) / spread
        descend(
            net,
            torch.arange(len(target)),
            lambda rows, size: ((part, net.logits(self._seen[part])) for part in rows.split(size)),
            lambda predicted, part: F.mse_loss(predicted[:, 0], target[part]),
            torch.Generator().manual_seed(self.seed),
        )
