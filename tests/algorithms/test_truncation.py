"""Which steps each kind of truncation keeps, and how often."""

import pytest
import torch
from conftest import assert_close

from diffrl.algorithms.truncation import Truncation
from diffrl.errors import DiffRLError


class TestTruncation:
    def count(self, truncation, steps=10, draws=4000):
        generator = torch.Generator().manual_seed(0)
        kept = torch.tensor([truncation.kept(steps, generator) for _ in range(draws)], dtype=torch.double)
        return kept

    def test_uniform_per_trajectory_keeps_a_suffix_of_every_length(self):
        kept = self.count(Truncation(kind="uniform", draw="trajectory"))
        assert (kept.diff(dim=1) >= 0).all()  # once kept, always kept
        # K uniform on 0..9, step i is kept with probability (i + 1) / 10
        assert_close(kept.mean(0), (torch.arange(10) + 1) / 10, atol=0.03)

    def test_per_step_draws_keep_each_step_independently_as_ctrl_s_code_does(self):
        # K uniform on 0..10, both included: step i is kept with probability (i + 1) / 11
        kept = self.count(Truncation(kind="uniform", draw="step", low=0, high=10))
        assert_close(kept.mean(0), (torch.arange(10) + 1) / 11, atol=0.03)
        covariance = torch.cov(kept.T)
        assert_close(covariance - covariance.diag().diag(), torch.zeros(10, 10), atol=0.03)

    def test_fixed_cuts_the_first_low_steps(self):
        kept = Truncation(kind="fixed", low=7).kept(10, torch.Generator())
        assert kept == [False] * 7 + [True] * 3
        assert Truncation(kind="fixed", low=7).chances(10) == kept

    def test_last_keeps_so_many_last_steps(self):
        last = Truncation(kind="last", count=3)
        assert last.kept(10, torch.Generator()) == last.chances(10) == [False] * 7 + [True] * 3

    def test_gaussian_cuts_follow_alignprop_s_law_within_bounds(self):
        # K is round(N(42, 5^2)) given 1 <= K <= 49; its mean by the same law on a fine grid
        kept = self.count(Truncation(kind="gaussian", low=1), steps=50)
        cuts = 50 - kept.sum(1)
        assert cuts.min() >= 1
        assert cuts.max() <= 49
        k = torch.arange(1, 50.0)
        share = torch.special.ndtr((k + 0.5 - 42) / 5) - torch.special.ndtr((k - 0.5 - 42) / 5)
        assert_close(cuts.mean(), (k * share).sum() / share.sum(), atol=0.2)

    def test_a_gaussian_that_never_falls_within_its_bounds_is_refused(self):
        with pytest.raises(DiffRLError, match="put the mean between"):
            Truncation(kind="gaussian").kept(10, torch.Generator())

    @pytest.mark.parametrize("kind", ["uniform", "gaussian"])
    def test_a_cut_past_the_last_step_is_refused(self, kind):
        with pytest.raises(DiffRLError, match=r"truncation.high=50: at most env.num_steps=20"):
            Truncation(kind=kind, high=50).kept(20, torch.Generator())

    def test_a_subset_keeps_so_many_steps_each_equally_often(self):
        kept = self.count(Truncation(kind="subset", count=2, low=1, high=5))
        assert (kept.sum(1) == 2).all()
        chances = Truncation(kind="subset", count=2, low=1, high=5).chances(10)
        assert chances == [0, 0.4, 0.4, 0.4, 0.4, 0.4, 0, 0, 0, 0]
        assert_close(kept.mean(0), chances, atol=0.03)
        assert Truncation(kind="subset", count=9).chances(5) == [1, 1, 1, 1, 0]

    def test_a_subset_comes_from_the_first_four_fifths_unless_told(self):
        assert_close(self.count(Truncation(kind="subset")).mean(0), [4 / 8] * 8 + [0] * 2, atol=0.03)
        assert Truncation(kind="subset").kept(1, torch.Generator()) == [True]

    @pytest.mark.parametrize(
        "settings",
        [
            {"kind": "gauss"},
            {"draw": "epoch"},
            {"low": -1},
            {"low": 3, "high": 2},
            {"count": 0},
            {"path": "x"},
        ],
    )
    def test_impossible_settings_are_refused(self, settings):
        with pytest.raises(DiffRLError, match=r"algo\.truncation"):
            Truncation(**settings)

    def test_cutting_every_step_is_refused(self):
        with pytest.raises(DiffRLError, match="all of the 10 steps"):
            Truncation(kind="fixed", low=10).kept(10, torch.Generator())
