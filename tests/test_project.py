"""The promises of the project's own files."""

import ast
import json
import os
import re
from pathlib import Path

import torch
import yaml
from conftest import assert_close
from PIL import Image

from diffrl.components import component

ROOT = Path(__file__).resolve().parents[1]


def commands(text):
    return [line.strip() for line in text.splitlines() if line.strip().startswith("pip install -c")]


def test_ci_runs_the_readme_s_test_command_exactly():
    first, second = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert first == "pip install -c constraints.txt -e . && diffrl train"
    assert second == "pip install -c constraints.txt -e '.[test]' && pytest"
    assert second in commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))


def imported(path):
    """The parts of diffrl that a file imports as it is loaded."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "diffrl":
            yield from (name.name for name in node.names if name.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffrl."):
            yield node.module.split(".")[1]


def modules(root):
    return [*root.glob("*.py"), *root.glob("*/__init__.py")]


def test_imports_go_down_only():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (order,) = re.findall(r"holds every module to it\): (.*?)`\.\n", text, re.DOTALL)
    layers = [re.findall(r"\w+", layer) for layer in order.split("<")]
    rank = {name: number for number, layer in enumerate(layers) for name in layer}
    root = ROOT / "diffrl"
    loaded = {path.parent.name if path.stem == "__init__" else path.stem for path in modules(root)}
    assert loaded == {"diffrl", *rank}
    for own in rank:
        for path in [root / f"{own}.py"] if (root / f"{own}.py").is_file() else (root / own).rglob("*.py"):
            for other in set(imported(path)) - {own}:
                assert rank[other] < rank[own], f"{path} imports diffrl.{other}"


def test_pushes_are_tested_from_the_oldest_python_on_and_as_a_wheel():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    said = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert jobs["oldest"]["steps"][1]["with"]["python-version"] == said[1]
    assert jobs["oldest"]["steps"][-1]["run"] == commands((ROOT / "README.md").read_text())[1].replace(
        "-c constraints.txt ", ""
    )
    for job, script in {"pinned": ".ci/run", "wheel": ".ci/wheel"}.items():
        assert jobs[job]["steps"][-1]["run"] == script
        assert os.access(ROOT / script, os.X_OK)


def test_both_commands_are_on_the_readme_s_first_screen():
    head = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:24]
    assert len(commands("\n".join(head))) == 2


def example(word: str) -> str:
    """The README's Python example with this word in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in code]
    return found


def test_the_readme_s_rewards_are_rewards(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(example("def redness"))
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1
    assert component("reward", f"{path}:redness")()(red, None).tolist() == [1.0, 1.0]
    brightness = component("reward", f"{path}:Brightness")(strength=3.0)
    assert brightness.differentiable
    assert_close(brightness(red, None), [1.0, 1.0], atol=1e-6)


def test_the_readme_s_episode_runs(capsys):
    exec(example("env.step"), {})
    assert "torch.Size([4, 3, 64, 64])" in capsys.readouterr().out


def test_the_readme_s_pipeline_draws(learnt_run):
    code = example("from_run").replace("runs/NAME", str(learnt_run)).replace("label=3", "label=1")
    names: dict[str, list[Image.Image]] = {}
    exec(code, names)
    assert [picture.size for picture in names["pictures"]] == [(16, 16)] * 4


def test_constraints_pin_every_dependency():
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = project.split("dependencies = [", 1)[1].split("\n]\n", 1)[0]
    wanted = set(re.findall(r'^\s+"([A-Za-z0-9_-]+)', block, re.MULTILINE))
    assert {"torch", "diffusers", "peft", "gymnasium"} <= wanted
    assert {name.lower().replace("_", "-") for name in wanted} <= pinned


def test_no_file_outgrows_a_sitting():
    for path in ROOT.glob("*/**/*.py"):
        if path.is_file() and ".venv" not in path.parts:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path


def test_the_pages_tables_are_those_of_the_data():
    from diffrl.benchmarks.readme import pages, written

    texts = [path.read_text(encoding="utf-8") for path in pages(ROOT)]
    assert sum(text.count("<!-- table: ") for text in texts) == 10
    assert [written(text, ROOT / "benchmarks" / "results") for text in texts] == texts


def test_a_suite_s_table_shows_a_row_whose_cells_all_failed(tmp_path):
    from diffrl.benchmarks.readme import written

    rows = [
        {"method": "a", "n_seeds": 1, "m": 0.5, "m_ci95": 0.25, "spent/pictures": 64.0},
        {"method": "b", "n_seeds": 0, "failed": 1},
    ]
    stored = {"settings": {"columns": {"M": "m", "size": "eval/per_class/0"}}, "rows": rows}
    (tmp_path / "mine.json").write_text(json.dumps(stored))
    text = written("<!-- table: mine -->\nold\n<!-- end -->", tmp_path)
    heading = "|  | seeds | M | pictures drawn |\n| --- | --- | --- | --- |\n"
    shown = "| a | 1 | .500 ±\N{NO-BREAK SPACE}.250 | 64 |\n| b | 0 | - | - |\n"
    assert text == f"<!-- table: mine -->\n{heading}{shown}<!-- end -->"
