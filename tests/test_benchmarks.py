"""The parts of the benchmark commands that can be wrong without anyone noticing."""

import json
import shutil

import torch
from conftest import assert_close

from diffrl.benchmarks import emoji_data, record
from diffrl.cli import main


def test_an_aliased_glyph_answers_to_a_second_name():
    names = ["cat", "ewe", "chipmunk", "honeybee", "dog"]
    # ewe, chipmunk, honeybee are also the 6th, 7th and 8th captions: sheep, squirrel, bee
    assert_close(emoji_data.second_names(names), torch.tensor([0, 5, 6, 7, 4]), atol=0)
    assert [*names, *emoji_data.ALIASES.values()][5:] == ["sheep", "squirrel", "bee"]


class TestRecord:
    def test_numbers_are_those_of_diffrl_eval_and_the_grid_is_the_last(self, learnt_run, tmp_path, capsys):
        assert record.main([str(learnt_run), "mine", "--out", str(tmp_path), "-n", "4"]) == 0
        found = json.loads((tmp_path / "mine.json").read_text())
        capsys.readouterr()
        assert main(["eval", str(learnt_run), "--json", "-n", "4"]) == 0
        measures = json.loads(capsys.readouterr().out)
        assert {name: found[name] for name in measures if "seconds" not in name} == {
            name: value for name, value in measures.items() if "seconds" not in name
        }
        assert found["command"].startswith("diffrl train algo.updates=1 ")
        assert found["command"].endswith("; diffrl eval RUN --json -n 4")
        assert found["minutes"] > 0
        grids = sorted((learnt_run / "pictures").glob("grid-*.png"))
        assert len(grids) > 1
        assert (tmp_path / "mine.png").read_bytes() == grids[-1].read_bytes()

    def test_its_command_is_the_one_that_trained_it(self, learnt_run, tmp_path):
        """Not that of the run as it is restored: without its data, nothing compiled."""
        run = shutil.copytree(learnt_run, tmp_path / "run")
        settings = run / "config.yaml"
        settings.write_text(settings.read_text().replace("compile: false", "compile: true"))
        found = json.loads(record.record(run, "mine", tmp_path, num_pictures=4).read_text())
        assert " env.compile=true " in found["command"]

    def test_a_run_without_a_picture_is_refused(self, learnt_run, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(learnt_run, run, ignore=shutil.ignore_patterns("*.png"))
        assert record.main([str(run), "mine", "--out", str(tmp_path)]) == 2
        assert "no grid in" in capsys.readouterr().err
        assert not (tmp_path / "mine.json").exists()
