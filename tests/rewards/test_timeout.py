"""A black box that hangs: given up, named, and in nobody's way."""

import subprocess
import sys
import threading

import pytest
import torch
from test_cli import fails
from test_custom import train

from diffrl import config
from diffrl.cli import main
from diffrl.rewards.timeout import NoAnswerError, within

LONG = 100.0  # seconds: no test comes to their end


@pytest.fixture
def closed():
    """Return a door that is shut while the test runs."""
    door = threading.Event()
    yield door
    door.set()


def test_what_answers_is_as_if_it_were_called_here():
    def fails():
        raise KeyError("its own")

    assert within(LONG, lambda: 3) == 3
    with pytest.raises(KeyError, match="its own"):
        within(LONG, fails)
    with torch.no_grad():
        assert within(LONG, torch.is_grad_enabled) is False
    assert within(LONG, torch.is_grad_enabled) is True


def test_what_hangs_is_given_up(closed):
    with pytest.raises(NoAnswerError):
        within(0.01, closed.wait)


def test_a_timeout_of_the_call_s_own_is_the_call_s_own():
    def slow_server():
        raise TimeoutError("read timed out")

    with pytest.raises(TimeoutError, match="read timed out"):
        within(LONG, slow_server)


def test_the_process_ends_although_the_call_does_not():
    code = (
        "import threading; from diffrl.rewards.timeout import NoAnswerError, within\n"
        "try: within(0.01, threading.Event().wait)\n"
        "except NoAnswerError: raise SystemExit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=LONG, check=False).returncode == 2


def test_a_run_whose_reward_hangs_names_it_and_goes_on_later(tiny_path, tmp_path, monkeypatch, capsys):
    mine = "from threading import Event\n\ndef stuck(images, context):\n    Event().wait()\n"
    (tmp_path / "mine.py").write_text(mine)
    monkeypatch.chdir(tmp_path)
    command = train(tiny_path, "algo=ddpo", "algo.minibatches=1", "reward=mine.py:stuck")
    line = fails(capsys, *command, "reward_timeout=0.01")
    assert "reward stuck has not answered for 0.01 s on 2 pictures, the first of '" in line
    assert "give it longer by reward_timeout=SECONDS" in line
    (tmp_path / "mine.py").write_text(mine.replace("Event().wait()", "return images.mean((1, 2, 3))"))
    assert main([*command, "resume=auto", "reward_timeout=100"]) == 0
    assert "goes on after update 0 of 1" in " ".join(capsys.readouterr().out.split())


def test_a_time_of_nothing_is_refused(capsys):
    assert "reward_timeout=0.0: must be positive, or null" in fails(capsys, "train", "reward_timeout=0")
    assert config.load(["reward_timeout=null"]).reward_timeout is None
