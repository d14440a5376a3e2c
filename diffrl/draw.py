"""Pictures of one prompt under one label, from the noise that a stock diffusers pipeline would take.

Shapes: N envs, A attributes of a label, pictures `[N, 3, S, S]`.
"""

import torch
from torch import Tensor

from diffrl.algorithms.guidance.base import Guidance
from diffrl.rollout import rollout


def draw(actor: Guidance, prompt: str, label: Tensor, seed: int) -> Tensor:
    """Return pictures of `prompt` under `label` `[A]`, as many as the actor's env draws, in [0, 1].

    x_T and then the noise of each step come from one generator with this seed, in the order in which
    diffusers' pipelines draw them: `ControlledStableDiffusionPipeline` with `generator=` a generator of
    this seed, and `num_images_per_prompt=` N, draws the same pictures.
    """
    env = actor.env
    generator = torch.Generator(env.device).manual_seed(seed)
    shape = (env.num_envs, *env.backbone.latent_shape)
    options = {
        "latents": torch.randn(shape, generator=generator, device=env.device),
        "prompts": [prompt] * env.num_envs,
        "label": label.expand(env.num_envs, -1),
    }
    return rollout(env, actor, generator, options=options).images[actor.chosen(generator)]
