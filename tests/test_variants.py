"""Checkpoints whose weights are there in half precision alone, and files that are not there at all."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from huggingface_hub.errors import IncompleteSnapshotError
from safetensors.torch import save_file
from test_loading import assert_same

from diffrl.backbones import loading
from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.errors import DiffRLError

pytestmark = pytest.mark.filterwarnings("ignore:.*fp16 alone")

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def half(tiny_path, tmp_path):
    """The tiny model as `variant="fp16"` leaves it: its files are named by diffusers and transformers."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    names = {path.parent.name: path.name for path in (tmp_path / "half").glob("*/*.safetensors")}
    assert names == {part: f"{stem}.fp16.safetensors" for part, stem in STEMS.items()}
    # on the hub both variants share one config, which is of the plain one
    shutil.copy(tiny_path / "text_encoder" / "config.json", tmp_path / "half" / "text_encoder")
    return tmp_path / "half"


@pytest.fixture
def rounded(tiny_path):
    """The tiny model in full precision, its weights those that fp16 has."""
    backbone = StableDiffusion.load(str(tiny_path))
    for part in (backbone.unet, backbone.vae, backbone.text_encoder):
        for weight in part.parameters():
            weight.data = weight.data.half().float()
    return backbone


class TestFolder:
    def test_the_fp16_variant_is_read_where_there_is_no_other(self, half, rounded, tiny_path):
        with pytest.warns(UserWarning, match="unet is there in fp16 alone: rounded weights"):
            assert_same(StableDiffusion.load(str(half)), rounded)
        full = StableDiffusion.load(str(tiny_path))
        assert not torch.equal(rounded.unet.conv_in.weight, full.unet.conv_in.weight)

    @pytest.mark.parametrize("part", STEMS)
    def test_each_part_is_looked_at_for_itself(self, half, rounded, tiny_path, part):
        """All but one have their plain weights, and fp16 ones of another model beside them."""
        expected = StableDiffusion.load(str(tiny_path))
        setattr(expected, part, getattr(rounded, part))
        for other in STEMS.keys() - {part}:
            save_file({"x": torch.zeros(1)}, half / other / f"{STEMS[other]}.fp16.safetensors")
            shutil.copy(tiny_path / other / f"{STEMS[other]}.safetensors", half / other)
        assert_same(StableDiffusion.load(str(half)), expected)

    def test_a_config_that_says_float16_rounds_no_weight(self, tiny_path, tmp_path):
        folder = shutil.copytree(tiny_path, tmp_path / "said")
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
        assert_same(StableDiffusion.load(str(folder)), StableDiffusion.load(str(tiny_path)))

    @pytest.mark.parametrize("part", STEMS)
    def test_with_neither_the_plain_weights_are_named(self, half, part):
        (half / part / f"{STEMS[part]}.fp16.safetensors").unlink()
        with pytest.raises(DiffRLError, match=rf"{part}/{STEMS[part]}.safetensors is missing; was the dow"):
            StableDiffusion.load(str(half))


class TestHub:
    @pytest.fixture
    def cached(self, half, tmp_path, monkeypatch):
        """The cache as it is after a download of someone/tiny in fp16."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        home = tmp_path / "models--someone--tiny"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("a" * 40)
        return shutil.move(half, home / "snapshots" / ("a" * 40))

    def test_the_fp16_variant_in_the_cache_needs_no_network(self, cached, rounded):
        assert_same(StableDiffusion.load("someone/tiny"), rounded)

    def test_nor_where_the_cache_knows_that_it_has_no_other(self, cached, rounded, monkeypatch):
        """As huggingface_hub says it since it keeps a list of a repository's files."""

        def incomplete(*args, **kwargs):
            raise IncompleteSnapshotError("Some files are missing", str(cached))

        monkeypatch.setattr(loading, "snapshot_download", incomplete)
        assert_same(StableDiffusion.load("someone/tiny"), rounded)

    def test_it_is_fetched_last_and_where_there_is_no_other(self, cached, tiny_path, rounded, monkeypatch):
        """Of the tiny model, whose VAE has but fp16 weights on the hub, and the rest its plain ones."""
        expected = StableDiffusion.load(str(tiny_path))
        expected.vae = rounded.vae
        for path in cached.rglob("*.fp16.safetensors"):
            if path.parent.name != "vae":
                path.unlink()
                plain = f"{STEMS[path.parent.name]}.safetensors"
                shutil.copy(tiny_path / path.parent.name / plain, path.parent)
        half = cached / "vae" / "diffusion_pytorch_model.fp16.safetensors"
        on_the_hub = half.read_bytes()
        half.unlink()
        asked = []

        def download(model, revision, allow_patterns):
            asked.append(allow_patterns)
            if f"vae/{half.name}" in allow_patterns:
                half.write_bytes(on_the_hub)
            return str(cached)

        monkeypatch.setattr(loading, "snapshot_download", download)
        assert_same(StableDiffusion.load("someone/tiny"), expected)
        kinds = [{"." + name.split(".", 1)[1] for name in names if "vae/" in name} for names in asked]
        assert kinds[-2] == {".safetensors", ".bin"}
        assert kinds[-1] == {".safetensors", ".bin", ".fp16.safetensors"}
        assert not any(name.startswith("unet/") and "fp16" in name for name in asked[-1])


class TestNowhere:
    @pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt", "sd"])
    def test_a_path_is_told_with_the_place_and_the_ways_to_supply_it(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        kind = "file" if "." in name else "folder"
        for word, place in ((f"my/own/{name}", f"{tmp_path}/my/own/{name}"), (f"/gone/{name}",) * 2):
            with pytest.raises(DiffRLError) as caught:
                StableDiffusion.load(word)
            assert str(caught.value) == (
                f"env.model={word}: no such {kind}, {place}. Give the path of a .safetensors file or of a "
                "diffusers folder, or a hub id 'owner/name'."
            )
