"""The examples do what their first lines say."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from diffrl.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FAST = ["env.num_steps=2", "env.guidance_scale=1", "algo.updates=1", "algo.batch_size=4", "eval_pictures=2"]
FAST += ["algo.micro_batch_size=4", "name=run"]
OF_DDPO = ["algo.minibatches=1"]


def commands() -> list[str]:
    """Every `diffrl train` of the examples, without line ends."""
    found = []
    for path in sorted(EXAMPLES.iterdir()):
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace("\\\n", " ").replace(' "$@"', "")
            found += re.findall(r"diffrl (train [^`\n]+)", text)
    return found


def test_each_has_a_command_or_is_one():
    assert len(commands()) == 7
    listed = re.findall(r"^\| \[`(.*?)`\]", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M)
    assert {*listed, "README.md"} == {path.name for path in EXAMPLES.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", commands())
def test_its_command_trains(command, tiny_path, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    words = shlex.split(command)
    more = OF_DDPO if "algo=ddpo" in words else []
    if not any(word.startswith("reward") for word in words):
        more = ["reward.num_pictures=40"]  # the default one is fitted
    assert main([*words, f"env.model={tiny_path}", *FAST, *more, f"root={tmp_path}"]) == 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_they_have_no_fault(unfitted, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "check.py"))
    assert capsys.readouterr().out.splitlines()[-1] == "no faults"
