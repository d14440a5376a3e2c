import pytest
import torch
from conftest import assert_close
from tiny_clip import pictures, stock_embeddings, write_clip
from torch.nn import functional as F

from diffrl.rewards.clip import load_clip
from diffrl.rewards.clip_score import ClipScore
from diffrl.types import Context


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def context(*prompts):
    return Context(prompts, torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 0))


def test_it_is_a_hundred_times_the_cosine_of_each_picture_and_its_prompt(clip):
    images, model = pictures(3), load_clip(clip)
    words = F.normalize(model.embed_prompts(["cat", "dog"]), dim=1)
    seen = F.normalize(stock_embeddings(clip, images), dim=1)
    expected = [float(100 * seen[n] @ words[word]) for n, word in enumerate([1, 0, 1])]
    value = ClipScore(clip)(images, context("dog", "cat", "dog"))
    assert value.std() > 0.5
    assert_close(value, expected, atol=0.3)


def test_its_gradient_reaches_every_picture(clip):
    images = pictures(2).requires_grad_(True)
    ClipScore(clip)(images, context("cat", "dog")).sum().backward()
    assert images.grad.flatten(1).norm(dim=1).min() > 1e-3
