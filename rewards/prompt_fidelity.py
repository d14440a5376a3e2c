"""Prompt fidelity: does the picture show what the prompt says?

Top-1 accuracy of a glyph classifier that was trained on composites only, never on generated pictures.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from diffrl.rewards.classifier import ConvFeatures


class PromptFidelity(nn.Module):
    """Classifies pictures `[N, 3, H, W]` in [0, 1] by the name a prompt would use.

    Args:
        names: of the K classes.
        aliases: second names, `{name: alias}`.
    """

    def __init__(self, names: Sequence[str], aliases: Mapping[str, str]) -> None:
        super().__init__()
        self.names, self.aliases = list(names), dict(aliases)
        self.features = ConvFeatures()
        self.head = nn.Linear(self.features.size, len(self.names))
        self._index = {name: number for number, name in enumerate(self.names)}
        self._index |= {alias: self._index[name] for name, alias in self.aliases.items()}

    def logits(self, images: Tensor) -> Tensor:
        """Return unnormalised log-probabilities `[N, K]`."""
        return self.head(self.features(images))

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return for each picture whether its prompt is the most likely name, bool `[N]`.

        A prompt that is none of the names is never recognised: it counts as False.
        """
        asked = torch.tensor([self._index.get(prompt, -1) for prompt in prompts])
        return self.logits(images).argmax(1) == asked.to(images.device)

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `names.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )
        names = {"names": self.names, "aliases": self.aliases}
        (folder / "names.json").write_text(json.dumps(names, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the classifier that `save` wrote, in float32."""
        judge = cls(**json.loads((folder / "names.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "model.safetensors")
        judge.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return judge.eval().requires_grad_(False)
