import math
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_close
from safetensors import safe_open
from safetensors.torch import save_file

from diffrl.errors import DiffRLError
from diffrl.rewards import multitask
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.rewards.measures import MEASURES, colourfulness
from diffrl.rewards.multitask import Multitask
from diffrl.types import NO_LABEL, Context, every_label

REPORT = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())


def pictures(count=160, seed=0):
    """Noise and colour of any strength, independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    noise, colour = 0.2 * torch.rand(2, count, 1, 1, 1, generator=generator)
    tint = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1) * torch.linspace(0, 1, 32)
    grey = torch.randn(count, 1, 32, 32, generator=generator)
    return (0.5 + noise * grey + colour * tint).clamp(0, 1)


def context(*labels):
    label = torch.tensor(labels)
    return Context(["x"] * len(label), torch.zeros(len(label), 1, 1), label)


@pytest.fixture(scope="module")
def reward():
    return Multitask().fit(pictures(), 0, from_pretrained=True)


class TestColourfulness:
    def test_by_hand(self):
        """Left half red, right half grey: rg 255 and 0, yb 127.5 and 0."""
        image = torch.full((1, 3, 2, 4), 0.2)
        image[0, :, :, :2] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
        # means 127.5, 63.75; deviations the same
        expected = 1.3 * math.hypot(127.5, 63.75)
        assert_close(colourfulness(image), [expected], atol=1e-3)

    def test_grey_has_none_and_one_flat_colour_its_mean_alone(self):
        grey, blue = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
        blue[:, 2] = 1.0
        assert_close(colourfulness(torch.cat([grey, blue])), [0.0, 0.3 * 255], atol=1e-3)

    def test_the_more_colourful_class_is_the_higher_and_an_edge_belongs_to_it(self):
        measure = MEASURES["colourfulness"]
        classes = measure.class_of(torch.tensor([0.0, 9.9, 10.0, 50.0]), torch.tensor([10.0, 20.0]))
        assert classes.tolist() == [0, 0, 1, 2]
        assert measure.bounds(torch.tensor([10.0, 20.0])) == ["< 10.00", "10.00 to 20.00", ">= 20.00"]

    def test_of_sizes_the_last_class_is_the_smallest(self):
        bounds = MEASURES["compressibility"].bounds(torch.tensor([1.0, 2.0]))
        assert bounds == ["> 2.00 kB", "1.00 to 2.00 kB", "<= 1.00 kB"]


class TestJoint:
    def test_the_rewards_of_both_attributes_add(self, reward):
        images, labels = pictures(4, seed=1), every_label((2, 2))
        both = [attribute.classifier(images) for attribute in reward.attributes]
        expected = [float(both[0][n, y] + both[1][n, z]) for n, (y, z) in enumerate(labels.tolist())]
        assert_close(reward(images, context(*labels.tolist())), expected, atol=1e-6)

    def test_an_attribute_with_no_label_adds_nothing(self, reward):
        images = pictures(2, seed=1)
        size = reward.attributes[0].classifier(images)
        value = reward(images, context([1, NO_LABEL], [NO_LABEL, NO_LABEL]))
        assert_close(value, [float(size[0, 1]), 0.0], atol=1e-6)

    def test_both_classifiers_are_good_and_never_saw_the_same_pictures(self, reward):
        for attribute in reward.attributes:
            assert attribute.report.accuracy > 0.85
            assert sorted(attribute.report.class_counts) == [80, 80]  # edges at the medians
            assert len(attribute.pretrained_log_prob) == 32
        may_be = []  # pictures that a classifier says just that of, [32, 160]
        for attribute in reward.attributes:
            said = attribute.classifier(pictures())
            may_be.append((attribute.pretrained_log_prob[:, None] - said).abs().amax(2) < 1e-5)
        assert (may_be[0] & may_be[1]).any(1).all()  # or log Z would mix pictures
        assert not (may_be[0] & may_be[1].roll(1, 0)).any(1).all()
        assert_close(reward.log_z(1.0).exp().sum(), 1.0, atol=1e-5)

    def test_log_z_by_hand(self):
        first = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
        second = torch.tensor([[0.3, 0.7], [0.6, 0.4]]).log()
        joint = LogLikelihood(
            [
                Attribute("compressibility", Classifier(2), torch.tensor([1.0]), REPORT, first),
                Attribute("colourfulness", Classifier(2), torch.tensor([1.0]), REPORT, second),
            ]
        )
        # over labels 00, 01, 10, 11 the mean of the two pictures' products, squared
        expected = [
            (0.27**2 + 0.12**2) / 2,
            (0.63**2 + 0.08**2) / 2,
            (0.03**2 + 0.48**2) / 2,
            (0.07**2 + 0.32**2) / 2,
        ]
        assert_close(joint.log_z(2.0).exp(), expected, atol=1e-6)

    def test_true_classes_are_by_each_measure(self, reward):
        images = pictures(20, seed=2)
        columns = [a.measure.class_of(a.measure.of(images), a.edges) for a in reward.attributes]
        assert reward.true_class(images).tolist() == torch.stack(columns, 1).tolist()

    def test_of_a_joint_label_the_last_attribute_counts_fastest(self, reward, tmp_path):
        """CTRL's code: y = 2 aesthetic + compressibility."""
        images, labels = pictures(4, seed=1), every_label((2, 2))
        joint = LogLikelihood(reward.attributes, joint=True)
        assert (joint.num_classes, Multitask(joint=True).num_classes) == ((4,), (4,))
        numbers = context([0], [1], [2], [3])
        assert joint.split(numbers.label).tolist() == labels.tolist()
        assert_close(joint(images, numbers), reward(images, context(*labels.tolist())), atol=0)
        assert joint(images, context(*[[NO_LABEL]] * 4)).tolist() == [0.0] * 4
        first, second = reward.true_class(pictures(20, seed=2)).unbind(1)
        assert joint.true_class(pictures(20, seed=2)).tolist() == (2 * first + second)[:, None].tolist()
        joint.save(tmp_path / "joint.safetensors")
        assert LogLikelihood.load(tmp_path / "joint.safetensors").num_classes == (4,)
        assert Multitask(classifier=str(tmp_path / "joint.safetensors")).load().num_classes == (2, 2)

    def test_saving_and_loading_gives_the_same_reward(self, reward, tmp_path):
        reward.save(tmp_path / "c.safetensors")
        loaded = LogLikelihood.load(tmp_path / "c.safetensors")
        images, labels = pictures(4, seed=1), context([0, 0], [0, 1], [1, 0], [1, 1])
        assert_close(loaded(images, labels), reward(images, labels), atol=0)
        assert_close(loaded.log_z(3.0), reward.log_z(3.0), atol=0)
        assert [a.name for a in loaded.attributes] == ["compressibility", "colourfulness"]

    def test_a_file_of_another_layout_is_named_as_such(self, reward, tmp_path):
        path = tmp_path / "c.safetensors"
        reward.save(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, metadata={"diffrl.classifier": "{}"})
        with pytest.raises(DiffRLError, match=r"c\.safetensors: .*of layout 1, this version reads 2"):
            LogLikelihood.load(path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"measures": ["compressibility", "sharpness"]}, "measure=sharpness"),
            ({"measures": ["compressibility"] * 2}, "give each once"),
            ({"measures": []}, "one at least"),
            ({"edges": [1.5]}, "1 for 2 measures"),
            ({"ceiling": 0.5}, "more than chance, 1/2"),
            ({"measures": ["aesthetic"]}, "reward.mlp=null: the aesthetic score needs it"),
        ],
    )
    def test_impossible_settings_are_refused(self, settings, message):
        with pytest.raises(DiffRLError, match=message):
            Multitask(**settings)


def test_published_edges_at_512_px_and_medians_elsewhere(monkeypatch, tmp_path):
    fit = Mock()
    monkeypatch.setattr(multitask, "fit_attribute", fit)
    monkeypatch.setattr(multitask, "LogLikelihood", Mock())
    (tmp_path / "mlp.pth").touch()
    settings = {
        "measures": ["compressibility", "aesthetic", "colourfulness"],
        "clip": "here",
        "mlp": str(tmp_path / "mlp.pth"),
    }
    large, small = torch.zeros(1, 3, 512, 512), torch.zeros(1, 3, 64, 64)
    Multitask(**settings).fit(large, 0, from_pretrained=True)
    Multitask(**settings).fit(small, 0, from_pretrained=True)
    Multitask(**settings, edges=[1.0, 2.0, 3.0]).fit(large, 0, from_pretrained=True)
    asked = [call.args[2] for call in fit.call_args_list]
    assert asked == [(70.0,), (5.7,), None, None, None, None, [1.0], [2.0], [3.0]]
    networks = [call.kwargs["networks"] for call in fit.call_args_list[:3]]
    assert networks == [{}, {"clip": "here", "mlp": settings["mlp"]}, {}]


def test_every_label_counts_the_last_attribute_fastest():
    assert every_label((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert every_label((4,)).tolist() == [[0], [1], [2], [3]]
    assert every_label(()).shape == (1, 0)
