"""What a suite's file may say, and what is refused before anything runs."""

import re

import pytest
import yaml
from small_suite import COLUMNS, ROWS, words, write
from test_cli import fails

from diffrl import config, conflicts
from diffrl.benchmarks import suites
from diffrl.errors import DiffRLError


def test_an_unknown_key_is_named_with_the_nearest(tmp_path, capsys):
    message = fails(capsys, *words(write(tmp_path, seed=3)))
    assert "key=seed: no such key. Did you mean 'seeds'?" in message


def test_an_unknown_suite_names_the_known(capsys):
    assert "suite=emojis: no such suite. Did you mean 'emoji'?" in fails(capsys, "compare", "suite=emojis")


@pytest.mark.parametrize(
    "parts",
    [{"rows": {}}, {"rows": ["ctrl"]}, {"rows": {"a": "algo=ctrl"}}, {"columns": None}, {"seeds": 0}],
    ids=str,
)
def test_a_value_of_the_wrong_form_is_refused(tmp_path, parts):
    with pytest.raises(DiffRLError, match=r"mine.yaml: not a suite: (rows|columns|seeds): "):
        suites.load(str(write(tmp_path, **parts)))


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (
            {"gamma": {"rwr": "algo.gamma"}},
            "no row is 'rwr' or begins with 'rwr,'; the rows are ['ctrl, ",
        ),
        ({"gamma": {"ctrl": "algo.gamma"}}, "ctrl, gamma 1: no algo.gamma= instead of a number"),
        ({"gamma": {"ctrl": "algo"}}, "ctrl, gamma 1: algo=ctrl instead of a number for algo."),
        ({"gamma": {}, "steps": {}}, "is not one heading with its lines"),
        ({"gamma": "algo.gamma"}, "is not one heading with its lines"),
    ],
)
def test_a_sweep_that_has_no_axis_is_refused(tmp_path, against, said):
    with pytest.raises(DiffRLError, match=re.escape(said)):
        suites.load(str(write(tmp_path, against=against)))


def test_a_line_s_rows_begin_with_its_whole_name(tmp_path):
    rows = {"CTRL (a), 1": ["algo.gamma=1"], "CTRL (a)": ["+algo.gamma=2"], "CTRL (a)-b": ["algo.gamma=3"]}
    suite = suites.Suite(rows=rows, columns={}, against={"gamma": {"CTRL (a)": "algo.gamma"}})
    assert suite.lines() == {"CTRL (a)": {"CTRL (a), 1": 1.0, "CTRL (a)": 2.0}}


def test_a_base_gives_what_the_suite_has_not_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "compressibility", "seeds": 1, "columns": COLUMNS}))
    base, mine = suites.load("compressibility"), suites.load(str(path))
    assert (mine.rows, mine.tune, mine.quick) == (base.rows, base.tune, base.quick)
    assert (mine.seeds, mine.columns) == (1, COLUMNS)


def test_a_base_that_is_no_suite_is_named(tmp_path, capsys):
    message = fails(capsys, *words(write(tmp_path, base="compresibility")))
    assert "base=compresibility: no such base. Did you mean 'compressibility'?" in message
    assert "no such base" in fails(capsys, *words(write(tmp_path, base=["exact"])))


def test_a_base_may_have_a_base():
    mine = suites.load("multitask_sd15")
    assert mine.quick == suites.load("compressibility").quick
    assert mine.tune == suites.load("compressibility_sd15").tune != suites.load("compressibility").tune


def test_a_mistake_in_the_last_row_shows_before_the_first_is_run(tmp_path, capsys):
    path = write(tmp_path, rows=ROWS | {"last": ["algo.gama=3"]})
    assert "algo.gama: no such setting" in fails(capsys, *words(path))
    assert not (tmp_path / "cells").exists()


def test_two_rows_of_one_folder_are_refused(tmp_path, capsys):
    path = write(tmp_path, rows={"rwr sparse": ["algo=rwr"], "rwr, sparse": ["algo=rwr"]})
    assert "'rwr sparse' and 'rwr, sparse' name the same folder" in fails(capsys, *words(path))


@pytest.mark.parametrize("name", suites.suites())
def test_the_rows_of_every_suite_are_settings_that_train_takes(name, tmp_path):
    suite = suites.load(name)
    (tmp_path / "head.pth").touch()
    own = [f"reward.mlp={tmp_path / 'head.pth'}"] if name == "multitask_sd15" else []  # the user's
    for name, row in suite.rows.items():
        tried = [f"{key}={v}" for key, vs in suite.tune.get(name, {}).items() for v in vs]
        for word in [None, *tried]:
            conflicts.check(config.load([*suite.settings, *own, *row, *([word] if word else [])]))
        config.load([*suite.settings, *own, *row, *suite.quick.get("all", []), *suite.quick.get(name, [])])
