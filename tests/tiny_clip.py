"""A random CLIP model of a thousand weights or so, and the weights that stand on one."""

from itertools import pairwise

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from diffrl.benchmarks.pretrain_emoji import make_tokenizer

WIDTH, SIDE = 8, 16  # of its embeddings, of its pictures


def write_clip(folder, seed=3):
    """Write the model in its own layout, and return the folder as it is given on the command line."""
    tokenizer = make_tokenizer(["cat", "dog"])
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = tokenizer.eos_token_id
    text = CLIPTextConfig(
        **size, vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=end,
        bos_token_id=end - 1, pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(**size, image_size=SIDE, patch_size=8)
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    )
    for name, weight in model.named_parameters():
        if "embedding" in name:  # as they are made, pictures and words would hardly differ
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sides).save_pretrained(folder)
    return str(folder)


def head(outputs, seed=0):
    """Return LAION's head at a small width: five linear layers with dropout between them."""
    torch.manual_seed(seed)
    sizes = (WIDTH, 12, 10, 6, 5, outputs)
    linears = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    return torch.nn.Sequential(
        linears[0], torch.nn.Dropout(), linears[1], torch.nn.Dropout(), linears[2], torch.nn.Dropout(),
        linears[3], linears[4],
    ).eval()  # fmt: skip


def head_state(network):
    """Return the state dict under its published names, `layers.{0,2,4,6,7}.*`."""
    return {f"layers.{name}": tensor for name, tensor in network.state_dict().items()}


def pictures(count=3, side=40, seed=0):
    """In steps of 8 bits, smooth enough for resizing to be much the same by any good filter."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)).round() / 255


def stock_embeddings(clip, images):
    """Return CLIP's embeddings by the library's own preprocessing of 8-bit pictures."""
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    pixels = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images]
    tensors = processor(images=pixels, return_tensors="pt").pixel_values
    return model.visual_projection(model.vision_model(pixel_values=tensors).pooler_output).detach()
