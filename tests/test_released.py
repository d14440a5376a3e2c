"""What earlier versions wrote is read: of each, a run that was stopped after the first of two updates."""

import json
import shutil
from pathlib import Path

import pytest

from diffrl import weights
from diffrl.cli import main
from diffrl.restore import settings_of, untrained

RELEASED = Path(__file__).parent / "released"


@pytest.mark.parametrize("version", sorted(folder.name for folder in RELEASED.iterdir()))
def test_a_run_of_an_earlier_version_goes_on(version, tmp_path, hasty, capsys):
    run = shutil.copytree(RELEASED / version, tmp_path / "run")
    _, policy, _ = untrained(run, settings_of(run))
    weights.save(policy, run)  # the best so far, before the first update
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--resume", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "goes on after update 1 of 2" in said
    assert "weights of update 0, exact/gap_nats 0.01003" in said  # the best's, from the checkpoint
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    update, evaluation, kept = (json.loads(line) for line in after[len(before) :].splitlines())
    assert (update["update"], evaluation["update"], kept["update"]) == (2, 2, 2)
    assert kept["guard/best_update"] == 0
    assert kept["exact/gap_nats"] < 0.1 < evaluation["exact/gap_nats"]
    assert update["train/kl_weight"] == 0.98  # 1 times the budget's factor, from the checkpoint
    assert update["spent/pictures"] == 8


def test_where_the_best_weights_were_lost_others_are_kept(tmp_path, hasty, capsys):
    run = shutil.copytree(RELEASED / "0.1.0", tmp_path / "run")
    assert main(["train", "--resume", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the best weights so far are gone" in said
    assert "weights of update 2" in said
    assert main(["eval", str(run)]) == 0
