"""The parts of the benchmark commands that can be wrong without anyone noticing."""

import torch
from conftest import assert_close

from diffrl.benchmarks import emoji_data


def test_an_aliased_glyph_answers_to_a_second_name():
    names = ["cat", "ewe", "chipmunk", "honeybee", "dog"]
    # ewe, chipmunk, honeybee are also the 6th, 7th and 8th captions: sheep, squirrel, bee
    assert_close(emoji_data.second_names(names), torch.tensor([0, 5, 6, 7, 4]), atol=0)
    assert [*names, *emoji_data.ALIASES.values()][5:] == ["sheep", "squirrel", "bee"]
