"""A run's settings, read again by a version that knows more of them than the one that wrote them."""

from dataclasses import fields

import pytest
import yaml

from diffrl import config
from diffrl.errors import DiffRLError


@pytest.fixture
def stored(tmp_path):
    """Return the path of a run's settings, of which some are not the defaults."""
    path = tmp_path / "config.yaml"
    words = ["env=gaussian_mixture", "algo=ddpo", "algo.kl=0.25", "seed=3", "eval_scales=[]"]
    config.write(config.load(words), path)
    return path


def change(path, edit):
    tree = yaml.safe_load(path.read_text())
    edit(tree)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def test_settings_younger_than_the_run_are_their_defaults(stored):
    whole = config.read(stored)

    def older(tree):
        del tree["keep_last"], tree["algo"]["kl_form"], tree["env"]["eta"]

    change(stored, older)
    assert config.read(stored) == whole
    assert whole.algo.kl == 0.25


def test_a_setting_that_this_version_lacks_is_named(stored):
    change(stored, lambda tree: tree["algo"].update(momentum=0.9))
    with pytest.raises(DiffRLError, match=r"config\.yaml: cannot be read as a run's settings.*momentum"):
        config.read(stored)


def test_wherever_it_is_cut_short_it_is_refused(stored):
    """Even where what is left is YAML, and every setting in it a known one."""
    lines = stored.read_text().splitlines(keepends=True)
    assert lines[-1] == f"{fields(config.Config)[-1].name}: []\n"
    for count in range(0, len(lines), 5):
        stored.write_text("".join(lines[:count]))
        with pytest.raises(DiffRLError, match="cannot be read as a run's settings"):
            config.read(stored)
    stored.write_text("".join(lines[:-1]))
    with pytest.raises(DiffRLError, match="it is cut short: its last setting, 'eval_scales', is missing"):
        config.read(stored)
