import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close
from huggingface_hub import constants
from test_cli import fails
from tiny_clip import SIDE, write_clip
from transformers import CLIPModel, CLIPProcessor

from diffrl.quality import brisque, clip_score, diversity, image_statistics
from diffrl.rewards.clip import CLIP


def flat(*values):
    return torch.stack([torch.full((3, 4, 4), value) for value in values])


class TestDiversity:
    def test_pairs_of_a_group_only_count(self):
        """Distances .2 within a, none within b, which has one; .9 apart across groups."""
        assert_close(diversity(flat(0.1, 0.3, 1.0), ["a", "a", "b"]), 0.2, atol=1e-6)

    def test_it_is_the_mean_over_pairs(self):
        """0, .3, .9: distances .3, .6, .9."""
        assert_close(diversity(flat(0.0, 0.3, 0.9), ["a"] * 3), 0.6, atol=1e-6)

    def test_one_picture_a_group_says_nothing(self):
        assert diversity(flat(0.1, 0.3), ["a", "b"]) is None


def picture(rows):
    """Return `[1, 3, H, W]` of rows of (red, green, blue)."""
    return torch.tensor(rows, dtype=torch.float32).permute(2, 0, 1)[None]


class TestImageStatistics:
    BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)

    def of(self, rows):
        return image_statistics(picture(rows))

    @pytest.mark.parametrize("grey", [0.0, 0.3, 1.0])
    def test_a_flat_grey_has_its_brightness_and_nothing_else(self, grey):
        found = self.of([[(grey,) * 3] * 5] * 4)
        assert_close(found["brightness"], grey, atol=1e-6)
        assert [found[name] for name in ("edge_density", "saturation", "colour_entropy")] == [0, 0, 0]

    def test_a_checkerboard_is_all_edges_and_one_bit(self):
        rows = [[(self.BLACK, self.WHITE)[(i + j) % 2] for j in range(6)] for i in range(6)]
        found = self.of(rows)
        assert_close(found["edge_density"], 1.0, atol=1e-9)
        assert_close(found["brightness"], 0.5, atol=1e-6)
        assert_close(found["colour_entropy"], 1.0, atol=1e-6)

    def test_vertical_stripes_have_edges_across_alone(self):
        """Of 4 x 3 pairs side by side all, of 3 x 4 pairs one above the other none."""
        found = self.of([[self.BLACK, self.WHITE, self.BLACK, self.WHITE]] * 4)
        assert_close(found["edge_density"], 12 / 24, atol=1e-6)

    @pytest.mark.parametrize(("step", "density"), [(0.045, 0.0), (0.055, 0.5)])
    def test_an_edge_is_a_twentieth_of_the_range(self, step, density):
        found = self.of([[(i % 2 * step + 0.3,) * 3 for i in range(4)]] * 4)
        assert_close(found["edge_density"], density, atol=1e-6)

    def test_pure_hues_are_saturated_and_as_bright_as_the_eye_has_them(self):
        """Three quarters of the pixels of the last are tinted: (.8 - .4) / .8."""
        for hue, luma in ((self.RED, 0.299), (self.GREEN, 0.587), (self.BLUE, 0.114)):
            found = self.of([[hue] * 2] * 2)
            assert_close(found["saturation"], 1.0, atol=1e-6)
            assert_close(found["brightness"], luma, atol=1e-6)
        pink = (0.8, 0.4, 0.4)
        assert_close(self.of([[pink, pink], [pink, self.WHITE]])["saturation"], 0.75 * 0.5, atol=1e-6)

    def test_entropy_is_shannon_s_in_bits(self):
        """Shares 1/2, 1/4, 1/8, 1/8: 1.75 bits. All 512 colours alike: 9. Within a level, one colour."""
        row = [self.RED] * 4 + [self.GREEN] * 2 + [self.BLUE, self.WHITE]
        assert_close(self.of([row])["colour_entropy"], 1.75, atol=1e-6)
        middles = [(k + 0.5) / 8 for k in range(8)]
        every = [[(r, g, b) for b in middles for g in middles] for r in middles]
        assert_close(self.of(every)["colour_entropy"], 9.0, atol=1e-5)
        assert self.of([[(0.26, 0.5, 0.0), (0.37, 0.6, 0.12)]])["colour_entropy"] == 0

    def test_several_pictures_are_their_mean(self):
        many = torch.cat([torch.zeros(70, 3, 4, 4), torch.ones(30, 3, 4, 4)])  # more than one batch
        assert_close(image_statistics(many)["brightness"], 0.3, atol=1e-6)


class TestBrisque:
    def test_without_the_package_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "brisque", None)
        assert brisque(flat(0.1)) == "not available: pip install 'diffrl[metrics]'"

    def test_pixels_are_handed_over_and_flat_pictures_left_out(self, monkeypatch):
        class Fake:
            def score(self, picture):
                assert (picture.shape, picture.dtype) == ((4, 4, 3), np.uint8)
                return float("nan") if picture.max() == 0 else float(picture.mean())

        monkeypatch.setitem(sys.modules, "brisque", SimpleNamespace(BRISQUE=Fake))
        assert brisque(flat(0.2, 0.0, 0.4)) == (51 + 102) / 2
        assert brisque(flat(0.0)) == "not available: all pictures are flat"

    def test_the_real_one_finds_noise_unnatural(self):
        pytest.importorskip("brisque", reason="needs the extra 'metrics'")
        shading = torch.linspace(0, 1, 64).expand(1, 3, 64, 64).sin()
        disc = (torch.cartesian_prod(*2 * [torch.arange(64.0) - 32]).norm(dim=1) < 20).view(64, 64)
        picture = torch.where(disc, 1 - shading, shading)
        noisy = (picture + 0.2 * torch.randn(1, 3, 64, 64, generator=torch.manual_seed(0))).clamp(0, 1)
        assert brisque(noisy) > 60
        both = torch.cat([picture, noisy])
        assert brisque(both) == pytest.approx((brisque(picture) + brisque(noisy)) / 2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


class TestClipScore:
    @pytest.mark.parametrize(("side", "tolerance"), [(SIDE, 1e-3), (40, 0.2)])
    def test_it_is_a_hundred_times_the_mean_cosine_of_stock_clip(self, clip, side, tolerance):
        """Where CLIP's own preprocessing resizes, it rounds to 8 bits."""
        images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
        images = (255 * images).round() / 255
        words = ["cat", "dog", "cat"]
        model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
        cosines = []
        for image, word in zip(images, words, strict=True):
            pixels = (255 * image).byte().permute(1, 2, 0).numpy()
            out = model(**processor(text=[word], images=[pixels], return_tensors="pt"))
            cosines.append(float((out.logits_per_image / model.logit_scale.exp()).detach()))
        score = clip_score(images, words, clip)
        assert abs(score) > 1.0
        assert_close(score, max(100 * sum(cosines) / 3, 0.0), atol=tolerance)

    def test_without_a_model_it_says_what_to_give(self):
        assert "clip=PATH" in clip_score(flat(0.1), ["cat"], None)

    def test_a_hub_id_in_the_cache_needs_no_network(self, clip, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        home = tmp_path / "models--some--clip"
        shutil.copytree(clip, home / "snapshots" / ("a" * 40))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("a" * 40)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        found = CLIP("some/clip").similarity(images, ["cat", "dog"])
        assert_close(found, CLIP(clip).similarity(images, ["cat", "dog"]), atol=0)

    def test_a_folder_that_is_not_there_is_named(self, capsys):
        assert "clip=nowhere: cannot be loaded from the hub" in fails(capsys, "train", "clip=nowhere")
