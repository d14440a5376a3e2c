"""Altered copies: what they are, who learns from them, and that it helps where a policy may lead."""

import pytest
import torch
from conftest import assert_close
from test_datasets import files, noise, table
from test_rewards import pictures
from torch.nn import functional as F

from diffrl.errors import DiffRLError
from diffrl.rewards import copies, fit
from diffrl.rewards.compressibility import Compressibility
from diffrl.rewards.copies import altered
from diffrl.rewards.fit import fit_attribute
from diffrl.rewards.multitask import Multitask

EDGES = [1.0, 1.3, 1.5]


def fitted(images, **settings):
    settings = {"features": "dct", "seed": 0, "from_pretrained": True} | settings
    return fit_attribute("compressibility", images, EDGES, 4, **settings)


def generator():
    return torch.Generator().manual_seed(0)


def test_at_a_factor_of_one_channels_are_shuffled_and_nothing_else(monkeypatch):
    monkeypatch.setattr(copies, "_FACTOR", (1.0, 1.0))
    images = torch.rand(40, 3, 4, 4, generator=generator())
    shuffled = altered(images, generator())
    assert_close(shuffled.sort(1).values, images.sort(1).values, atol=1e-6)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):  # of forty, each order takes some
        assert torch.isclose(shuffled, images[:, order], atol=1e-6).flatten(1).all(1).any()


def test_at_a_factor_of_a_half_colours_are_half_as_far_from_grey_and_greys_from_the_mean(monkeypatch):
    monkeypatch.setattr(copies, "_FACTOR", (0.5, 0.5))
    images = torch.rand(5, 3, 4, 4, generator=generator())
    grey, mean = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    expected = mean + (grey - mean) / 2 + (images - grey) / 4
    assert_close(altered(images, generator()).sort(1).values, expected.sort(1).values, atol=1e-6)


def test_they_are_pictures_and_differ_each_time():
    images = torch.rand(20, 3, 8, 8, generator=generator())
    draws = generator()
    one, other = altered(images, draws), altered(images, draws)
    assert 0 <= one.min() <= one.max() <= 1
    assert (one != other).flatten(1).any(1).all()
    assert torch.equal(one, altered(images, generator()))


def test_pictures_unlike_the_data_set_are_told_better_and_the_held_out_ones_stay_the_same():
    unlike = altered(pictures(200, seed=1), generator())
    alone, helped = fitted(pictures()), fitted(pictures(), copies=5)
    nll = [float(F.nll_loss(each.classifier(unlike), each.true_class(unlike))) for each in (alone, helped)]
    assert nll[1] < 0.7 * nll[0]
    for count in ("num_train", "num_held_out", "class_counts"):
        assert getattr(helped.report, count) == getattr(alone.report, count)
    assert helped.pretrained_log_prob.shape == alone.pretrained_log_prob.shape


def test_of_held_out_pictures_there_are_none(monkeypatch):
    images, seen = pictures(), []
    monkeypatch.setattr(fit, "altered", lambda batch, _: seen.append(batch) or batch)
    fitted(images, copies=3)
    seen = torch.cat(seen)
    times = (seen[None] == images[:, None]).flatten(2).all(2).sum(1)
    assert times.bincount().tolist() == [24, 0, 0, 96]  # a fifth is held out


@pytest.mark.parametrize(("column", "cells"), [("label", [0, 1, 2, 3]), ("score", [0.9, 1.1, 1.4, 2.0])])
def test_what_a_data_set_says_itself_is_not_said_of_altered_pictures(tmp_path, column, cells):
    noise(tmp_path / "d")
    table(tmp_path / "d", column, cells * 15)
    with pytest.raises(DiffRLError, match=r"reward.copies=2: the data set has its own compressibility"):
        fitted(files(tmp_path / "d", num_classes=(4,)), from_pretrained=False, copies=2)


def test_settings_that_make_no_sense_are_refused():
    for reward in (Compressibility, Multitask):
        with pytest.raises(DiffRLError, match=r"reward.copies=-1: must be 0 or more"):
            reward(copies=-1)
    with pytest.raises(DiffRLError, match=r"these features learn; take reward.features=dct"):
        Compressibility(copies=1, features="cnn")
