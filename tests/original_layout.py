"""The names that Stable Diffusion's original code gives to the weights, for files in its layout."""

import re

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_layout(unet, vae, text_encoder, *, open_clip=False) -> dict[str, Tensor]:
    """Return the weights of diffusers' three networks under the names of the original code."""
    layers = unet.config.layers_per_block
    levels = len(vae.config.block_out_channels)
    weights = unet.state_dict()
    named = {
        "model.diffusion_model." + _unet_name(name, layers, weights): tensor
        for name, tensor in weights.items()
    }
    for name, tensor in vae.state_dict().items():
        new = "first_stage_model." + _vae_name(name, levels)
        # its attention was a convolution
        square = ".attn_1." in new and tensor.dim() == 2
        named[new] = tensor[:, :, None, None].clone() if square else tensor
    text = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    if open_clip:
        return named | _open_clip(text)
    return named | {f"cond_stage_model.transformer.text_model.{name}": text[name] for name in text}


def _unet_name(name: str, layers: int, all_names) -> str:
    ends = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    ends |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    stem, _, kind = name.rpartition(".")
    if stem in ends:
        return f"{ends[stem]}.{kind}"
    if name.startswith("mid_block."):
        _, sort, number, rest = name.split(".", 3)
        place = 1 if sort == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(sort, rest)}"
    side, block, sort, number, rest = name.split(".", 4)
    first = int(block) * (layers + 1)
    if sort == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{kind}"
    if sort == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in all_names)
        return f"output_blocks.{first + layers}.{2 if attends else 1}.conv.{kind}"
    shift, side = (1, "input_blocks") if side == "down_blocks" else (0, "output_blocks")
    return f"{side}.{first + shift + int(number)}.{int(sort == 'attentions')}.{_inner(sort, rest)}"


def _inner(sort: str, rest: str) -> str:
    stem, _, kind = rest.rpartition(".")
    return f"{_RESNET[stem]}.{kind}" if sort == "resnets" else rest


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = name.replace(".upsamplers.0.", ".upsample.")
    name = re.sub(r"(up\.\d+)\.resnets", r"\1.block", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in _VAE_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
    }
    for name, tensor in text.items():
        if not name.startswith("encoder.layers."):
            continue
        number, rest = name.removeprefix("encoder.layers.").split(".", 1)
        place = f"transformer.resblocks.{number}"
        stem, _, kind = rest.rpartition(".")
        if stem in _OPEN_CLIP:
            named[f"{place}.{_OPEN_CLIP[stem]}.{kind}"] = tensor
        elif stem == "self_attn.q_proj":  # one matrix of all three
            three = [text[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            named[f"{place}.attn.in_proj_{kind}"] = torch.cat(three)
    width = len(named["ln_final.weight"])
    named["text_projection"] = torch.zeros(width, width, device=named["ln_final.weight"].device)
    return {"cond_stage_model.model." + name: tensor for name, tensor in named.items()}
