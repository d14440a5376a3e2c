"""The parts of the benchmark commands that can be wrong without anyone noticing."""

import torch
from conftest import assert_close

from diffrl.benchmarks import emoji_data, solvable


def test_the_solvable_table_shows_the_worst_seed_beside_the_mean():
    def run(seed, gap, tv, log_p):
        return {
            "row": "ctrl, gamma 1",
            "seed": seed,
            "seconds": 10.0,
            "exact/gap_nats": gap,
            "exact/tv": tv,
            "exact/log_prob_per_label": log_p,
        }

    table = solvable.summarise([run(0, 0.01, 0.02, [-1.0, -2.0]), run(1, 0.03, 0.01, [-3.0, -2.5])])
    assert table.splitlines()[2:] == [
        "| ctrl, gamma 1 | 0.0300 | 0.0200 | 0.0200 | 0.0150 | -2.000, -2.250 | 10 |"
    ]


def test_an_aliased_glyph_answers_to_a_second_name():
    names = ["cat", "ewe", "chipmunk", "honeybee", "dog"]
    # ewe, chipmunk, honeybee are also the 6th, 7th and 8th captions: sheep, squirrel, bee
    assert_close(emoji_data.second_names(names), torch.tensor([0, 5, 6, 7, 4]), atol=0)
    assert [*names, *emoji_data.ALIASES.values()][5:] == ["sheep", "squirrel", "bee"]
