"""What all algorithms share: how a batch is dealt into minibatches, and how an update is made small."""

import pytest
import torch
from conftest import assert_close

from diffrl.algorithms.base import dealt, resized
from diffrl.algorithms.ctrl import CTRL
from diffrl.algorithms.ddpo import DDPO


@pytest.mark.parametrize(("count", "number"), [(24, 4), (23, 4), (5, 1), (3, 3)])
def test_every_item_is_dealt_once_and_hands_differ_by_one_at_most(count, number):
    hands = dealt(torch.arange(count) + 100, number)
    assert len(hands) == number
    assert sorted(torch.cat(hands).tolist()) == list(range(100, 100 + count))
    sizes = [len(hand) for hand in hands]
    assert max(sizes) - min(sizes) <= 1


def test_of_every_neighbourhood_each_minibatch_has_one():
    """A process that holds 8 of 24 neighbouring pictures has 2 of them in each of 4 minibatches."""
    for hand in dealt(torch.arange(24), 4):
        assert [int(((hand >= start) & (hand < start + 8)).sum()) for start in (0, 8, 16)] == [2, 2, 2]


def test_an_item_is_in_any_minibatch_with_the_same_chance_and_not_by_its_neighbours():
    torch.manual_seed(0)
    places = torch.stack([torch.cat(dealt(torch.arange(6), 3)).argsort() // 2 for _ in range(6000)])
    for item in range(6):
        shares = torch.bincount(places[:, item], minlength=3) / len(places)
        assert_close(shares, torch.full((3,), 1 / 3), atol=0.025)  # 4 standard errors
    first_in_0, fourth_in_0 = places[:, 0] == 0, places[:, 3] == 0
    assert_close((first_in_0 & fourth_in_0).float().mean(), 1 / 9, atol=0.017)


def test_a_resized_update_is_one_micro_batch_and_all_else_stays():
    algo = DDPO(batch_size=64, micro_batch_size=32, group_size=16, minibatches=4, inner_epochs=3, kl=0.5)
    small = resized(algo, 8)
    assert small == DDPO(batch_size=8, micro_batch_size=8, minibatches=1, inner_epochs=3, kl=0.5)
    assert resized(algo, 8, inner_epochs=1).inner_epochs == 1
    # of settings that it lacks, none is given to it
    pathwise = resized(CTRL(batch_size=32, micro_batch_size=16), 8, inner_epochs=1)
    assert pathwise == CTRL(batch_size=8, micro_batch_size=8)
