"""A run shared by several processes is the run of one: gradients and metrics are sums over all pictures."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shared_runs
import torch
from conftest import assert_close
from safetensors.torch import load_file

from diffrl import policy, processes
from diffrl.cli import main

RUNS = {
    "ctrl": ["algo=ctrl"],
    "ddpo": ["algo=ddpo", "reward=jpeg", "algo.minibatches=2", "algo.kl=0.5", "algo.min_count=2"],
    "ddpo-reward": [
        "algo=ddpo",
        "reward=jpeg",
        "algo.minibatches=1",
        "algo.kl=0.5",
        "algo.kl_form=reward",
        "algo.per_prompt=false",
    ],
    "rwr": ["algo=rwr", "algo.epochs=2", "algo.fit_batch_size=4", "algo.per_prompt=true"],
    "rwr-sparse": [
        "algo=rwr",
        "reward=jpeg",
        "algo.weights=percentile",
        "algo.percentile=50",
        "algo.fit_batch_size=2",
    ],
    "classifier_free": ["algo=classifier_free", "algo.epochs=2", "algo.fit_batch_size=4"],
}
SMALL = [
    "env.num_steps=2",
    "env.guidance_scale=1",
    "env.checkpointing=true",
    "checkpoint_every=1",
    "algo.updates=1",
    "algo.learning_rate=1e-6",  # Adam's first steps have the length of the rate, whatever the gradient:
    "algo.embedding_learning_rate=1e-6",  # noise in a small one would lead the next step elsewhere
    "algo.batch_size=6",
    "algo.micro_batch_size=1",
    "eval_every=9",
    "eval_pictures=2",
]


def commands(tiny_path, root, names=tuple(RUNS)):
    return [
        ["train", f"env.model={tiny_path}", f"root={root}", f"name={name}", *SMALL, *words]
        + ["reward.num_pictures=40", "reward.num_classes=2"] * ("reward=jpeg" not in words)
        for name, words in RUNS.items()
        if name in names
    ]


def launch(number, words, cache, log):
    """Begin runs that `number` processes share, as torchrun does, but for each one's imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffrl.train", "shared_runs"])
    run = context.Process(target=shared_runs.launch, args=(number, words, cache, log))
    run.start()
    return run


def numbers(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {name for line in lines for name in line if name.startswith("time/") or "seconds" in name}
    return [
        {
            name: value
            for name, value in line.items()
            if name not in timed and isinstance(value, float | int)
        }
        for line in lines
    ]


@pytest.fixture(scope="module")
def alone(tiny_path, tmp_path_factory):
    """Return the folder of the runs of one process, and the cache of their classifier."""
    root, cache = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(cache))
        patch.setattr(policy, "LoraConfig", policy.LoraConfig)
        shared_runs.without_zeros()
        for command in commands(tiny_path, root):
            assert main(command) == 0
    return root, cache


# of 6 micro-batches, 4 processes have 2, 2, 1 and 1
@pytest.mark.parametrize(("count", "names"), [(2, tuple(RUNS)), (4, ("ctrl", "ddpo", "rwr-sparse"))])
def test_the_result_does_not_depend_on_how_many_share_the_run(count, names, alone, tiny_path, tmp_path):
    root, cache = alone
    run = launch(count, commands(tiny_path, tmp_path, names), cache, tmp_path / "log")
    run.join()
    said = (tmp_path / "log").read_text()
    assert run.exitcode == 0, said
    assert "".join(said.split()).count("Next:diffrleval") == len(names)  # one of them reports each
    for name in names:
        one, several = numbers(root / name), numbers(tmp_path / name)
        assert [line.keys() for line in one] == [line.keys() for line in several]
        (ours,), (theirs,) = ([line for line in lines if "train/loss" in line] for lines in (one, several))
        for key, value in ours.items():
            assert_close(theirs[key], value, atol=1e-6 * (1 + abs(value)))
        after_one = "checkpoints/step-000001/tensors.safetensors"
        one, several = load_file(root / name / after_one), load_file(tmp_path / name / after_one)
        gradients = [key for key in one if key.endswith("exp_avg")]  # their mean over the steps
        assert len(gradients) == sum(key.startswith("policy.") for key in one)
        for key in gradients:
            largest = one[key].abs().max()
            assert largest > 0
            assert_close(several[key] / largest, one[key] / largest, atol=1e-6)


def test_stopped_and_resumed_by_two_it_is_the_run_of_two_that_never_was(alone, tiny_path, tmp_path):
    """The last checkpoint and what came after it are taken away, as a kill does."""
    command = [*commands(tiny_path, tmp_path)[0], "algo.updates=2"]
    again = ["train", "--resume", str(tmp_path / "ctrl")]
    run = launch(2, [command], alone[1], tmp_path / "log")
    run.join()
    assert run.exitcode == 0, (tmp_path / "log").read_text()
    last, metrics = tmp_path / "ctrl/checkpoints/step-000002", tmp_path / "ctrl/metrics.jsonl"
    tensors, lines = load_file(last / "tensors.safetensors"), numbers(tmp_path / "ctrl")
    shutil.rmtree(last)
    run = launch(2, [again], alone[1], tmp_path / "log2")
    run.join()
    said = (tmp_path / "log2").read_text()
    assert run.exitcode == 0, said
    assert "".join(said.split()).count("goesonafterupdate1of2") == 1
    assert numbers(tmp_path / "ctrl") == lines
    assert metrics.read_text().count('"update": 2,') == 2  # training's and the evaluation's, once
    resumed = load_file(last / "tensors.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())


LATE = """
import os
import time
from diffrl.envs.sd15 import SD15

class Late(SD15):
    def load(self):
        if os.environ["RANK"] == "0":
            time.sleep(3)  # long enough for the other to come to the fit
        return super().load()
"""


def test_the_first_one_draws_and_fits_for_all_however_late_it_comes(tiny_path, tmp_path):
    """It alone speaks: by another one the terminal would stay blank for as long as that takes."""
    (tmp_path / "late.py").write_text(LATE)
    words = ["fit", f"env={tmp_path / 'late.py'}:Late", f"env.model={tiny_path}", "env.num_steps=2"]
    words += ["reward.num_pictures=40", "reward.num_classes=2"]
    run = launch(2, [words], tmp_path / "cache", tmp_path / "log")
    run.join()
    said = (tmp_path / "log").read_text()
    assert run.exitcode == 0, said
    assert said.count("drawing the offline dataset 40/40") == 1, said
    assert "from the cache" not in said
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_a_gpu_is_the_current_one_and_multiplies_as_the_precision_says(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    assert processes.join(torch.device("cpu"), tf32=True) == torch.device("cpu")
    assert said == []
    for name, tf32, expected in (
        ("cuda:1", True, [torch.device("cuda:1"), "high"]),
        ("cuda", True, ["high"]),
        ("cuda", False, ["highest"]),
    ):
        assert processes.join(torch.device(name), tf32=tf32) == torch.device(name)
        assert said == expected
        assert torch.backends.cudnn.allow_tf32 is tf32
        said.clear()


def test_more_processes_than_micro_batches_are_refused(tiny_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 7)
    command = ["train", f"env.model={tiny_path}", f"root={tmp_path}", *SMALL, "algo=rwr", "reward=jpeg"]
    assert main(command) == 2
    assert "6 micro-batches for 7 processes; each needs one at least" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_who_fails_takes_no_leave_of_others_that_wait_for_it(monkeypatch):
    left = []
    monkeypatch.setattr(processes.atexit, "unregister", left.append)
    with processes.together():
        pass
    with pytest.raises(KeyboardInterrupt), processes.together():  # all of them hear it
        raise KeyboardInterrupt
    assert not left
    with pytest.raises(ValueError, match="of one alone"), processes.together():
        raise ValueError("of one alone")
    assert left == [processes._leave]


BROKEN = """
import os
calls = 0

def scorer(images, context):
    global calls
    calls += 1
    if calls > 20 and os.environ["RANK"] == "1":
        raise OSError("the scorer's socket is gone")
    return images.mean((1, 2, 3))
"""


def test_accelerate_s_own_command_shares_a_run(tmp_path):
    words = ["env=gaussian_mixture", "env.num_steps=4", "algo=ddpo", "algo.updates=2", "algo.batch_size=8"]
    words = ["train", *words, "algo.micro_batch_size=2", f"root={tmp_path}", "device=cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, "-m", "diffrl.cli", *words, "name=two"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "".join(done.stdout.split()).count("two:donein") == 1  # the terminal breaks lines where it will
    assert main([*words, "name=one"]) == 0
    for one, several in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one.keys() == several.keys()
        for name, value in one.items():
            assert_close(several[name], value, atol=1e-4 * (1 + abs(value)))


def test_one_that_fails_ends_the_others_with_its_error_shown(alone, tiny_path, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    reward = f"reward={tmp_path / 'broken.py'}:scorer"
    words = [*commands(tiny_path, tmp_path, ["ddpo"])[0], reward, "algo.updates=100000"]
    run = launch(2, [words], alone[1], tmp_path / "log")
    run.join(90)  # its start, and a minute
    said = (tmp_path / "log").read_text()
    assert run.exitcode, said
    assert "the scorer's socket is gone" in said
    assert "update 0:" in said  # it had begun
    assert list((tmp_path / "ddpo" / "checkpoints").iterdir())


@pytest.mark.parametrize("how", ["dies", "interrupted"])
def test_one_that_dies_and_ctrl_c_end_them_all(how, alone, tiny_path, tmp_path):
    """The one that dies ends the others with its error; Ctrl-C leaves a run that can be resumed."""
    endless = [*commands(tiny_path, tmp_path)[0], "algo.updates=100000"]
    run = launch(2, [endless], alone[1], tmp_path / "log")
    metrics = tmp_path / "ctrl" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (
        not (metrics.exists() and b'"update": 1,' in metrics.read_bytes()) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    if how == "dies":
        os.kill(children[1], signal.SIGKILL)
    else:
        os.kill(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    if how == "dies":
        assert "Signal 9 (SIGKILL)" in (tmp_path / "log").read_text()
    else:
        assert list((tmp_path / "ctrl" / "checkpoints").iterdir())
