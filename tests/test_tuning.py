"""Trials: a suite's rows take the best of a few values, on prompts of their own."""

import json
import shutil

import pytest
import yaml
from small_suite import words, write
from test_cli import fails

from diffrl.benchmarks import compare, suites
from diffrl.cli import main
from diffrl.errors import DiffRLError


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A row tuned over three strengths of guidance, by how probable the label is in the end."""
    folder = tmp_path_factory.mktemp("tuned")
    path = write(
        folder,
        rows={"guided": ["algo=none", "guidance=reconstruction"], "plain": ["algo=none"]},
        columns={"log p": ["exact/log_prob", "sampled/log_prob"]},
        settings=["env=gaussian_mixture", "env.num_steps=20"],
        tune={"guided": {"guidance.scale": [0.0, 2.0, 0.5]}},
        tune_by="sampled/log_prob",
        tune_settings=["env.num_steps=10"],
        quick={"all": ["env.num_steps=5"], "guided": ["guidance.scale=0.1"]},
        seeds=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(folder / "cache"))
        main(words(path, "--jobs", "1"))
    return path


def test_the_best_value_of_the_trials_becomes_the_rows(tuned):
    stored = json.loads((tuned.parent / "cells" / "mine" / "mine.json").read_text())
    assert [trial["row"].split("=")[-1] for trial in stored["trials"]] == ["0.0", "2.0", "0.5"]
    scores = [trial["points"][-1]["sampled/log_prob"] for trial in stored["trials"]]
    assert max(scores) == scores[1]  # stronger guidance, more probable label
    guided, plain = stored["cells"]
    assert guided["words"][-2:] == ["guidance.scale=2.0", "seed=0"]
    assert plain["words"] == [*stored["settings"]["settings"], "algo=none", "seed=0"]
    for trial in stored["trials"]:
        assert trial["words"][-3:-1] == ["env.num_steps=10", f"seed={trial['seed']}"]
        assert trial["seed"] not in range(100)  # the cells', which it chooses for


def test_verify_refuses_a_cell_whose_words_mean_other_settings_now(tuned):
    stored = json.loads((tuned.parent / "cells" / "mine" / "mine.json").read_text())
    cell = stored["cells"][0]
    cell["settings"]["env.num_steps"] = 7
    with pytest.raises(DiffRLError, match=r"guided-seed0: .*env.num_steps was 7, and is 20 now"):
        compare.verify(suites.load(str(tuned)), tuned.parent / "cells" / "mine", [cell], 0)


def test_a_cell_whose_folder_is_gone_is_read_from_the_result(tuned, tmp_path):
    stored = json.loads((tuned.parent / "cells" / "mine" / "mine.json").read_text())
    kept = tmp_path / "plain-seed0"
    kept.mkdir()
    (kept / "cell.json").write_text(json.dumps(stored["cells"][1]))
    assert [cell["row"] for cell in compare.read(tmp_path, stored["cells"])] == ["plain", "guided"]


def test_a_trial_that_the_suite_no_longer_asks_for_is_kept_and_does_not_choose(
    tuned, tmp_path, monkeypatch
):
    monkeypatch.setenv("DIFFRL_CACHE", str(tuned.parent / "cache"))
    stored = yaml.safe_load(tuned.read_text())
    stored["tune"]["guided"]["guidance.scale"].remove(2.0)  # the best of the three
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(stored, sort_keys=False))
    shutil.copytree(tuned.parent / "cells", tmp_path / "cells")
    result = tmp_path / "cells" / "mine" / "mine.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"cells": []}))
    shutil.rmtree(result.parent / "guided-seed0")
    assert main(words(path, "--jobs", "1")) == 0
    result = json.loads(result.read_text())
    assert [trial["row"].split("=")[-1] for trial in result["trials"]] == ["0.0", "0.5", "2.0"]
    assert result["cells"][0]["words"][-2] == "guidance.scale=0.5"


def test_verify_finds_the_same_numbers_and_tells_others(tuned, capsys):
    assert main(words(tuned, "verify")) == 0
    assert "every column lies where it was" in capsys.readouterr().out
    folder = tuned.parent / "cells" / "mine"
    for cell in folder.glob("*/cell.json"):
        record = json.loads(cell.read_text())
        name = next(n for n in record["points"][-1] if n.endswith("/log_prob"))
        record["points"][-1][name] -= 0.5
        cell.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        main(words(tuned, "verify"))
    assert "differs" in capsys.readouterr().out


def test_a_measure_that_no_trial_has_is_named(tuned, capsys):
    text = tuned.read_text().replace("tune_by: sampled/log_prob", "tune_by: eval/accuracy")
    other = tuned.with_name("mine.yaml")
    other.write_text(text)
    try:
        message = fails(capsys, *words(other, "--jobs", "1"))
    finally:
        other.write_text(text.replace("tune_by: eval/accuracy", "tune_by: sampled/log_prob"))
    assert "tune: eval/accuracy: None in the trial 'guided guidance.scale=0.0'" in message


def test_words_of_the_user_win_over_quick_ones_and_never_over_tuned_ones(tuned, capsys):
    there = ["--out", str(tuned.parent / "o"), "--root", str(tuned.parent / "other")]
    assert main(words(tuned, "--quick", "--jobs", "1", "env.num_steps=6", *there)) == 0
    stored = json.loads((tuned.parent / "o" / "mine-quick.json").read_text())
    assert stored["cells"][0]["words"][-2:] == ["env.num_steps=6", "seed=0"]
    assert "the suite sets guidance.scale itself" in fails(capsys, *words(tuned, "guidance.scale=3"))


def test_quick_tunes_nothing_and_has_a_folder_of_its_own(tuned):
    assert main(words(tuned, "--quick", "--jobs", "1")) == 0
    stored = json.loads((tuned.parent / "cells" / "mine-quick" / "mine-quick.json").read_text())
    assert "trials" not in stored
    assert stored["cells"][0]["words"][-3:] == ["env.num_steps=5", "guidance.scale=0.1", "seed=0"]


def trial(gamma, **measures):
    return {"row": f"a algo.gamma={gamma}", "points": [measures]}


def three(**parts):
    return suites.Suite(rows={"a": []}, columns={"r": "m"}, tune={"a": {"algo.gamma": [1, 2, 3]}}, **parts)


def test_a_trial_that_failed_is_passed_over():
    failed = {"row": "a algo.gamma=2", "failed": True}
    suite = three(tune_by="m")
    assert compare._best("a", suite, [trial(1, m=0.1), failed, trial(3, m=0.3)]) == "algo.gamma=3"
    assert compare._best("a", suite, [failed]) is None


@pytest.mark.parametrize(("margin", "best"), [(0.0, 3), (0.1, 2), (0.2, 1)])
def test_of_values_that_are_alike_the_second_measure_chooses(margin, best):
    suite = three(tune_by="m", tune_margin=margin, tune_then=["absent", "f"])
    trials = [trial(1, m=0.125, f=0.9), trial(2, m=0.25, f=0.8), trial(3, m=0.3125, f=0.1)]
    assert compare._best("a", suite, trials) == f"algo.gamma={best}"
    trials = [trial(1, m=0.25, f=0.5), trial(2, m=0.3125, f=0.5), trial(3, m=0.375, f=0.5)]
    assert compare._best("a", suite, trials) == "algo.gamma=3"  # of those that are alike there too


def test_where_none_is_above_chance_the_reward_tells_which_are_alike():
    """Its standard error is 2 / sqrt(16) = .5: 1 is out, of 2 and 3 the second measure prefers 2."""
    suite = three(tune_by="m", tune_margin=0.1, tune_then="f", tune_least=0.36)
    told = {"eval/reward_std": 2.0, "eval/n": 16}
    trials = [
        trial(1, m=0.36, f=0.9, **told | {"eval/reward_mean": -7.6}),
        trial(2, m=0.25, f=0.8, **told | {"eval/reward_mean": -7.4}),
        trial(3, m=0.20, f=0.1, **told | {"eval/reward_mean": -7.0}),
    ]
    assert compare._best("a", suite, trials) == "algo.gamma=2"
    trials[2]["points"][-1]["m"] = 0.37
    assert compare._best("a", suite, trials) == "algo.gamma=1"  # both within .1 of it: f decides


def test_where_the_second_measure_is_not_to_be_had_the_first_one_chooses_alone():
    """Such as on Stable Diffusion, which has no judge, without a CLIP."""
    suite = three(tune_by="m", tune_margin=0.1, tune_then=["absent", "f"])
    trials = [trial(gamma, m=gamma / 32, f="not available: clip=PATH") for gamma in (1, 2, 3)]
    assert compare._best("a", suite, trials) == "algo.gamma=3"


def test_a_row_whose_trials_all_fail_is_a_failure_and_the_others_finish(tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path,
        rows={"bad": ["algo=none"], "plain": ["algo=none"]},
        columns={"log p": "exact/log_prob"},
        settings=["env=gaussian_mixture", "env.num_steps=5"],
        tune={"bad": {"algo.gamma": [1, 2]}},
        seeds=1,
    )
    run_all = compare._run_all

    def failing(cells, folder, *args, **kwargs):
        if folder.name == "tune":
            return [compare._failure(cell.row, cell.seed) for cell in cells]
        return run_all(cells, folder, *args, **kwargs)

    monkeypatch.setattr(compare, "_run_all", failing)
    with pytest.raises(SystemExit):
        main(words(path, "--jobs", "1"))
    stored = json.loads((tmp_path / "cells" / "mine" / "mine.json").read_text())
    assert [(cell["row"], "points" in cell) for cell in stored["cells"]] == [
        ("plain", True),
        ("bad", False),
    ]
    assert "bad failed: all its trials did" in " ".join(capsys.readouterr().out.split())


def test_verify_compares_a_measure_of_each_class_too(tmp_path, monkeypatch, capsys):
    suite = suites.Suite(rows={"a": []}, columns={"class 0": "per/0", "class 1": "per/1"})
    stored = {"row": "a", "seed": 0, "minutes": 1.0, "words": [], "threads": 1}
    stored["points"] = [{"per": [0.5, 1.0]}]
    again = {"row": "a", "seed": 0, "points": [{"per": [0.5, 0.75]}]}
    monkeypatch.setattr(compare, "_run_all", lambda *args, **kwargs: [again])
    monkeypatch.setattr(compare, "_ours", lambda record, *args: record)
    assert compare.verify(suite, tmp_path, [stored], 0) == ["a-seed0: per/1 is 0.75, was 1, mean 1"]
    again["points"] = [{"per": [0.5, "not available: ..."]}]
    assert compare.verify(suite, tmp_path, [stored], 0) == ["a-seed0: per/1 is not available: ..., was 1"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"tune": {"ctrl": {"algo.gamma": [1]}}}, "row=ctrl: no such row"),
        ({"tune": {"reward only": {"algo.gamma": 1}}}, "not one setting with a list of values"),
        ({"tune": {"reward only": {}}}, "not one setting with a list of values"),
        ({"tune": {"reward only": {"algo.updates": []}}}, "not one setting with a list of values"),
        ({"tune": {"all": {"algo.updates": [1]}}}, "row=all: no such row"),
        ({"quick": {"nobody": []}}, "row=nobody: no such row"),
        (
            {"quick": {"reward only": "algo.updates=1"}},
            "quick: reward only: 'algo.updates=1' is not a list",
        ),
    ],
)
def test_bad_grids_are_named(tmp_path, capsys, parts, said):
    assert said in fails(capsys, *words(write(tmp_path, **parts)))
