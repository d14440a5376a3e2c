"""Whatever goes wrong in a save or after it, a checkpoint is whole, or known not to be."""

import errno
import os
import shutil
import signal

import pytest
import torch

from diffrl import checkpoint, disk
from diffrl.errors import DiffRLError

TENSORS = {"policy.0": torch.arange(6.0).reshape(2, 3), "optimizer.0.step": torch.tensor(3.0)}
STATE = {"update": 1, "spent": {"seconds": 0.1}}


def written(parent, step=1, **changes):
    return checkpoint.write(parent, step, TENSORS, STATE | changes, claims={"rate": 0.1}, keep=2)


def readable(parent):
    """Return the update of the newest checkpoint that is whole, as a resumed run finds it."""
    for folder in checkpoint.newest_first(parent):
        try:
            return checkpoint.read(folder).state["update"]
        except checkpoint.DamagedError:
            continue
    return None


class FaultyOS:
    """The module `os`, whose operations of a save are counted, and the one of number `at` fails."""

    def __init__(self, at, fault, names=("open", "write", "fsync", "close", "rename")):
        self.at, self.fault, self.names, self.count = at, fault, names, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.names:
            return real

        def operation(*arguments, **keywords):
            self.count += 1
            return (
                self.fault(real, name, *arguments)
                if self.count == self.at
                else real(*arguments, **keywords)
            )

        return operation


def put(patch, faulty):
    """Have the two modules whose operations make up a save go through `faulty`."""
    for module in (checkpoint, disk):
        patch.setattr(module, "os", faulty)


def fails_with(number):
    def fault(real, name, *arguments):
        if name == "close":  # it closes all the same
            real(*arguments)
        raise OSError(number, os.strerror(number))

    return fault


def writes_short(real, name, *arguments):
    if name != "write":
        return real(*arguments)
    handle, content = arguments
    return real(handle, content[: len(content) // 2])


def dies(real, name, *arguments):
    if name == "write":  # half of it has reached the disk
        writes_short(real, name, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)


def number_of_operations(tmp_path, monkeypatch):
    counter = FaultyOS(0, None)
    with monkeypatch.context() as patch:
        put(patch, counter)
        written(tmp_path / "counted")
    return counter.count


def test_what_is_written_is_read_and_the_oldest_goes(tmp_path):
    for step in (1, 2, 3):
        written(tmp_path, step, update=step)
    assert [folder.name for folder in checkpoint.newest_first(tmp_path)] == ["step-000003", "step-000002"]
    found = checkpoint.read(tmp_path / "step-000003")
    assert found.state == {"update": 3, "spent": {"seconds": 0.1}}
    assert found.claims == {"rate": 0.1}
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    assert checkpoint.step_of(tmp_path / "step-000003") == 3


@pytest.mark.parametrize("keep", range(1, 6))
def test_the_last_so_many_stay(tmp_path, keep):
    for step in range(1, 9):
        checkpoint.write(tmp_path, step, TENSORS, STATE, keep=keep)
        there = [checkpoint.step_of(folder) for folder in checkpoint.newest_first(tmp_path)]
        assert there == list(range(1, step + 1))[-keep:][::-1]


def test_a_later_one_that_is_damaged_does_not_count_among_those_to_keep(tmp_path):
    written(tmp_path, 1)
    (written(tmp_path, 9) / "state.json").unlink()
    checkpoint.write(tmp_path, 2, TENSORS, STATE | {"update": 2}, keep=1)  # gone on with from 1
    assert readable(tmp_path) == 2
    assert [checkpoint.step_of(folder) for folder in checkpoint.newest_first(tmp_path)] == [2]


def test_the_one_to_spare_stays_however_old(tmp_path):
    for step, best in ((1, 0), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6)):
        checkpoint.write(tmp_path, step, TENSORS, STATE, keep=1, spare=best)
        kept = {1: [1], 2: [2], 3: [3, 2], 4: [4, 2], 5: [5, 2], 6: [6]}[step]
        assert [checkpoint.step_of(folder) for folder in checkpoint.newest_first(tmp_path)] == kept


def test_a_renamed_checkpoint_is_noticed(tmp_path):
    folder = written(tmp_path, 3)
    folder = folder.rename(folder.with_name("step-000004"))
    with pytest.raises(checkpoint.DamagedError, match=r"manifest\.json: of step 3, its folder was renamed"):
        checkpoint.read(folder)


def test_a_digest_is_of_values_and_shapes():
    zeros, ones = torch.zeros(2, 3), torch.ones(1)
    assert checkpoint.digest([zeros, ones]) == checkpoint.digest([torch.zeros(3, 2).T, ones.clone()])
    assert checkpoint.digest([-zeros, ones]) != checkpoint.digest([zeros, ones])  # -0.0 has other bits
    assert checkpoint.digest([zeros.T, ones]) != checkpoint.digest([zeros, ones])
    assert checkpoint.digest([ones, zeros]) != checkpoint.digest([zeros, ones])


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_whichever_operation_of_a_save_fails_the_checkpoint_before_it_is_there(
    tmp_path, monkeypatch, number
):
    """As SQLite tests itself: the first, the second, ... until a save runs through."""
    operations = number_of_operations(tmp_path, monkeypatch)
    assert operations == 19  # open, write, fsync, close of 3 files; open, fsync, close of 2 folders; a name
    for at in range(1, operations + 1):
        parent = tmp_path / str(at)
        written(parent)
        with monkeypatch.context() as patch:
            put(patch, FaultyOS(at, fails_with(number)))
            with pytest.raises(
                DiffRLError, match=r"the checkpoint cannot be written \(.*\)\. Those before"
            ):
                written(parent, 2, update=2)
        assert readable(parent) in (1, 2)
        assert written(parent, 3, update=3).name == "step-000003"
        assert not list(parent.glob("*.tmp-*"))


def test_a_short_write_is_gone_on_with(tmp_path, monkeypatch):
    for at in range(1, number_of_operations(tmp_path, monkeypatch) + 1):
        with monkeypatch.context() as patch:
            put(patch, FaultyOS(at, writes_short))
            written(tmp_path / str(at), 2, update=2)
        assert readable(tmp_path / str(at)) == 2


def test_killed_at_any_operation_it_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    operations = number_of_operations(tmp_path, monkeypatch)
    found = []
    for at in range(1, operations + 2):
        parent = tmp_path / str(at)
        written(parent)
        child = os.fork()
        if not child:  # no exception may pass: pytest would run on in two processes
            checkpoint.os = disk.os = FaultyOS(at, dies)
            written(parent, 2, update=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert (os.WTERMSIG(status) == signal.SIGKILL) == (at <= operations)
        found.append(readable(parent))
        assert written(parent, 3, update=3).name == "step-000003"  # what is left over is in nobody's way
    assert found == sorted(found)
    assert set(found) == {1, 2}


@pytest.mark.parametrize("fault", [fails_with(errno.EIO), dies], ids=["EIO", "SIGKILL"])
def test_where_deleting_the_oldest_breaks_off_the_newest_is_whole_and_the_next_save_deletes_it(
    tmp_path, fault
):
    for at in range(1, 6):  # the three files, their folder, and none
        parent = tmp_path / str(at)
        written(parent, 1)
        written(parent, 2, update=2)
        child = os.fork()
        if not child:
            shutil.os, code = FaultyOS(at, fault, ("unlink", "rmdir")), 100
            try:
                written(parent, 3, update=3)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if fault is dies and at <= 4 else 0)
        assert readable(parent) == 3
        written(parent, 4, update=4)
        assert [checkpoint.step_of(folder) for folder in checkpoint.newest_first(parent)] == [4, 3]


def test_every_flipped_byte_and_every_cut_is_noticed_and_named(tmp_path):
    written(tmp_path, 1)
    newest = written(tmp_path, 2, update=2)
    for path in sorted(newest.iterdir()):
        sound = path.read_bytes()
        for place in range(len(sound)):
            for damaged in (sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :], sound[:place]):
                path.write_bytes(damaged)
                with pytest.raises(checkpoint.DamagedError, match=path.name):
                    checkpoint.read(newest)
        assert readable(tmp_path) == 1
        path.write_bytes(sound)
        assert readable(tmp_path) == 2


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = written(tmp_path)
    (folder / name).unlink()
    with pytest.raises(checkpoint.DamagedError, match=rf"{name}: cannot be read \(No such file"):
        checkpoint.read(folder)


def test_the_same_step_is_written_again_only_if_it_is_damaged(tmp_path):
    folder = written(tmp_path, 1)
    before = folder.stat().st_ino
    assert written(tmp_path, 1).stat().st_ino == before
    (folder / "state.json").write_text("{}")
    written(tmp_path, 1)
    assert readable(tmp_path) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffRLError, match="the checkpoint cannot be written"):
        written(tmp_path / "file")
