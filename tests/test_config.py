"""A run's settings, read again by a version that knows more of them than the one that wrote them."""

import shlex
from dataclasses import fields

import pytest
import yaml

from diffrl import config, settings_file
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError


@pytest.fixture
def stored(tmp_path):
    """Return the path of a run's settings, of which some are not the defaults."""
    path = tmp_path / "config.yaml"
    words = ["env=gaussian_mixture", "algo=ddpo", "algo.kl=0.25", "seed=3", "eval_scales=[]"]
    settings_file.write(config.load(words), path)
    return path


def change(path, edit):
    tree = yaml.safe_load(path.read_text())
    edit(tree)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def test_settings_younger_than_the_run_are_their_defaults(stored):
    whole = settings_file.read(stored)

    def older(tree):
        del tree["keep_last"], tree["algo"]["kl_form"], tree["env"]["eta"]

    change(stored, older)
    assert settings_file.read(stored) == whole
    assert whole.algo.kl == 0.25


def test_a_setting_that_this_version_lacks_is_named(stored):
    change(stored, lambda tree: tree["algo"].update(momentum=0.9))
    with pytest.raises(DiffRLError, match=r"config\.yaml: cannot be read as a run's settings.*momentum"):
        settings_file.read(stored)


def test_wherever_it_is_cut_short_it_is_refused(stored):
    """Even where what is left is YAML, and every setting in it a known one."""
    lines = stored.read_text().splitlines(keepends=True)
    assert lines[-1] == f"{fields(config.Config)[-1].name}: []\n"
    for count in range(0, len(lines), 5):
        stored.write_text("".join(lines[:count]))
        with pytest.raises(DiffRLError, match="cannot be read as a run's settings"):
            settings_file.read(stored)
    stored.write_text("".join(lines[:-1]))
    with pytest.raises(DiffRLError, match="it is cut short: its last setting, 'eval_scales', is missing"):
        settings_file.read(stored)


PRESETS = sorted(path.stem for path in (config.CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_whose_updates_take_minutes_keeps_each_of_them(preset):
    chosen = config.load([f"+experiment={preset}"])
    if type(chosen.env) is SD15 and chosen.algo.updates > 1:
        assert chosen.checkpoint_every == 1


@pytest.mark.parametrize("algo", sorted(config.GROUPS["algo"]))
def test_on_stable_diffusion_few_pictures_are_held_and_each_update_is_kept(algo):
    reward = "compressibility" if algo != "ddpo" else "jpeg"
    words = [f"algo={algo}", "env=sd15", f"reward={reward}"]
    chosen = config.load(words)
    assert (chosen.algo.micro_batch_size, chosen.checkpoint_every) == (4, 1)
    assert chosen.algo.batch_size == config.GROUPS["algo"][algo]().batch_size
    asked = config.load([*words, "algo.micro_batch_size=2", "checkpoint_every=5"])
    assert (asked.algo.micro_batch_size, asked.checkpoint_every) == (2, 5)
    assert config.load([f"algo={algo}"]).checkpoint_every == 50  # the emoji model's


def test_on_sd15_published_values_take_the_place_of_those_tuned_on_emoji():
    assert config.load(["algo=ctrl", "env=sd15"]).algo.gamma == 10 * 4 * 64 * 64
    assert config.load(["algo=ctrl", "env=sd15", "algo.gamma=3"]).algo.gamma == 3
    assert config.load(["+experiment=ctrl_paper"]).algo.gamma == 10
    assert config.load(["algo=classifier_free", "env=sd15"]).algo.learning_rate == 1e-4
    assert config.load(["algo=rwr", "env=sd15"]).algo.embedding_learning_rate == 1e-3


def test_a_preset_wins_over_what_its_env_brings(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n# a\ndefaults:\n  - override /env: sd15\n"
    text += "algo:\n  micro_batch_size: 8\ncheckpoint_every: 7\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(config, "CONF", tmp_path)
    chosen = config.load([f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine"])
    assert (chosen.algo.micro_batch_size, chosen.checkpoint_every) == (8, 7)


TABLE = """
from pathlib import Path

class T:
    table: Path = Path("head.pth")
    classifier: int = 2  # no path, for all its name

    def __call__(self, images, context):
        return images[:, 0, 0, 0]
"""


class TestFiles:
    """Files of the user's own, which a run names and may have to find from another folder."""

    @pytest.fixture
    def words(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my words.txt").write_text("cat\n")
        (tmp_path / "simple_animals").write_text("a file that is called like a list")
        (tmp_path / "mine.py").write_text(
            "def red(images, context):\n    return images[:, 0].mean((1, 2))\n"
        )
        return ["algo=ddpo", "prompts='my words.txt'", "reward=[mine.py:red,jpeg]"]

    def test_they_are_stored_by_their_full_paths(self, words, tmp_path):
        chosen = config.load(words)
        assert (chosen.prompts, chosen.eval_prompts) == (f"{tmp_path}/my words.txt", None)
        assert config.load(["algo=ddpo"]).prompts == "simple_animals"
        imagenet = config.load(["prompts=imagenet_animals:mine.py"]).prompts
        assert imagenet == f"imagenet_animals:{tmp_path}/mine.py"

    def test_those_of_parts_and_paths_of_a_class_too(self, words, tmp_path):
        (tmp_path / "head.pth").write_text("")
        (tmp_path / "mine.py").write_text(TABLE)
        words = ["algo=ddpo", "reward=[mine.py:T,aesthetic]", "reward.parts.aesthetic.mlp=head.pth"]
        parts = config.load(words)
        assert parts.reward.parts.T.table == tmp_path / "head.pth"
        assert parts.reward.parts.T.classifier == 2
        assert parts.reward.parts.aesthetic.mlp == f"{tmp_path}/head.pth"

    def test_a_link_is_stored_by_its_own_path(self, tmp_path, monkeypatch):
        """What it leads to may lie elsewhere under another name, as in the hub's cache."""
        (tmp_path / "blobs").mkdir()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "b").symlink_to("../blobs")
        for name in ("c.pth", "head.pth"):
            (tmp_path / "blobs" / f"of {name}").write_text("")
            (tmp_path / name).symlink_to(f"blobs/of {name}")
        (tmp_path / "mine.py").write_text(TABLE)
        monkeypatch.chdir(tmp_path / "blobs")
        words = ["algo=ctrl", "reward=compressibility", "reward.classifier=../c.pth"]
        assert config.load(words).reward.classifier == f"{tmp_path}/c.pth"
        monkeypatch.chdir(tmp_path)
        words = ["algo=ddpo", "reward=[mine.py:T,aesthetic]", "reward.parts.aesthetic.mlp=a/b/../head.pth"]
        parts = config.load([*words, "reward.parts.T.table=head.pth"]).reward.parts
        assert parts.aesthetic.mlp == f"{tmp_path}/head.pth"
        assert parts.T.table == tmp_path / "head.pth"

    def test_elsewhere_they_go_by_their_names(self, words, tmp_path):
        chosen = config.load(words)
        line = settings_file.command(chosen, here=False)
        assert str(tmp_path) in settings_file.command(chosen)
        assert str(tmp_path) not in line
        again = config.load(shlex.split(line)[2:])  # they lie in this folder
        assert settings_file.same(settings_file.facts(again), chosen)
        settings_file.write(chosen, tmp_path / "config.yaml", here=False)
        text = (tmp_path / "config.yaml").read_text()
        assert "chosen_by: '[mine.py:red,jpeg]'" in text
        assert "prompts: my words.txt" in text
        assert f"model: {chosen.env.model}" in text

    def test_a_model_is_a_folder_of_an_env_and_a_name_of_a_server(self, words, tmp_path):
        (tmp_path / "models" / "llava").mkdir(parents=True)
        words = ["env.model=models/llava", "algo=ddpo", "reward=vlm", "reward.model=models/llava"]
        chosen = config.load(words)
        assert chosen.env.model == f"{tmp_path}/models/llava"
        assert chosen.reward.model == "models/llava"

    def test_an_address_is_no_path(self):
        chosen = config.load(
            ["algo=ddpo", "reward=vlm", "reward.model=m", "reward.base_url=http://host/v1"]
        )
        assert "http://host/v1" in settings_file.command(chosen, here=False)
