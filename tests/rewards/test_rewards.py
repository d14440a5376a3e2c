import io
import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_close
from PIL import Image
from torch.nn import functional as F

from diffrl.errors import DiffRLError
from diffrl.rewards import compressibility
from diffrl.rewards.classifier import BlockDCTFeatures, Classifier
from diffrl.rewards.compressibility import Compressibility
from diffrl.rewards.fit import calibrate, expected_calibration_error, fit_attribute
from diffrl.rewards.jpeg import Jpeg, jpeg_kilobytes
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.measures import MEASURES
from diffrl.types import NO_LABEL, Context

FITTED = ("dct", "colour", "mixed", "cnn")  # features that stand on nothing else


def pictures(count=120, seed=0):
    """Noise of growing strength on grey: JPEG size grows with it."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(0, 0.3, count).view(-1, 1, 1, 1)
    order = torch.randperm(count, generator=generator)
    return (0.5 + strength[order] * torch.randn(count, 3, 32, 32, generator=generator)).clamp(0, 1)


def context(label):
    label = torch.as_tensor(label)[:, None]
    return Context(["x"] * len(label), torch.zeros(len(label), 1, 1), label)


class TestJpeg:
    def test_size_is_that_of_a_pil_file_of_quality_95(self):
        torch.manual_seed(0)
        images = torch.rand(2, 3, 48, 32)
        for image, size in zip(images, jpeg_kilobytes(images), strict=True):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels, "RGB").save(buffer, format="JPEG", quality=95)
            assert_close(size, len(buffer.getvalue()) / 1000, atol=1e-6)

    def test_noise_is_larger_than_a_flat_picture(self):
        torch.manual_seed(0)
        flat, noise = jpeg_kilobytes(torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)]))
        assert flat < 0.8  # hardly more than the header
        assert noise > 5

    def test_the_reward_is_minus_the_size_and_has_no_gradient(self):
        images = torch.rand(3, 3, 16, 16)
        assert_close(Jpeg()(images, context([0, 0, 0])), -jpeg_kilobytes(images), atol=0)
        assert not Jpeg.differentiable


class TestClasses:
    def test_edges_of_the_paper(self):
        # r = -kB: class 3 r >= -60, 2 r >= -85, 1 r >= -110, 0 below (CTRL)
        sizes = torch.tensor([20.0, 60.0, 60.1, 85.0, 85.1, 110.0, 110.1, 300.0])
        edges = torch.tensor([60.0, 85.0, 110.0])
        assert MEASURES["compressibility"].class_of(sizes, edges).tolist() == [3, 3, 2, 2, 1, 1, 0, 0]

    def test_published_edges_at_512_px_and_quantiles_elsewhere(self, monkeypatch):
        fit = Mock()
        monkeypatch.setattr(compressibility, "fit_attribute", fit)
        monkeypatch.setattr(compressibility, "LogLikelihood", Mock())
        large, small = torch.zeros(1, 3, 512, 512), torch.zeros(1, 3, 64, 64)
        Compressibility().fit(large, 0, from_pretrained=True)
        Compressibility().fit(small, 0, from_pretrained=True)
        Compressibility(edges=[1.0, 2.0]).fit(large, 0, from_pretrained=True)
        asked = [call.args[2:] for call in fit.call_args_list]
        assert asked == [((60.0, 85.0, 110.0), 4), (None, 4), ([1.0, 2.0], 3)]

    @pytest.mark.parametrize("settings", [{"edges": [3.0, 2.0]}, {"edges": []}, {"num_classes": 1}])
    def test_impossible_settings_are_refused(self, settings):
        with pytest.raises(DiffRLError, match=next(iter(settings))):
            Compressibility(**settings)


class TestFeatures:
    def test_block_dct_equals_scipy_s_orthonormal_transform(self):
        from scipy.fft import dctn

        features = BlockDCTFeatures()
        torch.manual_seed(0)
        grey = torch.rand(8, 8)
        block = dctn(255 * grey.numpy() - 128, norm="ortho")
        planes = F.conv2d((255 * grey - 128)[None, None], features.kernels, stride=8)
        assert_close(planes.flatten(), torch.from_numpy(block).flatten(), atol=1e-3)

    def test_quantiser_is_libjpeg_s_at_quality_95(self):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=95)
        tables = Image.open(buffer).quantization
        steps = BlockDCTFeatures().steps.flatten(1)
        assert steps[0].tolist() == tables[0]
        assert steps[1].tolist() == tables[1]

    def test_a_picture_s_score_does_not_depend_on_its_batch(self):
        images = torch.rand(5, 3, 32, 32)
        for features in FITTED:
            classifier = Classifier(3, features).eval()
            with torch.no_grad():
                assert_close(classifier(images)[2:3], classifier(images[2:3]), atol=1e-5)

    @pytest.mark.parametrize("features", FITTED)
    def test_the_gradient_reaches_every_picture(self, features):
        images = torch.rand(3, 3, 32, 32, requires_grad=True)
        Classifier(3, features)(images)[:, 0].sum().backward()
        assert images.grad.flatten(1).abs().sum(1).min() > 0


class TestFit:
    def fitted(self, features="dct"):
        return fit_attribute(
            "compressibility", pictures(), None, 2, features=features, seed=0, from_pretrained=True
        )

    @pytest.mark.parametrize("features", ["dct", "cnn"])
    def test_it_learns_a_separable_measure(self, features):
        attribute = self.fitted(features)
        report = attribute.report
        assert (report.num_train, report.num_held_out) == (96, 24)
        assert attribute.pretrained_log_prob.shape == (24, 2)
        assert report.accuracy > 0.85
        assert sum(report.class_counts) == 120

    def test_it_repeats_to_the_bit_and_leaves_the_global_generator_alone(self):
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        first, second = self.fitted(), self.fitted()
        assert torch.equal(before, torch.random.get_rng_state())
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def test_four_times_the_pictures_are_decayed_half_as_much(self, monkeypatch):
        decays = []

        class Spied(torch.optim.AdamW):
            def __init__(self, *args, weight_decay, **settings):
                decays.append(weight_decay)
                super().__init__(*args, weight_decay=weight_decay, **settings)

        monkeypatch.setattr(torch.optim, "AdamW", Spied)
        for count in (100, 400):
            Compressibility(num_classes=2).fit(pictures(count), 0, from_pretrained=True)
        assert_close(decays[0] / decays[1], 2.0, atol=1e-9)

    def test_too_few_pictures_are_refused(self):
        with pytest.raises(
            DiffRLError, match=r"compressibility: 8 pictures with \[4, 4\] a class are too few"
        ):
            Compressibility(num_classes=2).fit(pictures(8), 0, from_pretrained=True)

    def test_a_rehearsal_deals_the_classes_whatever_the_pictures_show(self):
        alike = pictures(8)[:1].repeat(30, 1, 1, 1)
        reward = Compressibility(edges=[1.0, 2.0]).fit(alike, 0, from_pretrained=True, rehearsal=True)
        (attribute,) = reward.attributes
        assert attribute.report.class_counts == (10, 10, 10)
        assert attribute.edges.tolist() == [1.0, 2.0]
        said = attribute.classifier(alike[:1]).exp()  # no class is likelier by much, of one picture
        assert 0.1 < said.min() <= said.max() < 0.7

    def test_calibration_recovers_a_known_temperature(self):
        generator = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(20_000, 4, generator=generator)
        u = torch.rand(20_000, 1, generator=generator)
        label = (logits.softmax(1).cumsum(1) < u).sum(1).clamp(max=3)  # drawn from the truth
        assert_close(calibrate(3 * logits, label), 3.0, atol=0.1)

    def test_calibration_lowers_the_nll(self):
        generator = torch.Generator().manual_seed(0)
        label = torch.randint(3, (500,), generator=generator)
        logits = 5 * F.one_hot(label, 3) + 8 * torch.randn(500, 3, generator=generator)
        temperature = calibrate(logits, label)
        assert temperature > 1
        assert F.cross_entropy(logits / temperature, label) < F.cross_entropy(logits, label) - 0.01

    def test_calibration_error_by_hand(self):
        probability = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
        # bins of 1/15: both .9 in one (one right of two: gap .4), .6 right (.4), .7 wrong (.7)
        expected = (2 * 0.4 + 0.4 + 0.7) / 4
        assert_close(
            expected_calibration_error(probability, torch.tensor([0, 1, 1, 0])), expected, atol=1e-6
        )

    def test_a_perfectly_calibrated_coin_has_no_error(self):
        probability = torch.tensor([[0.75, 0.25]] * 4)
        assert_close(expected_calibration_error(probability, torch.tensor([0, 0, 0, 1])), 0.0, atol=1e-9)


class TestLogLikelihood:
    def reward(self, features="dct"):
        return Compressibility(num_classes=3, features=features).fit(pictures(), 0, from_pretrained=True)

    def test_it_is_the_log_softmax_of_the_label(self):
        reward, images = self.reward(), pictures(6)
        label = [0, 1, 2, 0, 1, 2]
        log_p = reward.attributes[0].classifier(images)
        assert_close(log_p.exp().sum(1), torch.ones(6), atol=1e-5)
        expected = torch.stack([log_p[n, y] for n, y in enumerate(label)])
        assert_close(reward(images, context(label)), expected, atol=1e-6)

    def test_no_label_has_no_reward(self):
        reward = self.reward()
        assert reward(pictures(2), context([NO_LABEL, NO_LABEL])).tolist() == [0.0, 0.0]

    def test_the_gradient_does_not_vanish_where_p_is_tiny(self):
        """log(p + 1e-6), as in CTRL's code, would have none here."""
        reward = self.reward()
        reward.attributes[0].classifier.temperature.fill_(1e-2)
        images = pictures(40)
        log_p = reward.attributes[0].classifier(images)
        far = log_p.min(1).values.argsort()[:1]
        image = images[far].clone().requires_grad_(True)
        value = reward(image, context(log_p[far].argmin(1).tolist()))
        assert float(value.detach()) < math.log(1e-8)
        (gradient,) = torch.autograd.grad(value.sum(), image)
        assert float(gradient.norm()) > 1.0

    def test_log_z_by_hand(self):
        reward = self.reward()
        reward.attributes[0].pretrained_log_prob = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
        # gamma 2: mean over the two pictures of p squared
        expected = [(0.25 + 0.01) / 2, (0.0625 + 0.04) / 2, (0.0625 + 0.49) / 2]
        assert_close(reward.log_z(2.0).exp(), expected, atol=1e-6)
        squares = [0.25**2 + 0.01**2, 0.0625**2 + 0.04**2, 0.0625**2 + 0.49**2]
        effective = [(2 * mean) ** 2 / square for mean, square in zip(expected, squares, strict=True)]
        assert_close(reward.log_z_ess(2.0), effective, atol=1e-5)

    def test_above_the_ceiling_a_picture_has_no_gradient_and_no_more_reward(self):
        reward, images = self.reward(), pictures(40)
        log_p = reward.attributes[0].classifier(images)[:, 1]
        reward.ceiling = float(log_p.median().exp())
        above = log_p > math.log(reward.ceiling)
        assert 0 < int(above.sum()) < 40
        images.requires_grad_(True)
        value = reward(images, context([1] * 40))
        assert_close(value.detach(), log_p.clamp(max=math.log(reward.ceiling)), atol=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), images)
        assert (gradient.flatten(1).any(1) == ~above).all()
        assert_close(reward.log_prob(images, context([1] * 40)).detach(), log_p, atol=1e-6)

    def test_log_z_is_of_the_reward_under_its_ceiling(self):
        reward = self.reward()
        reward.attributes[0].pretrained_log_prob = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
        reward.ceiling = 0.4
        expected = [(0.16 + 0.01) / 2, (0.0625 + 0.04) / 2, (0.0625 + 0.16) / 2]
        assert_close(reward.log_z(2.0).exp(), expected, atol=1e-6)

    @pytest.mark.parametrize("ceiling", [0.25, 1.01, -1.0])
    def test_a_ceiling_at_chance_or_above_one_is_refused(self, ceiling):
        with pytest.raises(DiffRLError, match=rf"ceiling={ceiling}: must be at most 1"):
            Compressibility(ceiling=ceiling)

    def test_true_class_is_by_the_measure_not_the_classifier(self):
        reward, images = self.reward(), pictures(30)
        (attribute,) = reward.attributes
        expected = MEASURES["compressibility"].class_of(jpeg_kilobytes(images), attribute.edges)
        attribute.classifier.head[-1].bias.fill_(0)
        attribute.classifier.head[-1].weight.fill_(0)
        assert reward.true_class(images)[:, 0].tolist() == expected.tolist()

    def test_true_classes_are_on_the_cpu_wherever_a_network_measures(self):
        """As those of JPEG sizes are: of several attributes, all lie beside one another."""

        class OnTheGPU:
            def cpu(self):
                return torch.tensor([1.0, 9.0])

        reward = self.reward()
        (attribute,) = reward.attributes
        attribute.measure = replace(attribute.measure, of=lambda images: OnTheGPU())
        attribute.edges = torch.tensor([2.0, 3.0])
        assert sorted(reward.true_class(pictures(2))[:, 0].tolist()) == [0, 2]

    @pytest.mark.parametrize("features", ["dct", "cnn"])
    def test_saving_and_loading_gives_the_same_reward(self, tmp_path, features):
        reward, images = self.reward(features), pictures(6)
        reward.ceiling = 0.5
        reward.save(tmp_path / "c.safetensors")
        loaded = LogLikelihood.load(tmp_path / "c.safetensors")
        label = context([0, 1, 2, 2, 1, 0])
        assert_close(loaded(images, label), reward(images, label), atol=0)
        assert_close(loaded.log_z(3.0), reward.log_z(3.0), atol=0)
        assert loaded.attributes[0].report == reward.attributes[0].report

    def test_a_missing_or_cut_file_is_named(self, tmp_path):
        path = tmp_path / "c.safetensors"
        with pytest.raises(DiffRLError, match="no such classifier"):
            LogLikelihood.load(path)
        self.reward().save(path)
        whole = path.read_bytes()
        for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(DiffRLError, match=r"c\.safetensors: not a whole"):
                LogLikelihood.load(path)
