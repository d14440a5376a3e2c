"""The trainable policy p(x_{t-1} | x_t, c, y): frozen denoiser, LoRA, label embedding, guidance.

Shapes: N envs, C,H,W latent, A attributes of a label. Source: CTRL, arXiv:2406.12120, section 4.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributions import Independent
from torch.utils.checkpoint import checkpoint

from diffrl.errors import DiffRLError, unknown
from diffrl.schedule import DDIMSchedule
from diffrl.types import NO_LABEL, ActorStep, Observation, draw


@dataclass
class LoRA:
    """The low-rank adapters: their size and the layers they sit on."""

    rank: int = 8  # r of their B A; chosen on emoji; CTRL: 4
    # names of layers of the denoiser, as peft takes them
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise DiffRLError(f"policy.rank={self.rank}: must be 1 or more.")


class LabelEmbedding(nn.Module):
    """Sum of one embedding per attribute, zero at the start; the null row stays zero for ever.

    Args:
        num_classes: of each attribute.
        width: of the time embedding it is added to.
    """

    def __init__(self, num_classes: Sequence[int], width: int) -> None:
        super().__init__()
        self.null: Tensor
        self.register_buffer("null", torch.zeros(1, width), persistent=False)
        # padding_idx: the last row gets no gradient, so no optimiser ever moves it from zero
        self.num_classes = tuple(num_classes)
        tables = [nn.Embedding(count + 1, width, padding_idx=count) for count in num_classes]
        for table in tables:
            nn.init.zeros_(table.weight)
        self.tables = nn.ModuleList(tables)

    def forward(self, label: Tensor) -> Tensor:
        """Return `[N, width]` for labels `[N, A]`; NO_LABEL, or A = 0, selects the null row."""
        total = self.null.expand(len(label), -1)
        for column, count, table in zip(label.unbind(1), self.num_classes, self.tables, strict=False):
            total = total + table(column.remainder(count + 1))
        return total


class Policy(nn.Module):
    """Gaussian policy over x_{t-1}; the reference is the same network with its adapters off.

    Args:
        unet: the denoiser; it is frozen, then LoRA and the label embedding are added to it.
        schedule: turns predicted noise into the step's Gaussian.
        null_embeds: `[1, L, E]`, the empty prompt, for classifier-free guidance.
        guidance_scale: w in eps_u + w (eps_c - eps_u); at 1 the unconditional half is not run.
        num_classes: of each attribute of the label.
        lora: size and place of the adapters.
        checkpointing: in a chain of steps, recompute each one's network call in the backward pass instead
            of keeping its activations, so that memory does not grow with T. A small network is faster
            without; a single call would be run again for the very memory that it has given up.
        seed: of the adapters' random halves.
    """

    null_embeds: Tensor
    unet: Any

    def __init__(
        self,
        unet: nn.Module,
        schedule: DDIMSchedule,
        null_embeds: Tensor,
        *,
        guidance_scale: float,
        num_classes: Sequence[int] = (),
        lora: LoRA | None = None,
        checkpointing: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        lora = lora or LoRA()
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.checkpointing = checkpointing
        self.control_scale = 1.0
        self.num_calls = 0  # network evaluations so far: one a sample and guidance half, recomputing aside
        self.register_buffer("null_embeds", null_embeds, persistent=False)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.rank,
            target_modules=list(lora.targets),
            init_lora_weights="gaussian",
        )
        layers = [f".{name}" for name, layer in unet.named_modules() if hasattr(layer, "weight")]
        for target in lora.targets:
            if not any(name.endswith(f".{target}") for name in layers):
                raise unknown("policy.targets", target, {name.rpartition(".")[2] for name in layers})
        device = null_embeds.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.unet = inject_adapter_in_model(config, unet.requires_grad_(False))
        self.unet.to(device)
        for parameter in self.lora_parameters():  # an optimiser's steps would be lost in a half's rounding
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._lora_layers = [m for m in self.unet.modules() if isinstance(m, BaseTunerLayer)]
        # After the adapters: peft freezes whatever is not LoRA, and an embedding with it.
        self.label_embedding = LabelEmbedding(
            num_classes, self.unet.time_embedding.linear_2.out_features
        ).to(device)
        self.unet.class_embedding = self.label_embedding  # diffusers adds it to the time embedding

    def lora_parameters(self) -> list[nn.Parameter]:
        """Return the adapters' weights."""
        return [p for name, p in self.unet.named_parameters() if "lora_" in name]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Return the label embedding's weights, a table for each attribute."""
        return list(self.label_embedding.parameters())

    def forward(self, obs: Observation, *, in_chain: bool = False) -> Independent:
        """Return the law of x_{t-1} at `obs`, event shape [C, H, W]; see `guided_eps`."""
        eps = self.guided_eps(obs, in_chain=in_chain)
        return self.schedule.step(obs["latents"], eps, obs["timestep"])

    def guided_eps(self, obs: Observation, *, in_chain: bool = False) -> Tensor:
        """Return the noise prediction that the law of x_{t-1} is made of, `[N, C, H, W]`.

        `in_chain`: its graph will be held together with others, of calls, decoder or reward, so that
        checkpointing saves memory.
        With `control_scale` s other than 1, eps = eps_ref + s (eps - eps_ref): the strength of the
        control at inference (CTRL, appendix D); 0 runs the pretrained model alone.
        """
        if self.control_scale == 0.0:
            return self._guided_eps(without_label(obs), adapters=False, in_chain=in_chain)
        if self.control_scale == 1.0:
            return self._guided_eps(obs, adapters=True, in_chain=in_chain)
        eps = self._guided_eps(obs, adapters=True, in_chain=True)
        reference = self._reference_eps(obs)
        return reference + self.control_scale * (eps - reference)

    def reference(self, obs: Observation) -> Independent:
        """Return the pretrained law of x_{t-1} at `obs`: adapters off, no label.

        It is frozen in its weights, not cut from the graph: its mean depends on x_t.
        """
        return self.schedule.step(obs["latents"], self._reference_eps(obs), obs["timestep"])

    def posterior_mean(self, obs: Observation) -> Tensor:
        """Return the pretrained model's E[x_0|x_t] at `obs`, `[N, C, H, W]` (Tweedie's formula).

        Its Jacobian by x_t is sqrt(A) / (1 - A) times the covariance of x_0 given x_t: where the pretrained
        pictures may still go, and how far. With guidance it is the guided prediction, which is no mean.
        """
        return self.schedule.predict_x_0(obs["latents"], self._reference_eps(obs), obs["timestep"])

    def begin(self, obs: Observation) -> None:
        """Nothing to forget: the policy is Markov."""

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return a reparameterised draw of x_{t-1}."""
        distribution = self(obs, in_chain=True)
        return ActorStep(draw(distribution, generator), distribution)

    def eps(self, obs: Observation) -> Tensor:
        """Return the raw noise prediction `[N, C, H, W]` at any timestep, without guidance."""
        self.num_calls += len(obs["latents"])
        return self._eps(obs["latents"], obs["timestep"], obs["prompt_embeds"], obs["label"])

    def _eps(self, x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor, label: Tensor) -> Tensor:
        dtype = next(self.unet.parameters()).dtype  # a frozen weight's; LoRA and labels stay in float32
        inputs = (x_t.to(dtype), timestep, prompt_embeds.to(dtype))
        out = self.unet(*inputs, class_labels=label, return_dict=False)
        return self.schedule.to_eps(out[0].to(x_t.dtype), x_t, timestep)

    def unconditional(self, obs: Observation) -> Tensor:
        """Return the noise prediction `[N, C, H, W]` for the empty prompt, with no label."""
        return self.eps(without_prompt(without_label(obs), self.null_embeds))

    @property
    def calls_per_step(self) -> int:
        """Network evaluations for one guided noise prediction of one sample: 1 or 2."""
        return 1 if self.guidance_scale == 1.0 else 2

    def _reference_eps(self, obs: Observation) -> Tensor:
        return self._guided_eps(without_label(obs), adapters=False, in_chain=True)

    def _guided_eps(self, obs: Observation, *, adapters: bool, in_chain: bool = False) -> Tensor:
        self.num_calls += len(obs["label"]) * self.calls_per_step
        if not (in_chain and self.checkpointing and torch.is_grad_enabled()):
            return self._both_halves(obs, adapters)
        return checkpoint(self._both_halves, obs, adapters, use_reentrant=False, preserve_rng_state=False)

    def _both_halves(self, obs: Observation, adapters: bool) -> Tensor:
        x_t, timestep = obs["latents"], obs["timestep"]
        embeds, label = obs["prompt_embeds"], obs["label"]
        # The switch is inside, because checkpointing runs this again during the backward pass.
        with self._adapters(adapters):
            if self.guidance_scale == 1.0:
                return self._eps(x_t, timestep, embeds, label)
            both = self._eps(
                torch.cat([x_t, x_t]),
                torch.cat([timestep, timestep]),
                torch.cat([self.null_embeds.expand_as(embeds), embeds]),
                torch.cat([without_label(obs)["label"], label]),
            )
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    @contextmanager
    def _adapters(self, enabled: bool) -> Iterator[None]:
        # Not peft's enable_adapters: that also flips requires_grad, and a gradient arriving while
        # it is off would be dropped without a word.
        for layer in self._lora_layers:
            layer._disable_adapters = not enabled
        try:
            yield
        finally:
            for layer in self._lora_layers:
                layer._disable_adapters = False


class Pretrained:
    """The reference as an actor: the pretrained model, whatever its policy has learnt since."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def begin(self, obs: Observation) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation, generator: torch.Generator) -> ActorStep:
        """Return a draw of x_{t-1} from the pretrained law."""
        distribution = self.policy.reference(obs)
        return ActorStep(draw(distribution, generator), distribution)


def without_label(obs: Observation) -> Observation:
    """Return `obs` with no label: what the pretrained model sees."""
    return {**obs, "label": torch.full_like(obs["label"], NO_LABEL)}


def without_prompt(obs: Observation, null_embeds: Tensor) -> Observation:
    """Return `obs` with the empty prompt, of embedding `null_embeds` `[1, L, E]`."""
    return {**obs, "prompt_embeds": null_embeds.expand_as(obs["prompt_embeds"])}
