"""Stable Diffusion with a label: what a run has learnt, as a pipeline of diffusers.

Shapes: N pictures of P prompts, A attributes of a label, E width of the time embedding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import Self

from diffrl import weights
from diffrl.backbones.loading import load_parts
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError
from diffrl.policy import LabelEmbedding
from diffrl.restore import env_of
from diffrl.schedule import make_scheduler
from diffrl.types import check_range

Pipeline = TypeVar("Pipeline", bound=StableDiffusionPipeline)

ADAPTER = "control"
"""The name of a run's LoRA in the pipeline, for `set_adapters`."""


class ControlledStableDiffusionPipeline(StableDiffusionPipeline):
    """A `StableDiffusionPipeline` that takes `label=` and `control_scale=`.

    Everything else is stock: devices and precisions, prompt lists, generators, other schedulers.

        pipe = ControlledStableDiffusionPipeline.from_run("runs/NAME")
        pipe("cat", label=3, num_images_per_prompt=8).images
    """

    label_embedding: LabelEmbedding | None = None
    call_defaults: Mapping[str, Any] = {}
    scheduler: Any

    @classmethod
    def from_run(cls, folder: str | Path, model: str | None = None) -> Self:
        """Return the model that a run was trained on, in float32, with what the run has learnt.

        Args:
            folder: of a run, or written by `diffrl export`.
            model: where that model lies, as in `env.model=`; None: where the run found it.

        Raises:
            DiffRLError: no such run, no such model, or they do not fit.
        """
        env = of_pictures(Path(folder), env_of(Path(folder)))
        pipeline = of_model(cls, model or env.model, None if model else env.revision)
        return pipeline._load(Path(folder), env)

    def load_control(self, folder: str | Path) -> Self:
        """Put what a run has learnt into this pipeline, and return the pipeline.

        The LoRA is loaded as the adapter "control". The scheduler becomes DDIM, which the run sampled by,
        and its number of steps, eta, guidance scale and picture size become the defaults of a call.

        Args:
            folder: of a run, or written by `diffrl export`.

        Raises:
            DiffRLError: a file missing or damaged, or of another model; or another run's LoRA is fused.
        """
        return self._load(Path(folder), of_pictures(Path(folder), env_of(Path(folder))))

    def _load(self, folder: Path, env: SD15) -> Self:
        width = self.unet.time_embedding.linear_2.out_features
        embedding = weights.load_control(folder, width)
        if ADAPTER in self.fused_loras:
            raise DiffRLError(
                f"{folder}: another run's LoRA is fused into the weights. Call unfuse_lora() first; if it "
                "is unloaded already, make a new pipeline."
            )
        if ADAPTER in self.get_list_adapters().get("unet", ()):  # of another run
            self.delete_adapters(ADAPTER)
        weights.load_lora(self, folder / weights.LORA_FILE, weights.read_lora(folder), ADAPTER)
        self.label_embedding = embedding
        self.scheduler = make_scheduler(self.scheduler.config)
        self.call_defaults = call_settings(env)
        return self

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        label: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
        control_scale: float = 1.0,
        **options: Any,
    ) -> Any:
        """Return pictures as the stock pipeline does; `options` are the stock ones.

        Args:
            prompt: P of them.
            label: the control: one number an attribute (`3`, or `[1, 0]` of two), or a row of them a
                prompt, `[P, A]`; of one attribute also a number a prompt, `[P]`. None, or -1 for an
                attribute, leaves it open.
            control_scale: s in eps = eps_ref + s (eps - eps_ref), where eps_ref is the prediction with
                every LoRA off and no label. 0 is the pretrained model; other than 0 and 1 takes twice
                the time.
            options: of `StableDiffusionPipeline`; steps, eta, guidance scale and size are the run's by
                default.

        Raises:
            DiffRLError: a label that the control does not have, no control loaded, or a strength that
                is no finite number, or not 1 while the LoRA is fused into the weights.
        """
        if not isinstance(control_scale, Real) or not math.isfinite(control_scale):
            raise DiffRLError(f"control_scale={control_scale!r}: must be one finite number, such as 1.5.")
        if self.label_embedding is None:
            if label is None and control_scale == 1.0:
                return super().__call__(prompt, **options)
            raise DiffRLError(
                f"label={label} control_scale={control_scale}: no control is loaded. Call "
                "load_control(DIR) with a folder of 'diffrl export'."
            )
        if control_scale != 1.0 and ADAPTER in self.fused_loras:
            raise DiffRLError(
                f"control_scale={control_scale}: the LoRA is fused into the weights, so what the "
                "pretrained model predicts is not known. Call unfuse_lora() first."
            )
        several = options.get("prompt_embeds") if prompt is None else prompt
        prompts = 1 if several is None or isinstance(several, str) else len(several)
        offset = self._offset(label, prompts)
        with _Control(self, offset, control_scale):
            return super().__call__(prompt, **{**self.call_defaults, **options})

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Save the stock pipeline; one with a control has files that diffusers does not know.

        Raises:
            DiffRLError: a control is loaded.
        """
        if self.label_embedding is not None:
            raise DiffRLError(
                "save_pretrained: diffusers saves no label embedding, and cannot load a denoiser with "
                "adapters in it. 'diffrl export RUN DIR' writes files that from_run(DIR) loads."
            )
        super().save_pretrained(*arguments, **options)

    def _offset(self, label: Any, prompts: int) -> Tensor | None:
        """Return what a label adds to the time embedding, `[1 or P, E]`."""
        if label is None:
            return None
        assert self.label_embedding is not None
        counts = self.label_embedding.num_classes
        takes = f"{len(counts)} whole number(s), such as {[0] * len(counts)}, or such a list a prompt"
        refused = DiffRLError(f"label={label!r}: this control takes {takes if counts else 'no label'}.")
        try:
            given = torch.as_tensor(label).cpu()
        except (TypeError, ValueError, RuntimeError) as error:  # by what it is
            raise refused from error
        given = given.reshape(-1, 1 if len(counts) == 1 or not given.ndim else given.shape[-1])
        if given.shape[1] != len(counts) or len(given) not in (1, prompts) or given.is_floating_point():
            raise refused
        check_range(given, counts)
        return self.label_embedding(given.long())


class _Control:
    """While it is entered, the denoiser predicts eps_ref + s (eps - eps_ref), eps with the label in it.

    The prediction is affine in eps also where the network predicts v, and so is guidance: to mix the two
    passes of the network is to mix their guided predictions, as `Policy.guided_eps` does.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, offset: Tensor | None, scale: float) -> None:
        self.pipeline, self.unet, self.offset, self.scale = pipeline, pipeline.unet, offset, scale
        self.adapters = [part for part in self.unet.modules() if isinstance(part, BaseTunerLayer)]
        self.exits = ExitStack()

    def __enter__(self) -> None:
        if self.scale == 0.0:
            self.exits.enter_context(self._reference())
        elif self.scale != 1.0:
            hook = self.unet.register_forward_hook(self._mix, with_kwargs=True)
            self.exits.callback(hook.remove)
        # where diffusers adds a class embedding, had the model one
        hook = self.unet.time_embedding.register_forward_hook(self._add)
        self.exits.callback(hook.remove)

    def __exit__(self, *error: object) -> None:
        self.exits.close()

    def _add(self, module: nn.Module, inputs: Any, emb: Tensor) -> Tensor | None:
        if self.offset is None:
            return None
        rows = self.offset.to(emb.device, emb.dtype)
        if self.pipeline.do_classifier_free_guidance:  # the unconditional half has no label
            rows = torch.cat([torch.zeros_like(rows), rows])
        return emb + rows.repeat_interleave(len(emb) // len(rows), 0)

    def _mix(self, unet: Any, inputs: Any, options: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        with self._reference():
            reference = unet.forward(*inputs, **options)[0]  # not called: that would come here again
        return (reference + self.scale * (output[0] - reference),)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        offset, self.offset = self.offset, None
        on = [part for part in self.adapters if not part.disable_adapters]  # others stay as they are
        for part in on:
            part.enable_adapters(False)
        try:
            yield
        finally:
            for part in on:
                part.enable_adapters(True)
            self.offset = offset


def of_model(kind: type[Pipeline], model: str, revision: str | None = None) -> Pipeline:
    """Return a checkpoint, from where `load_parts` finds it, as a float32 pipeline that samples by DDIM."""
    parts = load_parts(model, revision)
    for network in (parts.unet, parts.vae, parts.text_encoder):
        network.float()
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    own = dict(parts.scheduler.config)
    pipeline = kind(**parts._asdict(), **nothing)
    pipeline.scheduler = make_scheduler(own)  # the constructor corrects a steps_offset that a run keeps
    return pipeline


def call_settings(env: SD15) -> dict[str, Any]:
    """Return how a run samples, as arguments of a stock pipeline's call."""
    return {
        "num_inference_steps": env.num_steps,
        "guidance_scale": env.guidance_scale,
        "eta": env.eta,
        "height": env.image_size,
        "width": env.image_size,
    }


def of_pictures(folder: Path, env: Any) -> SD15:
    """Return the env of the run in a folder, whose model has to draw pictures."""
    if not isinstance(env, SD15):
        raise DiffRLError(f"{folder}: its model draws points, not pictures; there is no pipeline for it.")
    return env
