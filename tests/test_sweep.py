"""A sweep trains every combination of the settings that have commas."""

import subprocess
import sys

import pytest
from test_cli import fails

from diffrl import config
from diffrl.cli import main
from diffrl.settings_file import read


def test_a_sweep_trains_every_combination(tmp_path, monkeypatch, capsys, hasty):
    monkeypatch.chdir(tmp_path)
    words = ["env=gaussian_mixture", "env.num_steps=4", "algo.updates=1"]
    words += ["algo.batch_size=8", "algo.micro_batch_size=8"]
    assert main(["train", "-m", *words, "algo.kl=0,1", "algo=ddpo", "seed=0,1"]) == 0
    runs = {path.parent.name: read(path) for path in tmp_path.glob("multirun/*/*/*/config.yaml")}
    expected = {f"algo.kl={kl}.0,seed={seed}": (kl, seed) for kl in (0, 1) for seed in (0, 1)}
    assert {name: (run.algo.kl, run.seed) for name, run in runs.items()} == expected
    assert main(["train", "--multirun", *words, "root=here", "algo=ctrl,ddpo"]) == 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["algo=ctrl", "algo=ddpo"]


def test_a_launcher_of_hydra_s_trains_them_side_by_side(tmp_path):
    words = ["env=gaussian_mixture", "env.num_steps=4", "algo=ddpo", "algo.updates=1"]
    words += ["algo.batch_size=8", "algo.micro_batch_size=8", "seed=0,1"]
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "diffrl.cli", "train", "-m", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = tmp_path.glob("multirun/*/*/seed=*/control.safetensors")
    assert sorted(path.parent.name for path in done) == ["seed=0", "seed=1"]


def test_a_sweep_over_presets_names_each_run_after_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    config.sweep(["+experiment=ctrl_paper,alignprop", "algo.updates=1,2"], runs.append)
    assert {run.name: (type(run.algo).__name__, run.algo.updates) for run in runs} == {
        f"experiment={preset},algo.updates={updates}": (algo, updates)
        for preset, algo in {"ctrl_paper": "CTRL", "alignprop": "RewardBackprop"}.items()
        for updates in (1, 2)
    }


def test_mistakes_in_a_sweep_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "Write key=value" in fails(capsys, "train", "-m", "foo")
    assert "~eval_scales: not of the form key=value" in fails(
        capsys, "train", "-m", "~eval_scales", "seed=0,1"
    )
    launched = ("algo=mine.py:Mine", "seed=0,1", "hydra/launcher=joblib")
    assert "algo=mine.py:Mine hydra/launcher=joblib: its processes cannot" in fails(
        capsys, "train", "-m", *launched
    )
    assert "give reward=" in fails(capsys, "train", "-m", "env=emoji,gaussian_mixture")
    with pytest.raises(SystemExit):
        main(["train", "-m", "env=gaussian_mixture", "algo.gamma=-1,-2", "algo=ctrl"])
    said = capsys.readouterr().err
    assert "algo.gamma=-1.0: must be positive" in said
    assert "Traceback" not in said
