"""From rewards to advantages: batch or per-prompt statistics.

Shapes: B pictures. Source: DDPO, arXiv:2305.13301, section 5 and its code (per-prompt statistics).
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.types import Context

Group = tuple[str, tuple[int, ...]]
"""A prompt and a label: pictures of one group compete with each other."""

SMALLEST_STD = 1e-6  # DDPO's code adds it; here less means that all rewards are alike


def groups_of(context: Context) -> list[Group]:
    """Return the group of each picture, B of them."""
    labels = (tuple(label) for label in context.label.tolist())
    return list(zip(context.prompts, labels, strict=True))


class GroupStatistics:
    """Mean and standard deviation of the last rewards of each group.

    Args:
        size: rewards remembered for each group.
        min_count: a group with fewer falls back to the statistics of the batch at hand.
    """

    def __init__(self, size: int, min_count: int) -> None:
        self.size, self.min_count = size, min_count
        self._rewards: dict[Group, deque[float]] = {}

    def update(self, groups: Sequence[Group], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Remember `rewards` `[B]`, then return the mean and standard deviation for each, `[B]` twice."""
        for group, reward in zip(groups, rewards.tolist(), strict=True):
            self._rewards.setdefault(group, deque(maxlen=self.size)).append(reward)
        known = {group: torch.tensor(self._rewards[group], dtype=rewards.dtype) for group in set(groups)}
        chosen = [known[g] if len(known[g]) >= self.min_count else rewards.cpu() for g in groups]
        mean = torch.stack([values.mean() for values in chosen])
        std = torch.stack([values.std(unbiased=False) for values in chosen])
        return mean.to(rewards), std.to(rewards)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in JSON's types."""
        return {"rewards": [[*group, list(kept)] for group, kept in self._rewards.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._rewards = {
            (prompt, tuple(label)): deque(kept, maxlen=self.size)
            for prompt, label, kept in state["rewards"]
        }


def standardise(rewards: Tensor, mean: Tensor, std: Tensor, clip: float) -> Tensor:
    """Return (r - mean) / std within +-clip, `[B]`; 0 where the rewards of a group are all alike."""
    advantages = ((rewards - mean) / std.clamp(min=SMALLEST_STD)).clamp(-clip, clip)
    return torch.where(std > SMALLEST_STD, advantages, torch.zeros_like(advantages))
