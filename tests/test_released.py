"""What earlier versions wrote is read: of each, a run that was stopped after the first of two updates."""

import json
import shutil
from pathlib import Path

import pytest

from diffrl.cli import main

RELEASED = Path(__file__).parent / "released"


@pytest.mark.parametrize("version", sorted(folder.name for folder in RELEASED.iterdir()))
def test_a_run_of_an_earlier_version_goes_on(version, tmp_path, hasty, capsys):
    run = shutil.copytree(RELEASED / version, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--resume", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "goes on after update 1 of 2" in said
    assert "weights of update 0, exact/gap_nats 0.01003" in said  # the best's, from the checkpoint
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    update, evaluation = (json.loads(line) for line in after[len(before) :].splitlines())
    assert (update["update"], evaluation["update"]) == (2, 2)
    assert update["train/kl_weight"] == 0.98  # 1 times the budget's factor, from the checkpoint
    assert update["spent/pictures"] == 8
