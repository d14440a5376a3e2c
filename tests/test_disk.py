"""A full disk, and one that may not be written to: one line, and a run that goes on once there is room."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from test_checkpoint import STATE, readable, written

from diffrl import checkpoint, disk
from diffrl.benchmarks.soak import RUN, bits, numbers
from diffrl.cli import main
from diffrl.errors import DiffRLError
from diffrl.log import RunLog

WORDS = [*RUN, "algo.updates=3", "checkpoint_every=1", "resume=auto"]


@pytest.fixture
def small(tmp_path):
    """A disk of its own, and what makes it larger or read-only."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting needs Linux and root")
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no tmpfs can be mounted here")
        return place

    yield mount
    subprocess.run(["umount", str(place)], check=False)
    shutil.rmtree(place)


def failed(capsys, *words):
    """Return the only line of a command's error."""
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("one-fit-for-all")


@pytest.fixture(autouse=True)
def one_fit(cache, monkeypatch):
    monkeypatch.setenv("DIFFRL_CACHE", str(cache))


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("roomy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(cache))
        assert main(["train", *WORDS, f"root={root}", "name=run"]) == 0
    return root / "run"


@pytest.mark.parametrize("size", [16, 100, 160, 320])
def test_a_run_on_a_full_disk_is_one_line_and_once_there_is_room_the_same_run(
    small, undisturbed, capfd, size
):
    """From a disk that holds no checkpoint at all to one that all but the last fit on."""
    place = small(f"size={size}k")
    line = failed(capfd, "train", *WORDS, f"root={place}", "name=run")
    assert "No space left on device" in line
    assert ("go on with" in line) == (place / "run").is_dir()
    small("remount", "size=4m")
    assert main(["train", *WORDS, f"root={place}", "name=run"]) == 0
    assert numbers(place / "run") == numbers(undisturbed)
    assert bits(place / "run") == bits(undisturbed)


def test_a_disk_that_may_only_be_read_is_one_line_and_keeps_its_run(small, undisturbed, capfd):
    place = small("size=4m")
    shutil.copytree(undisturbed, place / "run")
    small("remount", "ro")
    assert main(["train", "--resume", str(place / "run")]) == 0  # finished already
    small("remount", "rw")
    last = max((place / "run" / "checkpoints").iterdir())
    shutil.rmtree(last)  # so that there is something left to train
    small("remount", "ro")
    assert "Read-only file system" in failed(capfd, "train", "--resume", place / "run")
    assert "Read-only file system" in failed(capfd, "train", *WORDS, f"root={place}", "name=other")
    small("remount", "rw")
    assert main(["train", "--resume", str(place / "run")]) == 0
    assert bits(place / "run") == bits(undisturbed)


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before_it_intact(small):
    place = small("size=64k")
    written(place)
    large = {"policy.0": torch.zeros(30_000)}
    with pytest.raises(DiffRLError, match="No space left on device"):
        checkpoint.write(place, 2, large, STATE)
    assert readable(place) == 1
    assert written(place, 3, update=3).name == "step-000003"


def test_a_root_that_is_a_file_is_one_line_before_anything_is_fitted(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("diffrl.train.pretrained", lambda setup: pytest.fail("the hours of a fit"))
    (tmp_path / "file").write_text("")
    line = failed(capfd, "train", *WORDS, f"root={tmp_path}/file/runs", "name=run")
    assert line.startswith(f"diffrl: {tmp_path}/file: Not a directory. ")
    assert "another root" in line


def test_a_probe_leaves_nothing(tmp_path):
    disk.probe(tmp_path / "not" / "there")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_holds_no_files_is_told(capfd):
    line = failed(capfd, "train", *WORDS, "root=/proc/runs", "name=run")
    assert line.startswith("diffrl: /proc: Permission denied. ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "", "runs/x"), "runs/x: No space left on device. Make room."),
        (OSError(errno.EDQUOT, ""), "runs: Disk quota exceeded. Make room."),
        (SafetensorError("I/O error: (os error 30)"), "runs: Read-only file system. Make room."),
    ],
)
def test_a_disk_that_refuses_is_named_with_the_advice(error, said):
    with pytest.raises(DiffRLError) as told, disk.told("runs", "Make room."):
        raise error
    assert str(told.value) == said


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, ""), SafetensorError("header"), ValueError()]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)), disk.told("runs"):
        raise error


def test_metrics_that_cannot_be_written_are_told_of(tmp_path):
    log = RunLog(tmp_path)
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._metrics.fileno())
    with pytest.raises(DiffRLError, match="No space"), disk.told(tmp_path), log:
        log.write(1, {"a": 1.0})


class TestReplacing:
    def test_a_file_is_the_old_one_until_the_new_one_is_whole(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("old")
        with disk.replacing(path) as draft:
            draft.write_text("new")
            assert (draft.parent, path.read_text()) == (tmp_path, "old")
        assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["a.json"])

    def test_after_an_error_nothing_is_left_of_the_new_one(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("old")
        with pytest.raises(UnicodeEncodeError), disk.replacing(path) as draft:
            draft.write_text("n\u00e9w", encoding="ascii")
        assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["a.json"])
