"""Suites: what is refused before anything runs, what is run again, and the arithmetic of the table."""

import json
import math
import shutil

import pytest
import yaml
from conftest import assert_close
from test_cli import fails

from diffrl import build, config, settings_file
from diffrl.benchmarks import compare, suites, summary
from diffrl.cli import main
from diffrl.errors import DiffRLError
from diffrl.log import print_wide

SETTINGS = ["env=gaussian_mixture", "env.num_steps=4", "algo.updates=2", "eval_every=1"]
SETTINGS += ["algo.batch_size=8", "algo.micro_batch_size=8"]
ROWS = {"ctrl, gamma 1": ["algo=ctrl"], "reward only": ["algo=reward_backprop"]}
COLUMNS = {"gap (nats)": "exact/gap_nats", "TV": "exact/tv"}


def write(folder, **parts):
    path = folder / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"rows": ROWS, "columns": COLUMNS, "settings": SETTINGS} | parts, sort_keys=False)
    )
    return path


def words(path, *more):
    return ["compare", f"suite={path}", "--root", str(path.parent / "cells"), *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the file of a suite that was run, two seeds a row; the last row crashes in training."""
    folder = tmp_path_factory.mktemp("suite")
    crashing = ["algo=rwr", "algo.weights=threshold", "algo.threshold=9"]  # no reward reaches it
    path = write(folder, rows=ROWS | {"crash": crashing}, seeds=2, curve={"gap (nats)": "exact/gap_nats"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as stop:
            main(words(path))
    assert stop.value.code == 1
    return path


def test_a_cell_that_a_signal_stopped_is_not_taken_for_finished(tmp_path, monkeypatch):
    cell = suites.Cell("ctrl", 0, [*SETTINGS, "algo=ctrl", "seed=0"])
    settings = compare._settings(cell, tmp_path)
    monkeypatch.setattr(compare.os, "dup2", lambda *_: None)
    monkeypatch.setattr(compare.train, "train", lambda _: tmp_path / cell.name)
    monkeypatch.setattr(compare.train, "is_done", lambda _: False)
    with pytest.raises(SystemExit, match="stopped before its end"):
        compare._run(cell, settings, {"threads": 1})
    assert not (tmp_path / cell.name / compare._CELL_FILE).exists()


class TestSuiteFile:
    def test_an_unknown_key_is_named_with_the_nearest(self, tmp_path, capsys):
        message = fails(capsys, *words(write(tmp_path, seed=3)))
        assert "key=seed: no such key. Did you mean 'seeds'?" in message

    def test_an_unknown_suite_names_the_known(self, capsys):
        assert "suite=emojis: no such suite. Did you mean 'emoji'?" in fails(
            capsys, "compare", "suite=emojis"
        )

    @pytest.mark.parametrize(
        "parts",
        [{"rows": {}}, {"rows": ["ctrl"]}, {"rows": {"a": "algo=ctrl"}}, {"columns": None}, {"seeds": 0}],
        ids=str,
    )
    def test_a_value_of_the_wrong_form_is_refused(self, tmp_path, parts):
        with pytest.raises(DiffRLError, match=r"mine.yaml: not a suite: (rows|columns|seeds): "):
            suites.load(str(write(tmp_path, **parts)))

    def test_a_base_gives_what_the_suite_has_not_itself(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"base": "compressibility", "seeds": 1, "columns": COLUMNS}))
        base, mine = suites.load("compressibility"), suites.load(str(path))
        assert (mine.rows, mine.tune, mine.quick) == (base.rows, base.tune, base.quick)
        assert (mine.seeds, mine.columns) == (1, COLUMNS)

    def test_a_base_that_is_no_suite_is_named(self, tmp_path, capsys):
        message = fails(capsys, *words(write(tmp_path, base="compresibility")))
        assert "base=compresibility: no such base. Did you mean 'compressibility'?" in message
        assert "no such base" in fails(capsys, *words(write(tmp_path, base=["exact"])))

    def test_a_base_may_have_a_base(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("base: multitask")
        mine = suites.load(str(path))
        assert mine.tune == suites.load("compressibility").tune

    def test_a_mistake_in_the_last_row_shows_before_the_first_is_run(self, tmp_path, capsys):
        path = write(tmp_path, rows=ROWS | {"last": ["algo.gama=3"]})
        assert "algo.gama: no such setting" in fails(capsys, *words(path))
        assert not (tmp_path / "cells").exists()

    def test_two_rows_of_one_folder_are_refused(self, tmp_path, capsys):
        path = write(tmp_path, rows={"rwr sparse": ["algo=rwr"], "rwr, sparse": ["algo=rwr"]})
        assert "'rwr sparse' and 'rwr, sparse' name the same folder" in fails(capsys, *words(path))

    @pytest.mark.parametrize("name", suites.suites())
    def test_the_rows_of_every_suite_are_settings_that_train_takes(self, name):
        suite = suites.load(name)
        for name, row in suite.rows.items():
            tried = [f"{key}={v}" for key, vs in suite.tune.get(name, {}).items() for v in vs]
            for word in [None, *tried]:
                build.check(config.load([*suite.settings, *row, *([word] if word else [])]))
            config.load([*suite.settings, *row, *suite.quick.get("all", []), *suite.quick.get(name, [])])


class TestTable:
    def test_interval_is_students(self):
        mean, half = summary.interval([1.0, 2.0, 6.0])
        assert_close(mean, 3.0, atol=1e-12)
        # t of 2 degrees at .975 is 4.3027; standard deviation sqrt(7)
        assert_close(half, 4.30265 * math.sqrt(7 / 3), atol=1e-4)
        assert summary.interval([2.5]) == (2.5, None)

    def test_a_row_is_the_mean_over_seeds_of_the_last_evaluation(self):
        def cell(seed, last):
            return {"row": "a", "seed": seed, "minutes": 1.0, "points": [{"m": 9.0}, {"m": last, "l": [1]}]}

        (row,) = summary.summarise(
            "s", [cell(0, 1.0), cell(1, 3.0), {"row": "a", "seed": 2, "failed": True}]
        )
        assert (row["suite"], row["method"], row["n_seeds"], row["failed"]) == ("s", "a", 2, 1)
        assert (row["m"], row["m_max"]) == (2.0, 3.0)
        assert_close(row["m_ci95"], 12.7062, atol=1e-3)  # t of 1 degree; standard error 1
        assert "l" not in row

    def test_seconds_are_the_fewest_of_the_seeds_as_other_work_only_adds_to_them(self):
        def cell(seed, reward, *seconds):
            points = [{"reward": reward, "spent/seconds": s, "spent/pictures": 8.0 * s} for s in seconds]
            return {"row": "a", "seed": seed, "minutes": 1.0, "points": points}

        records = [cell(0, 1.0, 10.0, 20.0), cell(1, 3.0, 15.0, 90.0)]
        (row,) = summary.summarise("s", records)
        assert (row["spent/seconds"], row["spent/seconds_ci95"]) == (20.0, None)
        assert row["spent/pictures"] == 440.0
        for record in records:
            for point in record["points"]:
                point["spent/network_calls"] = 1.0
        suite = suites.Suite(rows={"a": []}, columns={"r": "reward"}, curve={"r": "reward"})
        panels = summary.curves(suite, records)
        assert panels["seconds"][0].x == [10.0, 20.0]
        assert panels["pictures drawn"][0].x == [100.0, 440.0]
        assert panels["seconds"][0].y == [2.0, 2.0]

    def test_a_record_has_the_bare_names_of_an_evaluation(self):
        row = {"suite": "s", "n_seeds": 3, "eval/accuracy": 0.5, "eval/accuracy_ci95": 0.1, "exact/tv": 0.2}
        names = ["suite", "n_seeds", "accuracy", "accuracy_ci95", "exact/tv"]
        assert list(summary.bare(row)) == names


class TestCells:
    def test_the_others_finish_when_a_cell_crashes(self, done):
        report = json.loads((done.parent / "cells" / "mine" / "mine.json").read_text())
        assert [row["n_seeds"] for row in report["rows"]] == [2, 2, 0]
        assert [row["failed"] for row in report["rows"]] == [0, 0, 2]
        assert "none of 8 rewards reaches it" in (done.parent / "cells/mine/crash-seed0.log").read_text()

    def test_a_point_tells_what_was_spent_by_then(self, done):
        report = json.loads((done.parent / "cells" / "mine" / "mine.json").read_text())
        first, middle, last = report["cells"][0]["points"]
        assert [p["spent/pictures"] for p in (first, middle, last)] == [0, 8, 16]
        # policy and reference, 4 steps, of 8 points
        assert [p["spent/network_calls"] for p in (first, middle, last)] == [0, 64, 128]
        assert 0 == first["spent/seconds"] < middle["spent/seconds"] < last["spent/seconds"]

    def test_a_cell_records_what_its_numbers_depend_on(self, done):
        cell = json.loads((done.parent / "cells/mine/ctrl-gamma-1-seed1/cell.json").read_text())
        assert cell["command"].startswith("diffrl train env=gaussian_mixture")
        assert cell["command"].endswith("seed=1")
        assert {"version", "commit", "torch", "python", "hardware", "minutes"} <= cell.keys()

    def test_only_what_is_not_done_is_run_again(self, done, monkeypatch, capsys):
        monkeypatch.setenv("DIFFRL_CACHE", str(done.parent / "cache"))
        cells = done.parent / "cells" / "mine"
        cut, sound = (cells / f"ctrl-gamma-1-seed{s}" / "cell.json" for s in (0, 1))
        before = sound.stat().st_mtime_ns
        whole = json.loads(cut.read_text())
        cut.write_text(cut.read_text()[:99])
        (cells / "mine.json").write_text((cells / "mine.json").read_text()[:99])
        with pytest.raises(SystemExit):
            main(words(done, "--json"))
        assert sound.stat().st_mtime_ns == before
        again = json.loads(cut.read_text())
        gap = "exact/gap_nats"
        assert [p[gap] for p in again["points"]] == [p[gap] for p in whole["points"]]
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["method"] for row in rows] == ["ctrl, gamma 1", "reward only", "crash"]

    def test_the_result_alone_is_enough_to_go_on(self, done, monkeypatch, capsys, tmp_path):
        """Not of another seed, which would have other settings; and it is written after every cell."""
        monkeypatch.setenv("DIFFRL_CACHE", str(done.parent / "cache"))
        kept = tmp_path / "kept"
        shutil.copytree(done.parent / "cells" / "mine", kept)
        with pytest.raises(SystemExit):  # once more, so that the result holds what a later version writes
            main(words(done, "--out", str(kept)))
        path = write(tmp_path, rows=ROWS)
        cells = json.loads((kept / "mine.json").read_text())["cells"]
        before = [cell for cell in cells if "points" in cell]
        capsys.readouterr()
        assert main(words(path, "--seeds", "2", "--out", str(kept))) == 0
        assert "4 of 4 cells are done already" in capsys.readouterr().out
        assert json.loads((kept / "mine.json").read_text())["cells"] == before
        assert main(words(path, "--seeds", "1", "--out", str(kept))) == 0
        cells = json.loads((kept / "mine.json").read_text())["cells"]  # the other seed's stay
        assert {(c["row"], c["seed"]) for c in cells} == {(c["row"], c["seed"]) for c in before}
        message = fails(capsys, *words(path, "algo.max_grad_norm=2", "--seeds", "2", "--out", str(kept)))
        assert "ctrl-gamma-1-seed0: the suite's result holds it, but of other settings" in message
        stored = []
        monkeypatch.setattr(
            summary, "store", lambda *args: stored.append(args[2]) or summary.summarise("", args[2])
        )
        assert main(words(path, "--seeds", "3", "--out", str(kept))) == 0
        assert [len(cells) for cells in stored] == [5, 6, 6]

    def test_a_finished_run_of_other_settings_is_not_overwritten(self, done, capsys):
        cell = done.parent / "cells" / "mine" / "reward-only-seed0" / "cell.json"
        before = cell.read_bytes()
        message = fails(capsys, *words(done, "algo.max_grad_norm=2"))
        assert "a finished run of other settings or another version. Give another --root" in message
        assert cell.read_bytes() == before

    def test_a_new_trial_does_not_cost_the_cells_that_are_done(self, tmp_path, monkeypatch):
        saved = []
        suite = suites.load(str(write(tmp_path, tune={"reward only": {"algo.learning_rate": [0.1]}})))
        known = [{"row": "reward only", "seed": 4, "points": [{}]}]

        def one_by_one(cells, folder, jobs, earlier, save):
            records = [
                {"row": cell.row, "seed": cell.seed, "points": [{"eval/accuracy": 1.0}]} for cell in cells
            ]
            save(records)
            return records

        monkeypatch.setattr(compare, "_run_all", one_by_one)
        compare.compare(
            suite,
            tmp_path,
            words=[],
            seeds=1,
            earlier=(known, []),
            save=lambda *records: saved.append(records),
        )
        (during_trials, trial), (after, _) = saved
        assert during_trials == known
        assert [record["row"] for record in trial] == ["reward only algo.learning_rate=0.1"]
        assert [(r["row"], r["seed"]) for r in after] == [
            ("ctrl, gamma 1", 0),
            ("reward only", 0),
            ("reward only", 4),
        ]

    def test_a_checkpoint_counts_by_its_content_not_by_its_place(self, tiny_path, tmp_path):
        copy = tmp_path / "elsewhere"
        shutil.copytree(tiny_path, copy)
        stored = settings_file.facts(config.load([f"env.model={tiny_path}"]))
        there = config.load([f"env.model={copy}", "name=other", "root=elsewhere"])
        assert settings_file.same(stored, there)
        (copy / "unet" / "config.json").write_text("{}")
        assert not settings_file.same(stored, there)
        assert not settings_file.same(stored, config.load([f"env.model={tiny_path}", "seed=1"]))

    def test_a_setting_younger_than_a_result_counts_as_its_default(self):
        stored = settings_file.facts(config.load([]))
        del stored["algo"]["max_grad_norm"], stored["eval_scales"]
        assert settings_file.same(stored, config.load([]))
        assert not settings_file.same(stored, config.load(["algo.max_grad_norm=2"]))
        assert not settings_file.same(stored, config.load(["eval_scales=[0.5]"]))
        assert not settings_file.same(stored | {"gone": 1}, config.load([]))

    def test_a_reward_that_needs_a_setting_is_compared_without_it(self):
        asked = config.load(["algo=ddpo", "reward=vlm", "reward.model=judge"])
        assert settings_file.same(settings_file.facts(asked), asked)

    @pytest.mark.parametrize("word", ["seed=3", "algo=ddpo", "name=x"])
    def test_what_the_suite_sets_is_not_set_beside_it(self, done, capsys, word):
        assert f"{word}: the suite sets {word.partition('=')[0]} itself" in fails(
            capsys, *words(done, word)
        )

    def test_a_measure_that_no_cell_has_is_named(self, done, capsys, tmp_path):
        stored = yaml.safe_load(done.read_text()) | {"columns": {"gap": "exact/gap_nat"}}
        path = done.parent / "other" / "mine.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(stored, sort_keys=False))
        root = str(done.parent / "cells")
        message = fails(
            capsys, "compare", f"suite={path}", "--root", root, "--seeds", "1", "--out", str(tmp_path)
        )
        assert "measure=exact/gap_nat: no such measure. Did you mean 'exact/gap_nats'?" in message


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


class TestTuning:
    def test_the_best_value_of_the_trials_becomes_the_rows(self, tuned):
        stored = json.loads((tuned.parent / "cells" / "mine" / "mine.json").read_text())
        assert [trial["row"].split("=")[-1] for trial in stored["trials"]] == ["0.0", "2.0", "0.5"]
        scores = [trial["points"][-1]["sampled/log_prob"] for trial in stored["trials"]]
        assert max(scores) == scores[1]  # stronger guidance, more probable label
        guided, plain = stored["cells"]
        assert guided["words"][-2:] == ["guidance.scale=2.0", "seed=0"]
        assert plain["words"] == [*stored["settings"]["settings"], "algo=none", "seed=0"]
        assert "env.num_steps=10" in stored["trials"][0]["words"]

    def test_verify_finds_the_same_numbers_and_tells_others(self, tuned, capsys):
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

    def test_a_measure_that_no_trial_has_is_named(self, tuned, capsys):
        text = tuned.read_text().replace("tune_by: sampled/log_prob", "tune_by: eval/accuracy")
        other = tuned.with_name("mine.yaml")
        other.write_text(text)
        try:
            message = fails(capsys, *words(other, "--jobs", "1"))
        finally:
            other.write_text(text.replace("tune_by: eval/accuracy", "tune_by: sampled/log_prob"))
        assert "tune_by: eval/accuracy: None in the trial 'guided guidance.scale=0.0'" in message

    def test_words_of_the_user_win_over_quick_ones_and_never_over_tuned_ones(self, tuned, capsys):
        there = ["--out", str(tuned.parent / "o"), "--root", str(tuned.parent / "other")]
        assert main(words(tuned, "--quick", "--jobs", "1", "env.num_steps=6", *there)) == 0
        stored = json.loads((tuned.parent / "o" / "mine-quick.json").read_text())
        assert stored["cells"][0]["words"][-2:] == ["env.num_steps=6", "seed=0"]
        assert "the suite sets guidance.scale itself" in fails(capsys, *words(tuned, "guidance.scale=3"))

    def test_quick_tunes_nothing_and_has_a_folder_of_its_own(self, tuned):
        assert main(words(tuned, "--quick", "--jobs", "1")) == 0
        stored = json.loads((tuned.parent / "cells" / "mine-quick" / "mine-quick.json").read_text())
        assert "trials" not in stored
        assert stored["cells"][0]["words"][-3:] == ["env.num_steps=5", "guidance.scale=0.1", "seed=0"]

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
    def test_bad_grids_are_named(self, tmp_path, capsys, parts, said):
        assert said in fails(capsys, *words(write(tmp_path, **parts)))


def test_numbers_have_the_digits_that_their_size_deserves():
    texts = [
        summary.as_text(number, scale) for number, scale in ((12345.6, 1e4), (73.0, 451.0), (86.87, 86.87))
    ]
    assert texts == ["12,346", "73", "86.9"]
    assert [summary.as_text(0.0257, 0.566), summary.as_text(-1.958, -1.958)] == ["0.026", "-1.958"]


def test_a_table_of_many_columns_is_printed_whole(capsys):
    names = {f"a measure of some length, number {i}": "x" for i in range(12)}
    row = {"method": "one", "failed": 0, "x": 1.5, "x_ci95": 0.25}
    print_wide(summary.table(suites.Suite(rows={"one": []}, columns=names), [row]))
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert out.count("1.500 ± 0.250") == 12
