"""A suite's cells: what is run, what is run again, what their numbers are said to depend on."""

import json
import shutil

import pytest
import yaml
from small_suite import ROWS, SETTINGS, words, write
from test_cli import fails

from diffrl import config, lock, settings_file
from diffrl.benchmarks import compare, result, suites, summary
from diffrl.cli import main
from diffrl.errors import DiffRLError


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


def test_the_others_finish_when_a_cell_crashes(done):
    report = json.loads((done.parent / "cells" / "mine" / "mine.json").read_text())
    assert [row["n_seeds"] for row in report["rows"]] == [2, 2, 0]
    assert [row["failed"] for row in report["rows"]] == [0, 0, 2]
    assert "none of 8 rewards reaches it" in (done.parent / "cells/mine/crash-seed0.log").read_text()


def test_a_point_tells_what_was_spent_by_then(done):
    report = json.loads((done.parent / "cells" / "mine" / "mine.json").read_text())
    first, middle, last = report["cells"][0]["points"]
    assert [p["spent/pictures"] for p in (first, middle, last)] == [0, 8, 16]
    # policy and reference, 4 steps, of 8 points
    assert [p["spent/network_calls"] for p in (first, middle, last)] == [0, 64, 128]
    assert 0 == first["spent/seconds"] < middle["spent/seconds"] < last["spent/seconds"]


def test_a_cell_records_what_its_numbers_depend_on(done):
    cell = json.loads((done.parent / "cells/mine/ctrl-gamma-1-seed1/cell.json").read_text())
    assert cell["command"].startswith("diffrl train env=gaussian_mixture")
    assert cell["command"].endswith("seed=1")
    assert {"version", "commit", "torch", "diffusers", "python", "hardware", "minutes"} <= cell.keys()


def test_a_record_that_is_cut_short_is_none(tmp_path):
    for name, text in (("whole", '{"row": "a", "seed": 0}'), ("cut", '{"row": "')):
        (tmp_path / name).mkdir()
        (tmp_path / name / compare._CELL_FILE).write_text(text)
    assert compare.read(tmp_path) == [{"row": "a", "seed": 0}]


def test_a_result_that_is_not_whole_is_kept_beside(tmp_path, capsys):
    path = tmp_path / "s.json"
    assert result.read(path) == ([], [])
    for text in ('{"cells": [{"row"', '{"suite": "s"}'):
        path.write_text(text)
        assert result.read(path) == ([], [])
        assert (tmp_path / "s.json.damaged").read_text() == text
        assert not path.exists()
    assert "not a whole result" in " ".join(capsys.readouterr().out.split())


def test_a_record_of_another_version_or_setting_says_which(tmp_path):
    wanted = compare._settings(suites.Cell("a", 0, [*SETTINGS, "algo=ctrl"]), tmp_path)
    record = {"version": compare.__version__, "settings": settings_file.facts(wanted)}
    assert compare._ours(record, wanted, "a: it is", "--out") is record
    with pytest.raises(DiffRLError, match=r"it is of diffrl 0\.0\.1, and this is"):
        compare._ours(record | {"version": "0.0.1"}, wanted, "a: it is", "--out")
    wanted.algo.max_grad_norm = 2.5
    why = r"algo\.max_grad_norm was [\d.]+, and is 2\.5 now\. Give another --out"
    with pytest.raises(DiffRLError, match=why):
        compare._ours(record, wanted, "a: it is", "--out")


def test_how_many_pictures_are_held_is_the_machine_s(tmp_path, monkeypatch):
    """Rows may set it, and so may who runs them."""
    suite = suites.load("compressibility")
    kept = []
    monkeypatch.setattr(compare, "_run_all", lambda cells, *_: kept.extend(cells) or [])
    compare.compare(suite, tmp_path, words=["algo.micro_batch_size=4"], quick=True)
    assert len(kept) == len(suite.rows)
    for cell in kept:
        assert config.load(cell.words).algo.micro_batch_size == 4


def test_a_run_that_went_on_with_fewer_pictures_at_a_time_is_the_cell_s_still(tmp_path):
    """As where memory ran out, and the advice was followed."""
    wanted = config.load([*SETTINGS, "algo=ctrl", "name=a"])
    folder = tmp_path / "a"
    folder.mkdir()
    for more, kept in ([*SETTINGS, "algo.micro_batch_size=2"], True), ([*SETTINGS, "seed=1"], False):
        settings_file.write(config.load([*more, "algo=ctrl", "name=a"]), folder / "config.yaml")
        with lock.held(folder):  # a process trains it
            if kept:
                compare._drop_other(folder, wanted)
            else:
                with pytest.raises(DiffRLError, match="another process trains it"):
                    compare._drop_other(folder, wanted)
        assert folder.exists()
        compare._drop_other(folder, wanted)
        assert folder.exists() == kept


@pytest.mark.parametrize("seed", [0, 3])
def test_a_cell_trains_with_what_its_words_say(seed, tmp_path):
    """Though a row's settings are composed once for all of its seeds."""
    words = [*SETTINGS, "algo=ctrl", f"seed={seed}"]
    wanted = compare._settings(suites.Cell("ctrl", seed, words), tmp_path)
    assert settings_file.same(settings_file.facts(config.load(words)), wanted)
    assert (wanted.seed, wanted.algo) == (seed, config.load(words).algo)


def test_a_cell_reads_its_pictures_itself(tmp_path):
    """It is a daemon, which may have no children."""
    cell = suites.Cell("ctrl", 0, [*SETTINGS, "algo=ctrl", "seed=0", "dataset_workers=4"])
    assert compare._settings(cell, tmp_path).dataset_workers == 0


def test_only_what_is_not_done_is_run_again(done, monkeypatch, capsys):
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


def test_the_result_alone_is_enough_to_go_on(done, monkeypatch, capsys, tmp_path):
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
        result, "store", lambda *args: stored.append(args[2]) or summary.summarise("", args[2])
    )
    assert main(words(path, "--seeds", "3", "--out", str(kept))) == 0
    assert [len(cells) for cells in stored] == [5, 6, 6]


def test_a_finished_run_of_other_settings_is_not_overwritten(done, capsys):
    cell = done.parent / "cells" / "mine" / "reward-only-seed0" / "cell.json"
    before = cell.read_bytes()
    message = fails(capsys, *words(done, "algo.max_grad_norm=2"))
    assert "a finished run of other settings: algo.max_grad_norm was" in message
    assert "and is 2.0 now. Give another --root" in message
    assert cell.read_bytes() == before


def test_a_new_trial_does_not_cost_the_cells_that_are_done(tmp_path, monkeypatch):
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


def test_a_checkpoint_counts_by_its_content_not_by_its_place(tiny_path, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_path, copy)
    stored = settings_file.facts(config.load([f"env.model={tiny_path}"]))
    there = config.load([f"env.model={copy}", "name=other", "root=elsewhere"])
    assert settings_file.same(stored, there)
    (copy / "unet" / "config.json").write_text("{}")
    assert not settings_file.same(stored, there)
    assert not settings_file.same(stored, config.load([f"env.model={tiny_path}", "seed=1"]))


@pytest.mark.parametrize("word", ["prompts=", "eval_prompts=", "prompts=imagenet_animals:"])
def test_a_file_of_prompts_counts_by_its_content_not_by_its_place(tmp_path, word):
    paths = [tmp_path / name / "my.csv" for name in ("here", "there")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("prompt,label\ncat,0\n")
    here, there = (config.load([f"{word}{path}"]) for path in paths)
    record = {"version": compare.__version__, "settings": settings_file.facts(here)}
    assert compare._ours(record, there, "a: it is", "--out") is record
    paths[1].write_text("prompt,label\ncat,1\n")
    with pytest.raises(
        DiffRLError, match=r"of other settings: (eval_)?prompts was .*/my\.csv, and is .*/my\.csv now"
    ):
        compare._ours(record, there, "a: it is", "--out")


def test_where_adapters_would_be_is_no_matter_to_a_row_that_trains_none():
    plain, other = (
        {
            algo: config.load([f"algo={algo}", f"policy.rank={rank}", "policy.targets=[to_q]"])
            for algo in ("none", "ctrl")
        }
        for rank in (2, 3)
    )
    records = {
        algo: {"version": compare.__version__, "settings": settings_file.facts(settings)}
        for algo, settings in plain.items()
    }
    assert compare._ours(records["none"], other["none"], "a: it is", "--out") is records["none"]
    with pytest.raises(DiffRLError, match=r"settings: policy\.rank was 2, and is 3 now"):
        compare._ours(records["ctrl"], other["ctrl"], "a: it is", "--out")
    with pytest.raises(DiffRLError, match="of other settings: eval_pictures was"):
        compare._ours(records["none"], config.load(["algo=none", "eval_pictures=3"]), "a: it is", "--out")


def test_a_setting_younger_than_a_result_counts_as_its_default():
    stored = settings_file.facts(config.load([]))
    del stored["algo"]["max_grad_norm"], stored["eval_scales"]
    assert settings_file.same(stored, config.load([]))
    assert not settings_file.same(stored, config.load(["algo.max_grad_norm=2"]))
    assert not settings_file.same(stored, config.load(["eval_scales=[0.5]"]))
    assert not settings_file.same(stored | {"gone": 1}, config.load([]))


def test_a_reward_that_needs_a_setting_is_compared_without_it():
    asked = config.load(["algo=ddpo", "reward=vlm", "reward.model=judge"])
    assert settings_file.same(settings_file.facts(asked), asked)


@pytest.mark.parametrize("word", ["seed=3", "algo=ddpo", "name=x"])
def test_what_the_suite_sets_is_not_set_beside_it(done, capsys, word):
    assert f"{word}: the suite sets {word.partition('=')[0]} itself" in fails(capsys, *words(done, word))


def test_a_measure_that_no_cell_has_is_named(done, capsys, tmp_path):
    stored = yaml.safe_load(done.read_text()) | {"columns": {"gap": "exact/gap_nat"}}
    path = done.parent / "other" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(stored, sort_keys=False))
    root = str(done.parent / "cells")
    message = fails(
        capsys, "compare", f"suite={path}", "--root", root, "--seeds", "1", "--out", str(tmp_path)
    )
    assert "measure=exact/gap_nat: no such measure. Did you mean 'exact/gap_nats'?" in message
