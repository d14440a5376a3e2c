"""What people read about the settings: the dataclasses alone are its source."""

import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass

import pytest
from omegaconf import OmegaConf

from diffrl import config, help
from diffrl.cli import main
from diffrl.config import GROUPS


@dataclass
class Inner:
    depth: int = 3  # of the well


@dataclass
class Base:
    plain: int = 1
    beside: str = "a"  # of the base
    kept: float = 1e-5  # is kept


@dataclass
class Own(Base):
    beside: str = "#b"  # of its own
    # two lines
    # above
    above: list[int] = field(default_factory=lambda: [1, 2])
    apart: list[int] = field(
        default_factory=lambda: [0] * 2,  # within
    )  # and after
    inner: Inner = field(default_factory=Inner)


def test_a_setting_s_help_is_the_comment_at_its_field():
    assert help.settings(OmegaConf.structured(Own), "own.") == [
        ("own.plain", "1", ""),
        ("own.beside", "'#b'", "of its own"),
        ("own.kept", "1.0e-05", "is kept"),
        ("own.above", "[1,2]", "two lines above"),
        ("own.apart", "[0,0]", "within and after"),
        ("own.inner.depth", "3", "of the well"),
    ]


KINDS = [kind for known in GROUPS.values() for kind in known.values()]


@pytest.mark.parametrize("kind", [*KINDS, config.LoRA, config.Config], ids=lambda kind: kind.__name__)
def test_every_setting_has_a_line_of_help(kind):
    parts = {"algo", "env", "reward", "guidance", "policy"}  # have a section of their own each
    names = {f.name for f in fields(kind) if not is_dataclass(f.type)} - parts
    nested = {f.name for f in fields(kind) if is_dataclass(f.default_factory)}
    assert names - nested <= help.comments(kind).keys()
    assert help.summary(kind).endswith(".")


@pytest.mark.parametrize("words", [[], ["algo=ddpo", "env=sd15", "reward=jpeg"], ["env=gaussian_mixture"]])
def test_what_is_shown_can_be_typed(words):
    words = [*words, "name=its_here", "eval_scales=[0.5,1]"]
    chosen = config.load(words)
    shown = [setting for section in help.sections(words) for setting in section.settings]
    choices = [f"{group}={config.chosen(chosen, group)}" for group in GROUPS]
    assert config.load([*choices, *(f"{key}={value}" for key, value, _ in shown)]) == chosen


def test_train_help_is_about_what_is_chosen_wherever_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "algo=ddpo", "--help", "seed=7"]) == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "seed=7 of all that is drawn" in lines
    assert "algo.batch_size=64 pictures an update" in lines  # of its preset on this env
    assert (
        "algo.kl_form=loss reward: sampled log-ratios in the return; loss: analytic KL, both halves"
        in lines
    )
    assert not any(line.startswith("algo.truncation") for line in lines)
    assert any("Or ctrl, rwr," in line for line in lines)
    assert main(["train", "-h", "reward=vlm"]) == 0  # which cannot be without its model
    assert "reward.model=null" in capsys.readouterr().out
    assert main(["train", "-h", "algo=ddop"]) == 2
    assert "Did you mean 'ddpo'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def imported_by_the_command(words):
    """Return the modules there after `diffrl WORDS`, and whether its envs are known to Gymnasium."""
    code = f"""if True:
        import sys
        sys.argv = ["/usr/bin/diffrl", *{words}]
        from diffrl.cli import main
        main()
        print("imported:", *sys.modules)
        from gymnasium import registry
        print("diffrl/Emoji-v0" in registry)
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    *_, modules, known = done.stdout.splitlines()
    return set(modules.split()), known == "True"


def test_help_imports_nothing_heavy():
    modules, known = imported_by_the_command([])
    assert not modules & {"torch", "numpy", "gymnasium", "hydra", "omegaconf", "rich", "yaml", "shtab"}
    assert not known
    assert imported_by_the_command(["list"])[1]
