"""One process at a time writes to a run, and two that begin it do not destroy each other's."""

import shutil
import subprocess
import sys

import pytest

from diffrl import train
from diffrl.benchmarks.soak import RUN, numbers
from diffrl.cli import main
from diffrl.lock import LOCK_FILE

HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
WORDS = [*RUN, "algo.updates=2", "checkpoint_every=1"]


@pytest.fixture
def held_elsewhere():
    """Return a function that has another process hold a folder; that process."""
    begun = []

    def hold(folder):
        words = [sys.executable, "-c", HOLDER, str(folder / LOCK_FILE)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def run(tmp_path, hasty):
    assert main(["train", *WORDS, f"root={tmp_path}", "name=run"]) == 0
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))  # so that there is something left
    return tmp_path / "run"


def test_a_run_that_another_process_trains_is_not_gone_on_with_until_that_one_is_killed(
    run, held_elsewhere, capsys
):
    before = numbers(run)
    process = held_elsewhere(run)
    for words in (["--resume", str(run)], [*WORDS, f"root={run.parent}", "name=run", "resume=auto"]):
        assert main(["train", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"diffrl: {run}: another process trains it")
    assert (run / "metrics.jsonl").is_file()
    assert numbers(run) == before
    process.kill()
    process.wait()
    assert main(["train", "--resume", str(run)]) == 0


def test_of_two_that_begin_one_run_the_later_says_that_it_exists(run, tmp_path, monkeypatch, capsys):
    rename = train._rename

    def late(draft, folder):
        shutil.copytree(run, folder)  # the other one's
        rename(draft, folder)

    monkeypatch.setattr(train, "_rename", late)
    assert main(["train", *WORDS, f"root={tmp_path}", "name=twice"]) == 2
    assert "twice: the run directory exists" in capsys.readouterr().err
    assert numbers(tmp_path / "twice") == numbers(run)
    assert not list(tmp_path.glob(".twice.draft-*"))


def test_of_the_drafts_of_a_run_only_those_of_the_dead_are_deleted(tmp_path, held_elsewhere, hasty):
    live, dead = (tmp_path / f".run.draft-{name}" for name in ("live", "dead"))
    for draft in (live, dead):
        draft.mkdir()
        (draft / "config.yaml").write_text("")
    held_elsewhere(live)
    assert main(["train", *WORDS, f"root={tmp_path}", "name=run"]) == 0
    assert (live / "config.yaml").is_file()
    assert not dead.exists()
