"""A page in the browser: the same noise drawn by the pretrained model and, under a label, by a run.

Shapes: A attributes of a label, pictures `[N, 3, S, S]`.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffrl.algorithms.guidance.base import Unguided
from diffrl.draw import draw
from diffrl.errors import DiffRLError
from diffrl.evaluate import label_name, measures_of
from diffrl.pipeline import of_pictures
from diffrl.restore import restore, settings_of
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.types import NO_LABEL, check_range, to_pixels

Captioned = list[tuple[Image.Image, str]]

_STRONGEST = 3.0  # chosen: at twice what was trained, pictures of the emoji model begin to break
_LEAST_SIDE = 256  # pixels: smaller pictures are enlarged, their pixels kept square
_REMEMBERED = 16  # prompts and seeds whose pretrained pictures are kept
_STYLE = """
.gradio-container {max-width: 1180px !important; margin: auto}
footer {display: none !important}
.thumbnail-item .caption-label {
  right: 4px; bottom: 4px; padding: 0 6px; font-size: 12px; font-variant-numeric: tabular-nums; opacity: .85
}
"""


class Easel:
    """A run, ready to draw beside its pretrained model.

    Args:
        run: the folder of a run, or of `diffrl export`.
        num_pictures: of each.
    """

    def __init__(self, run: Path, num_pictures: int) -> None:
        if num_pictures < 1:
            raise DiffRLError(f"-n {num_pictures}: must be 1 or more.")
        of_pictures(run, settings_of(run).env)
        self.name = run.resolve().name
        self.setup, self.policy, self.reward = restore(run, {"guidance": Unguided()})
        self.actor = self.setup.guide(self.policy, self.reward, num_pictures)
        self._one_at_a_time = Lock()  # one env and one strength, whoever looks at the page
        self.pretrained = lru_cache(_REMEMBERED)(self._pretrained)

    @property
    def choices(self) -> list[tuple[str, list[str]]]:
        """What can be asked for: of each attribute its title, and what each class means."""
        if isinstance(self.reward, LogLikelihood) and not self.reward.joint:
            return [
                (attribute.measure.title, attribute.measure.bounds(attribute.edges))
                for attribute in self.reward.attributes
            ]
        counts = self.reward.num_classes  # by number: of a joint label, or of somebody's own reward
        titles = ["label"] if len(counts) == 1 else [f"attribute {place}" for place in range(len(counts))]
        return [(title, list(map(str, range(count)))) for title, count in zip(titles, counts, strict=True)]

    def draw(
        self, prompt: str, label: Sequence[int], scale: float, seed: int
    ) -> tuple[Captioned, Captioned]:
        """Return pictures of the pretrained model and of the run from the same noise, with their measures.

        Args:
            prompt: what to draw.
            label: a class of each attribute, or NO_LABEL.
            scale: strength of the control, 0 or more; 0 is the pretrained model.
            seed: of the noise; with the same one, 'diffrl sample' draws the same.
        """
        wanted = torch.tensor(list(label), dtype=torch.int64)
        check_range(wanted[None], self.reward.num_classes)
        with self._one_at_a_time:
            return self.pretrained(prompt, seed), self._captioned(prompt, wanted, scale, seed)

    def _pretrained(self, prompt: str, seed: int) -> Captioned:
        no_label = torch.full((len(self.reward.num_classes),), NO_LABEL)
        return self._captioned(prompt, no_label, 0.0, seed)

    def _captioned(self, prompt: str, label: Tensor, scale: float, seed: int) -> Captioned:
        self.policy.control_scale = scale
        images = draw(self.actor, prompt, label, seed)
        captions = [
            [f"{value:.2f} {measure.unit or measure.title}" for value in measure.of(images).tolist()]
            for measure in measures_of(self.reward)
        ]
        if isinstance(self.reward, LogLikelihood):
            captions.append([f"label {label_name(true)}" for true in self.reward.true_class(images)])
        zoom = max(1, _LEAST_SIDE // images.shape[-1])
        pictures = [Image.fromarray(pixels) for pixels in to_pixels(images)]
        size = (zoom * pictures[0].width, zoom * pictures[0].height)
        enlarged = [picture.resize(size, Image.Resampling.NEAREST) for picture in pictures]
        return [(picture, ", ".join(words)) for picture, *words in zip(enlarged, *captions, strict=True)]


def page(easel: Easel) -> Any:
    """Return the page, a `gradio.Blocks`."""
    import gradio as gr

    def drawn(prompt: str, scale: float, seed: float, *label: int) -> tuple[Captioned, Captioned, str]:
        pretrained, own = easel.draw(prompt, label, scale, int(seed))
        asked = f" --label {','.join(map(str, label))}" if any(y != NO_LABEL for y in label) else ""
        command = f"diffrl sample RUN --prompt {prompt!r}{asked} --control-scale {scale:g} --seed {seed:g}"
        return pretrained, own, f"`{command} -n {len(own)}`"

    config = easel.setup.config.env
    with gr.Blocks(title=f"diffrl: {easel.name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# {easel.name}\nThe same noise, drawn by the pretrained model and by this run "
            f"({config.num_steps} steps). On each picture: what is measured on it."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                prompt = gr.Textbox(easel.setup.eval_prompts[0], label="Prompt", elem_id="prompt")
                labels = [
                    gr.Radio(
                        [
                            ("no label", NO_LABEL),
                            *((f"{y}: {words}", y) for y, words in enumerate(classes)),
                        ],
                        value=len(classes) - 1,
                        label=title,
                    )
                    for title, classes in easel.choices
                ]
                scale = gr.Slider(0, _STRONGEST, 1.0, step=0.1, label="Strength")
                seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
                with gr.Row():
                    other = gr.Button("Other noise", min_width=90)
                    button = gr.Button("Draw", variant="primary", min_width=90)
            with gr.Column(scale=6), gr.Row():
                galleries = []
                for name, words in {"pretrained": "Pretrained model", "run": "This run"}.items():
                    with gr.Column(min_width=280):
                        gr.Markdown(f"### {words}")
                        shown = {"show_label": False, "buttons": ["fullscreen"], "height": "auto"}
                        galleries.append(gr.Gallery(elem_id=name, columns=2, container=False, **shown))
        said = gr.Markdown()
        other.click(lambda now: now + 1, seed, seed)
        gr.on(
            [blocks.load, button.click, prompt.submit, seed.change, scale.release]
            + [radio.change for radio in labels],
            drawn,
            [prompt, scale, seed, *labels],
            [*galleries, said],
            trigger_mode="always_last",
        )
    return blocks


def launch(blocks: Any, port: int | None) -> str:
    """Serve the page on this machine, in a thread, and return its address.

    Raises:
        DiffRLError: the port is taken.
    """
    import gradio as gr

    plain = ["system-ui", "sans-serif"]  # a web font would be fetched from outside
    theme = gr.themes.Soft(font=plain, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = blocks.launch(
            server_port=port, theme=theme, css=_STYLE, prevent_thread_lock=True, quiet=True, ssr_mode=False
        )
    except OSError as error:
        raise DiffRLError(
            f"--port {port}: it is taken. Give another, or none for one that is free."
        ) from error
    return str(address)
