"""The best evaluation, when to stop, when to warn: hand-laid tables, then runs."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from test_cli import fails

from diffrl import checkpoint, config, guards
from diffrl.algorithms.ddpo import DDPO
from diffrl.cli import main
from diffrl.conflicts import check_new
from diffrl.errors import DiffRLError
from diffrl.guards import Guards, suspicions

PRETRAINED = {
    "eval/reward_mean": -6.6,
    "eval/reward_std": 8.0,
    "eval/n": 64,
    "eval/prompt_fidelity": 0.96,
    "eval/diversity": 0.2,
    "eval/clip_score": 30.0,
    "eval/edge_density": 0.1,
    "eval/saturation": 0.3,
    "eval/brightness": 0.8,
    "eval/colour_entropy": 4.0,
}

TINY = [
    "env.num_steps=2",
    "env.guidance_scale=1",
    "algo.updates=2",
    "algo.batch_size=4",
    "algo.micro_batch_size=4",
    "eval_every=1",
    "eval_pictures=2",
]


def after(**changes):
    """Return measures like the pretrained model's, but for a reward that rose surely, and `changes`."""
    found = {f"eval/{name}": value for name, value in ({"reward_mean": -0.2} | changes).items()}
    return PRETRAINED | found


def judged(metric, values, patience=None):
    """Return guards that saw a metric take these values at updates 0, 10, 20, ..."""
    memory = Guards(metric, patience, "")
    for number, value in enumerate(values):
        memory.judge(10 * number, {metric: value})
    return memory


class TestBest:
    @pytest.mark.parametrize(
        ("metric", "values", "best", "update", "stale"),
        [
            ("eval/accuracy", [0.2, 0.5, 0.4, 0.3], 0.5, 10, 2),
            ("eval/accuracy", [0.2, 0.5, 0.5], 0.5, 10, 1),  # as good is not better
            ("eval/size/accuracy", [0.2, 0.1, 0.6], 0.6, 20, 0),
            ("eval/kl_nats", [3.0, 1.0, 2.0], 1.0, 10, 1),  # lower is better
            ("exact/gap_nats", [3.0, 4.0], 3.0, 0, 1),
            ("eval/accuracy", [math.nan, 0.1, math.nan], 0.1, 10, 1),
        ],
    )
    def test_by_hand(self, metric, values, best, update, stale):
        memory = judged(metric, values)
        assert (memory.best, memory.best_update, memory.stale) == (best, update, stale)

    def test_patience_counts_evaluations_since_the_best(self):
        values = [0.2, 0.5, 0.4, 0.3]
        assert [judged("eval/accuracy", values[:n], patience=2).exhausted for n in range(1, 5)] == [
            False, False, False, True,
        ]  # fmt: skip
        assert not judged("eval/accuracy", [0.5] * 100).exhausted

    def test_a_metric_that_is_not_measured_is_named(self):
        with pytest.raises(
            DiffRLError, match=r"keep_best=eval/fidelity.*Did you mean 'eval/prompt_fidelity'"
        ):
            Guards("eval/fidelity", None, "").judge(0, PRETRAINED)
        with pytest.raises(
            DiffRLError, match="keep_best=eval/kl_nats: it has no value with these settings"
        ):
            Guards("eval/kl_nats", None, "").judge(0, {"eval/kl_nats": None})
        guards = Guards("exact/gap_nats", 1, "")
        guards.judge(0, {"exact/gap_nats": 1.0})
        guards.judge(1, {"exact/gap_nats": None})  # off the grid
        assert guards.exhausted
        assert guards.best_update == 0
        missing = PRETRAINED | {"eval/clip_score": "not available: give clip=PATH"}
        with pytest.raises(DiffRLError, match="keep_best=eval/clip_score: not available: give clip=PATH"):
            Guards("eval/clip_score", None, "").judge(0, missing)


class TestSuspicions:
    def test_none_while_all_stays_as_it_was(self):
        assert suspicions(PRETRAINED, after()) == {}

    @pytest.mark.parametrize(
        ("name", "inside", "outside", "words"),
        [
            ("prompt_fidelity", 0.73, 0.71, "prompt fidelity fell from 0.96 to 0.71"),  # 3/4 of .96 is .72
            ("diversity", 0.11, 0.09, "diversity fell from 0.2 to 0.09"),
            ("clip_score", 25.6, 25.4, "CLIPScore fell from 30 to 25.4"),  # .85 x 30 = 25.5
            ("edge_density", 0.19, 0.31, "edge density is 3.1 times the pretrained model's"),
            ("edge_density", 0.051, 0.049, "edge density is 0.49 times the pretrained model's"),
            ("brightness", 0.41, 0.39, "brightness is 0.49 times the pretrained model's"),
            ("saturation", 0.59, 0.66, "saturation is 2.2 times the pretrained model's"),
            ("colour_entropy", 7.9, 8.4, "colour entropy is 2.1 times the pretrained model's"),
        ],
    )
    def test_each_bound_by_hand(self, name, inside, outside, words):
        assert suspicions(PRETRAINED, after(**{name: inside})) == {}
        assert suspicions(PRETRAINED, after(**{name: outside})) == {name: words}

    @pytest.mark.parametrize(
        ("first", "now", "suspect"),
        [
            ((0.30, 0.25), (0.60, 0.36), False),  # .24 more than true, .05 of it from the beginning
            ((0.30, 0.25), (0.60, 0.34), True),  # .26 and .05
            ((0.20, 0.30), (0.60, 0.45), False),  # that it was too modest at first does not count
            ((0.20, 0.30), (0.60, 0.35), True),
            ((0.30, 0.40), (0.50, 0.20), True),  # the true accuracy falls while the claimed one rises
        ],
    )
    def test_a_classifier_may_not_claim_what_the_true_measure_does_not_find(self, first, now, suspect):
        before, later = (
            {"eval/claimed_accuracy": claimed, "eval/accuracy": true} for claimed, true in (first, now)
        )
        found = suspicions(PRETRAINED | before, after() | later)
        words = f"the classifier claims {now[0]:.2f} of the labels and the true measure finds {now[1]:.2f}"
        assert found == ({"claimed_accuracy": words} if suspect else {})

    @pytest.mark.parametrize(("claimed", "suspect"), [(-2.7, False), (-2.5, True)])
    def test_a_surrogate_may_not_claim_more_than_the_truth_though_that_did_not_rise(self, claimed, suspect):
        """Half a standard deviation of the pretrained model's rewards, 4, above the true mean, -6.6."""
        found = suspicions(PRETRAINED, PRETRAINED | {"eval/claimed_reward": claimed})
        words = f"the surrogate claims {claimed:.3g} and the true reward is -6.6"
        assert found == ({"claimed_reward": words} if suspect else {})
        sparse = {"eval/reward_mean": 0.0, "eval/reward_std": 0.0, "eval/n": 64}
        assert suspicions(sparse, sparse | {"eval/claimed_reward": 0.1}) == {}  # no scale to go by

    @pytest.mark.parametrize(("rise", "sure"), [(2.8, False), (2.9, True), (-5.0, False)])
    def test_the_reward_has_to_rise_by_more_than_its_noise(self, rise, sure):
        """Two errors of a difference: 2 sqrt(8^2 / 64 + 8^2 / 64) = 2.83."""
        found = suspicions(PRETRAINED, after(reward_mean=-6.6 + rise, prompt_fidelity=0.2))
        assert bool(found) == sure

    def test_what_was_not_measured_is_not_suspected(self):
        few = {name: PRETRAINED[name] for name in ("eval/reward_mean", "eval/reward_std", "eval/n")}
        assert suspicions(few, after(prompt_fidelity=0.1)) == {}
        assert suspicions({"exact/tv": 0.1}, {"exact/tv": 0.9}) == {}
        assert suspicions(PRETRAINED | {"eval/saturation": 0.0}, after(saturation=0.5)) == {}  # grey before


def test_a_warning_is_new_once_a_crossing():
    memory = Guards(None, None, "Lower algo.gamma.")
    hacked = after(prompt_fidelity=0.25, edge_density=0.31)
    words = (
        "reward went from -6.6 to -0.2, but prompt fidelity fell from 0.96 to 0.25 and edge density is 3.1 "
        "times the pretrained model's: this looks like reward hacking. Lower algo.gamma."
    )
    assert memory.judge(0, PRETRAINED) == ("", False)
    assert memory.judge(10, hacked) == (words, True)
    assert memory.judge(20, hacked) == (words, False)
    resumed = Guards(None, None, "Lower algo.gamma.")
    resumed.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert resumed.judge(30, hacked) == (words, False)
    assert resumed.judge(40, hacked | {"eval/diversity": 0.01})[1]
    assert resumed.judge(50, after()) == ("", False)
    assert resumed.judge(60, hacked) == (words, True)


class TestRuns:
    @pytest.fixture
    def words(self, tmp_path, hasty):
        short = ["env.num_steps=4", "algo.updates=12", "algo.batch_size=16", "algo.micro_batch_size=8"]
        return ["train", "env=gaussian_mixture", *short, f"root={tmp_path}", "name=run", "eval_every=2"]

    def test_the_best_is_kept_and_without_a_better_one_the_run_ends(self, words, tmp_path, capsys):
        """The KL is 0 before the first update, and never again: best at once, no better after 2 and 4."""
        assert main([*words, "keep_best=exact/kl_nats", "patience=2", "keep_last=1"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "no better for 2 evaluations, ended; weights of update 0, exact/kl_nats 0; done in" in said
        run = tmp_path / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = [(line["update"], line["exact/kl_nats"]) for line in lines if "exact/kl_nats" in line]
        assert [update for update, _ in measured] == [0, 2, 4, 4]  # the last one is of what is kept
        assert measured[0][1] == measured[3][1] == 0 < min(kl for _, kl in measured[1:3])
        assert lines[-1]["guard/best_update"] == 0
        steps = [checkpoint.step_of(folder) for folder in checkpoint.newest_first(run / "checkpoints")]
        assert steps == [4, 0]
        assert main(["eval", str(run), "guidance=svdd"]) == 0  # which has no exact metric
        capsys.readouterr()
        assert main(["eval", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["exact/kl_nats"] == 0
        before = (run / "metrics.jsonl").read_bytes()
        assert main(["train", "--resume", str(run)]) == 0
        assert "finished already, 4 updates" in " ".join(capsys.readouterr().out.split())
        assert (run / "metrics.jsonl").read_bytes() == before

    def test_a_warning_is_printed_once_and_recorded_each_time(
        self, tiny_path, tmp_path, monkeypatch, capsys
    ):
        found = {"edge_density": "edge density is 3 times the pretrained model's"}
        monkeypatch.setattr(guards, "suspicions", lambda first, now: {} if first == now else found)
        words = [*TINY, f"env.model={tiny_path}", f"root={tmp_path}", "name=run"]
        assert main(["train", "algo=ddpo", "reward=jpeg", *words]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("edge density is 3 times the pretrained model's: this looks like reward") == 1
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        warned = {line["update"]: line.get("guard/warning", "") for line in lines if "eval/n" in line}
        assert [update for update, words in warned.items() if words] == [1, 2]
        assert warned[2].startswith("reward went from -")
        assert warned[2].endswith(f": this looks like reward hacking. {DDPO.restraint}")

    def test_mistakes_are_named(self, words, tmp_path, capsys):
        assert "patience=2 keep_best=null: better by what?" in fails(capsys, *words, "patience=2")
        assert "patience=0: must be 1 or more" in fails(capsys, *words, "patience=0", "keep_best=exact/tv")
        line = fails(capsys, *words, "keep_best=exact/gap")
        assert "keep_best=exact/gap: no such keep_best. Did you mean 'exact/gap_nats'?" in line
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("words", "metric", "instead"),
        [
            (["reward=jpeg"], "eval/reward_mean", "eval/accuracy"),  # a black box has no labels
            ([], "eval/compressibility/accuracy", "eval/nfe_per_image"),  # no number of calls is the best
            ([], "eval/diversity", "exact/tv"),
            (["env=gaussian_mixture"], "exact/log_prob", "sampled/log_prob"),
            (["env=gaussian_mixture", "guidance=smc"], "sampled/log_prob", "exact/log_prob"),
        ],
    )
    def test_what_no_evaluation_has_is_refused_before_anything_is_loaded(self, words, metric, instead):
        words = ["algo=ddpo", *words]
        check_new(config.load([*words, f"keep_best={metric}"]))
        with pytest.raises(DiffRLError, match=f"keep_best={instead}: no such keep_best"):
            check_new(config.load([*words, f"keep_best={instead}"]))

    def test_a_metric_that_something_is_missing_for_is_refused_with_the_remedy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "brisque", None)
        with pytest.raises(
            DiffRLError, match=r"keep_best=eval/brisque: .*pip install 'diffrl\[metrics\]'\."
        ):
            check_new(config.load(["keep_best=eval/brisque"]))
        with pytest.raises(DiffRLError, match=r"keep_best=eval/clip_score: .* as clip=PATH\."):
            check_new(config.load(["keep_best=eval/clip_score"]))
        check_new(config.load(["keep_best=eval/clip_score", "clip=folder"]))
        with pytest.raises(
            DiffRLError, match=r"keep_best=eval/prompt_fidelity env\.model=some/id: no judge"
        ):
            check_new(config.load(["env=sd15", "env.model=some/id", "keep_best=eval/prompt_fidelity"]))
        check_new(config.load(["keep_best=eval/prompt_fidelity"]))
        monkeypatch.setitem(sys.modules, "brisque", SimpleNamespace())
        check_new(config.load(["keep_best=eval/brisque"]))

    def test_the_last_weights_are_judged_as_those_before_and_the_best_ones_measured_once_more(
        self, words, tmp_path
    ):
        """The log density rises all the way: the last weights are the best, judged and then measured."""
        assert main([*words, "keep_best=exact/log_prob"]) == 0
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        found = [line for line in map(json.loads, text.splitlines()) if "exact/log_prob" in line]
        best = max(found, key=lambda line: line["exact/log_prob"])
        assert [line["update"] for line in found] == [0, 2, 4, 6, 8, 10, 12, 12]
        assert found[-1]["exact/log_prob"] == best["exact/log_prob"]
        assert found[-1]["guard/best_update"] == best["update"]
