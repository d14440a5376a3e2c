"""Checkpoints of the hub: in its cache, fetched, of a revision, cut short, nowhere."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import IncompleteSnapshotError
from safetensors.torch import load_file
from test_loading import assert_same, edit

from diffrl.backbones import loading
from diffrl.backbones.loading import DEFAULT_MODEL
from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.envs.sd15 import SD15
from diffrl.errors import DiffRLError


class TestHub:
    @pytest.fixture
    def cached(self, tiny_path, tmp_path, monkeypatch):
        """The cache as it is after a download of someone/tiny, whose branch `old` is another commit."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        home = tmp_path / "models--someone--tiny"
        for branch, commit in (("main", "a" * 40), ("old", "b" * 40)):
            (home / "refs").mkdir(parents=True, exist_ok=True)
            (home / "refs" / branch).write_text(commit)
            shutil.copytree(tiny_path, home / "snapshots" / commit)
        edit(home / "snapshots" / ("b" * 40) / "scheduler" / "scheduler_config.json", beta_end=0.02)
        return home / "snapshots" / ("a" * 40)

    def test_a_model_in_the_cache_needs_no_network(self, cached, tiny_path):
        assert_same(StableDiffusion.load("someone/tiny"), StableDiffusion.load(str(tiny_path)))

    def test_a_download_is_told_of_and_a_model_in_the_cache_is_not(
        self, cached, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as the tests are
        monkeypatch.setattr(loading, "snapshot_download", lambda *args, **kwargs: str(cached))
        for revision, told in ((None, False), ("b" * 40, False), ("new", True)):
            StableDiffusion.load("someone/tiny", revision=revision)
            said = f"env.model=someone/tiny: downloading, some GB, to {tmp_path}"
            assert (said in capsys.readouterr().out.replace("\n", "")) is told

    @pytest.mark.parametrize("revision", ["old", "b" * 40])
    def test_a_revision_is_followed(self, cached, revision):
        assert StableDiffusion.load("someone/tiny").scheduler.config.beta_end == 0.012
        assert StableDiffusion.load("someone/tiny", revision=revision).scheduler.config.beta_end == 0.02

    def test_a_download_cut_short_is_told_by_the_file_that_is_missing(self, cached):
        (cached / "text_encoder" / "model.safetensors").unlink()
        with pytest.raises(DiffRLError, match=r"text_encoder/model.safetensors is missing.*hf download"):
            StableDiffusion.load("someone/tiny")

    def test_the_same_where_the_cache_knows_that_it_is_incomplete(self, cached, monkeypatch):
        """As huggingface_hub says it since it keeps a list of a repository's files."""

        def incomplete(*args, **kwargs):
            raise IncompleteSnapshotError("Some files are missing", str(cached))

        (cached / "vae" / "config.json").unlink()
        monkeypatch.setattr(loading, "snapshot_download", incomplete)
        with pytest.raises(DiffRLError, match=r"vae/config.json is missing.*hf download"):
            StableDiffusion.load("someone/tiny")

    def test_pickled_weights_are_fetched_where_there_are_no_others(self, cached, tiny_path, monkeypatch):
        """Of the tiny model, whose VAE has none but pickled weights on the hub."""
        whole = cached / "vae" / "diffusion_pytorch_model.safetensors"
        weights = load_file(whole)
        whole.unlink()
        asked = []

        def download(model, revision, allow_patterns):
            asked.append(allow_patterns)
            if "vae/diffusion_pytorch_model.bin" in allow_patterns:
                torch.save(weights, whole.with_suffix(".bin"))
            return str(cached)

        monkeypatch.setattr(loading, "snapshot_download", download)
        assert_same(StableDiffusion.load("someone/tiny"), StableDiffusion.load(str(tiny_path)))
        assert not any("unet" in name and ".bin" in name for name in asked[-1])

    def test_a_model_that_is_nowhere_is_told_with_both_ways_to_supply_it(self, cached):
        with pytest.raises(DiffRLError) as caught:
            SD15(revision="v7").load()
        said = str(caught.value)
        assert said.startswith(f"env.model={DEFAULT_MODEL}: no such folder here, not in the cache")
        assert str(cached.parents[2]) in said
        assert "at revision v7" in said
        assert f"hf download {DEFAULT_MODEL} --revision v7 --include" in said
        assert "give a diffusers folder or a .safetensors file" in said
        assert "\n" not in said

    def test_a_folder_has_no_revision(self, tiny_path):
        with pytest.raises(DiffRLError, match=r"env.revision=main: .* only hub ids have revisions"):
            StableDiffusion.load(str(tiny_path), revision="main")
