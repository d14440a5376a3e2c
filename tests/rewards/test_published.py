import pytest
import torch
from conftest import assert_close
from ctrl_files import residual, write_classifier
from test_cli import fails
from tiny_clip import head, head_state, write_clip
from torch.nn import functional as F

from diffrl.errors import DiffRLError
from diffrl.rewards import classifier
from diffrl.rewards.clip import load_clip
from diffrl.rewards.compressibility import Compressibility
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.multitask import Multitask
from diffrl.types import Context


def context(*labels):
    return Context(["x"] * len(labels), torch.zeros(len(labels), 1, 1), torch.tensor(labels))


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    """The settings of a reward on the aesthetic score, and its published head."""
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.save(head_state(head(1)), folder / "mlp.pth")
    network = head(3, seed=1)
    path = write_classifier(folder / "aesthetic.pth", network, 0.25, head_state(network))
    settings = {"clip": write_clip(folder / "clip"), "mlp": str(folder / "mlp.pth")}
    return settings, path, network


class TestResidual:
    def test_it_is_the_published_network_s_log_softmax_at_its_temperature(self, tmp_path, monkeypatch):
        """Over all five logits, of which the last is of no class: so its authors have it."""
        monkeypatch.setattr(classifier, "PUBLISHED_SIZE", 64)  # of the pictures: much faster
        network = residual(5)
        path = write_classifier(tmp_path / "five.pth", network, 0.5)
        reward = Compressibility(classifier=path).load()
        assert reward.num_classes == (4,)
        assert reward.attributes[0].edges.tolist() == [60.0, 85.0, 110.0]
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        expected = F.log_softmax(network((image - mean) / std) / 0.5, 1)
        reward.train()  # no mode matters: nothing of a batch is left
        log_prob = reward.attributes[0].classifier(image)
        assert_close(log_prob, expected[:, :4], atol=1e-4)
        assert_close(reward(image, context([2])), expected[:, 2], atol=1e-4)

    def test_three_logits_are_two_classes_at_70_kb(self, tmp_path):
        path = write_classifier(tmp_path / "three.pth", residual(3), 1.5)
        reward = Compressibility(num_classes=2, classifier=path).load()
        (attribute,) = reward.attributes
        assert (reward.num_classes, attribute.edges.tolist()) == ((2,), [70.0])
        assert_close(attribute.report.temperature, 1.5, atol=0)
        sizes = torch.tensor([69.0, 70.0, 71.0])  # class 1 is the smaller, with the edge
        assert attribute.measure.class_of(sizes, attribute.edges).tolist() == [1, 1, 0]

    def test_pictures_of_another_size_are_refused(self, tmp_path):
        reward = Compressibility(
            classifier=write_classifier(tmp_path / "five.pth", residual(5), 1.0)
        ).load()
        with pytest.raises(DiffRLError, match="reads pictures of 512 px, these have 64"):
            reward(torch.rand(1, 3, 64, 64), context([0]))

    def test_saved_among_ours_it_is_the_same(self, tmp_path):
        reward = Compressibility(
            classifier=write_classifier(tmp_path / "five.pth", residual(5), 0.5)
        ).load()
        reward.save(tmp_path / "ours.safetensors")
        loaded = LogLikelihood.load(tmp_path / "ours.safetensors")
        for name, tensor in reward.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.attributes[0].classifier.spare == 1
        assert loaded.num_classes == (4,)

    def test_a_file_that_is_none_of_theirs_is_named(self, tmp_path):
        network = residual(5)
        with pytest.raises(DiffRLError, match=r"gone\.pth: no such classifier"):
            Compressibility(classifier=str(tmp_path / "gone.pth")).load()
        torch.save(network.state_dict(), tmp_path / "bare.pth")
        with pytest.raises(
            DiffRLError, match=r"bare\.pth: not one of CTRL's .* 'model_state_dict' is missing"
        ):
            Compressibility(classifier=str(tmp_path / "bare.pth")).load()
        path = write_classifier(tmp_path / "seven.pth", residual(7), 1.0)
        with pytest.raises(
            DiffRLError, match="has 7 logits; CTRL's classifiers of compressibility have 3 or 5"
        ):
            Compressibility(classifier=path).load()
        state = network.state_dict()
        del state["layer2.bn1.running_var"]
        path = write_classifier(tmp_path / "holed.pth", network, 1.0, state)
        with pytest.raises(DiffRLError, match=r"'layer2\.bn1\.running_var' is missing"):
            Compressibility(classifier=path).load()
        state = network.state_dict() | {"layer3.conv1.weight": torch.zeros(256, 64, 3, 3)}
        path = write_classifier(tmp_path / "narrow.pth", network, 1.0, state)
        with pytest.raises(DiffRLError, match=r"shape \[256, 64, 3, 3\]; of .* it is \[256, 128, 3, 3\]"):
            Compressibility(classifier=path).load()

    def test_another_number_of_classes_than_the_settings_is_refused(self, capsys, tmp_path, tiny_path):
        path = write_classifier(tmp_path / "three.pth", residual(3), 1.0)
        words = ["env=sd15", f"env.model={tiny_path}", f"root={tmp_path}", f"reward.classifier={path}"]
        assert "it knows 2 classes of compressibility, this reward has 4" in fails(capsys, "train", *words)


class TestAesthetic:
    def test_it_is_the_published_head_on_clip_embeddings(self, aesthetic):
        settings, path, network = aesthetic
        reward = Multitask(["aesthetic"], classifier=path, **settings).load()
        images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        embeds = load_clip(settings["clip"]).embed_images(images)
        expected = F.log_softmax(network(embeds) / 0.25, 1).detach()
        assert_close(
            reward(images, context([0], [1])).detach(), [expected[0, 0], expected[1, 1]], atol=1e-4
        )
        assert_close(reward.attributes[0].edges, [5.7], atol=1e-6)

    def test_with_that_of_compressibility_it_is_ctrl_s_multitask(self, aesthetic, tmp_path):
        settings, path, _ = aesthetic
        size = write_classifier(tmp_path / "three.pth", residual(3), 1.0)
        chosen = Multitask(["compressibility", "aesthetic"], classifier=[size, path], **settings)
        reward = chosen.load()
        assert reward.num_classes == chosen.num_classes
        assert [attribute.name for attribute in reward.attributes] == chosen.measures
        assert [float(attribute.edges) for attribute in reward.attributes] == pytest.approx([70.0, 5.7])

    def test_one_file_a_measure_is_asked_for(self, aesthetic):
        settings, path, _ = aesthetic
        with pytest.raises(DiffRLError, match=r"1 file\(s\), 2 measure\(s\); give one \.safetensors"):
            Multitask(["compressibility", "aesthetic"], classifier=path, **settings).load()
        with pytest.raises(
            DiffRLError, match=r"not one of CTRL's classifiers of compressibility, 'fc\.bias'"
        ):
            Compressibility(num_classes=2, classifier=path).load()
