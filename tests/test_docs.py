"""What the pages say is true: examples run, commands and settings exist, nothing is left out."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from diffrl import cli, config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MODULES = [
    path.relative_to(ROOT)
    for folder in ("diffrl", "algorithms", "envs", "rewards")
    for path in sorted((ROOT / folder).glob("**/*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_examples_in_docstrings_run(path):
    parts = path.with_suffix("").parts
    name = ".".join(parts if parts[0] == "diffrl" else ("diffrl", *parts))
    tried = doctest.testmod(importlib.import_module(name))
    assert tried.attempted > 1
    assert tried.failed == 0


def commands(text: str) -> list[list[str]]:
    """Return the words of each `diffrl` command in the blocks of a page."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    shell = [block for language, block in blocks if language != "python"]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    found = [
        shlex.split(line[line.index("diffrl ") :], comments=True)
        for line in lines
        if " diffrl " in f" {line}"
    ]
    return [words[1:] for words in found if words[0] == "diffrl"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_are_commands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(\s*# my_rewards.py\n.*?)```", text, re.DOTALL):
        indent = re.match(r"\s*", code)[0]
        Path("my_rewards.py").write_text("\n".join(line.removeprefix(indent) for line in code.splitlines()))
    for words in commands(text):
        options, rest = cli.parser().parse_known_args(words)
        asked = [word for word in [*getattr(options, "words", []), *rest] if re.match(r"\+?[\w./]+=", word)]
        if options.command in ("train", "fit", "doctor", "eval", "sample") and not getattr(
            options, "multirun", 0
        ):
            config.composed(asked)
        assert options.command or words == ["--help"], words


def test_the_parser_of_commands_finds_them():
    text = "```\npip x && diffrl train \\\n  seed=1  # one\n```\ndiffrl list\n"
    text += "```python\nfrom diffrl import x\n```"
    assert commands(text) == [["train", "seed=1"]]


def test_every_setting_that_trl_s_are_compared_with_exists():
    text = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    words = ["algo=ddpo", "env=sd15"], ["algo=reward_backprop", "env=sd15"]
    known = {key for chosen in words for key in config._keys(config.composed(chosen))}
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    here = {name for row in rows for name in re.findall(r"`([\w.]+)[`=]", row[-2 if len(row) == 3 else 2])}
    assert len(here) > 30
    assert here <= known | set(config.GROUPS)


def test_every_component_has_its_settings_on_a_page():
    told = {
        line
        for page in PAGES
        for line in re.findall(r"^<!-- settings: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    known = {f"{group}={name}" for group, names in config.GROUPS.items() for name in names}
    known -= {"guidance=none", *(f"{group}=custom" for group in config.GROUPS)}  # nothing to set; files
    assert known <= told
    assert {"run", "policy"} <= told
