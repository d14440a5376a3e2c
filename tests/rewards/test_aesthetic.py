import io
import pickle

import pytest
import torch
from conftest import assert_close
from safetensors.torch import save_file
from test_cli import fails
from tiny_clip import SIDE, WIDTH, head, head_state, pictures, stock_embeddings, write_clip
from torch.nn import functional as F

from diffrl.errors import DiffRLError
from diffrl.foreign_weights import read_weights
from diffrl.rewards import aesthetic
from diffrl.rewards.aesthetic import Aesthetic, aesthetic_score
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.clip import load_clip
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.rewards.measures import MEASURES
from diffrl.rewards.multitask import Multitask
from diffrl.types import Context


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlp") / "head.pth"
    network = head(1)
    with torch.no_grad():
        for layer in network[::2]:  # as it is made, all pictures would have one score
            layer.weight.mul_(4)
    torch.save(head_state(network), path)
    return str(path)


def context(count):
    return Context(["cat"] * count, torch.zeros(count, 1, 1), torch.zeros(count, 0))


class TestScore:
    @pytest.mark.parametrize(("side", "tolerance"), [(SIDE, 1e-4), (40, 0.03)])
    def test_it_is_the_head_s_of_stock_clip_s_embedding_of_length_1(self, clip, mlp, side, tolerance):
        images = pictures(3, side)
        network = head(1)
        network.load_state_dict({n.removeprefix("layers."): t for n, t in torch.load(mlp).items()})
        expected = network(F.normalize(stock_embeddings(clip, images), dim=1))[:, 0].detach()
        assert expected.std() > 0.2
        assert_close(aesthetic_score(images, clip, mlp), expected, atol=tolerance)
        assert_close(Aesthetic(clip, mlp)(images, context(3)), expected, atol=tolerance)

    def test_its_gradient_is_that_of_finite_differences(self, clip, mlp):
        reward, images = Aesthetic(clip, mlp), pictures(2).mul(0.8).add(0.1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(reward(images, context(2)).sum(), images)
        direction = F.normalize(gradient.flatten(1)).view_as(gradient)
        step = 0.2
        with torch.no_grad():
            far = [reward(images + sign * step * direction, context(2)) for sign in (1, -1)]
        assert_close(gradient.flatten(1).norm(dim=1), (far[0] - far[1]) / (2 * step), atol=0, rtol=0.02)

    def test_a_head_in_safetensors_scores_the_same(self, clip, mlp, tmp_path):
        path = tmp_path / "head.safetensors"
        save_file(read_weights(mlp := __import__("pathlib").Path(mlp)), path)
        assert_close(
            aesthetic_score(pictures(), clip, str(path)),
            aesthetic_score(pictures(), clip, str(mlp)),
            atol=0,
        )

    def test_without_its_weights_it_says_what_to_give(self, capsys, clip, tmp_path):
        assert "reward.mlp=null: the aesthetic score needs it" in fails(capsys, "train", "reward=aesthetic")
        line = fails(capsys, "train", "reward=aesthetic", "reward.mlp=gone.pth")
        assert "reward.mlp=gone.pth: no such file" in line
        words = ["reward=multitask", "reward.measures=[aesthetic]"]
        assert "reward.mlp=null" in fails(capsys, "train", *words)

    def test_weights_may_be_a_file_on_the_hub(self, clip, mlp, monkeypatch):
        def download(repository, name):
            if name != "in/head.pth":
                raise OSError("404: no such entry\nRequest ID: 5")
            return {"laion/score": mlp}[repository]

        monkeypatch.setattr(aesthetic, "hf_hub_download", download)
        one, other = (aesthetic_score(pictures(), clip, m) for m in (mlp, "laion/score/in/head.pth"))
        assert torch.equal(one, other)
        with pytest.raises(DiffRLError, match=r"nor one on the hub \(404: no such entry\)\. Give the path"):
            Aesthetic(clip, "laion/score/gone.pth")
        with pytest.raises(DiffRLError, match=r"head\.pth: no such file\. Give"):  # of a folder here
            Aesthetic(clip, "laion/head.pth")

    def test_a_repository_s_own_weights_may_have_a_clip_model_beside_the_head(
        self, clip, mlp, monkeypatch, tmp_path
    ):
        """As ports to transformers write them."""
        whole = {f"vision_model.encoder.layers.{n}.weight": torch.zeros(1) for n in (0, 9)}
        whole["visual_projection.weight"] = torch.zeros(1)
        (tmp_path / "some" / "port-v2.5").mkdir(parents=True)
        save_file(whole | torch.load(mlp), tmp_path / "some" / "port-v2.5" / "model.safetensors")
        monkeypatch.setattr(aesthetic, "hf_hub_download", tmp_path.joinpath)
        one, other = (aesthetic_score(pictures(), clip, m) for m in (mlp, "some/port-v2.5"))
        assert torch.equal(one, other)

    def test_a_head_of_another_width_or_layout_is_refused(self, clip, mlp, tmp_path):
        torch.save(head_state(head(3)), tmp_path / "three.pth")
        with pytest.raises(DiffRLError, match=rf"maps {WIDTH} numbers to 3; it must map the {WIDTH}"):
            aesthetic_score(pictures(), clip, str(tmp_path / "three.pth"))
        torch.save({"weight": torch.zeros(1, WIDTH)}, tmp_path / "one.pth")
        with pytest.raises(
            DiffRLError, match=r"one\.pth: not a linear head .* 'layers\.0\.bias' is missing"
        ):
            aesthetic_score(pictures(), clip, str(tmp_path / "one.pth"))

    def test_a_clip_that_is_not_there_is_named(self, mlp):
        with pytest.raises(DiffRLError, match="clip=/nowhere: cannot be loaded from the hub"):
            Aesthetic("/nowhere", mlp)(pictures(), context(3))


class Malice:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


class TestWeights:
    def test_a_pickle_that_would_run_something_is_refused_and_not_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({"layers.0.weight": Malice()}, "zip.pth")
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malice(), protocol=2))
        for name in ("zip.pth", "plain.pth"):
            with pytest.raises(DiffRLError, match=rf"{name}: .* nothing in it was run"):
                read_weights(tmp_path / name)
        assert not (tmp_path / "executed").exists()

    def test_a_missing_or_cut_file_is_named(self, tmp_path):
        with pytest.raises(DiffRLError, match=r"x\.pth: no such file of weights"):
            read_weights(tmp_path / "x.pth")
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(1000)}, buffer)
        (tmp_path / "x.pth").write_bytes(buffer.getvalue()[:2000])
        with pytest.raises(DiffRLError, match=r"x\.pth: damaged"):
            read_weights(tmp_path / "x.pth")
        for name in ("x.pth", "x.bin", "x.ckpt", "x.safetensors"):
            (tmp_path / name).write_bytes(b"")
            with pytest.raises(DiffRLError, match=rf"{name}: damaged or cut short \(\w.*\)\. Get it again"):
                read_weights(tmp_path / name)
        torch.save([torch.zeros(1)], tmp_path / "x.pth")
        with pytest.raises(DiffRLError, match=r"x\.pth: holds a list, not a state_dict"):
            read_weights(tmp_path / "x.pth")


class TestClassifier:
    """log p(y|x) of the aesthetic score's class, learnt on CLIP embeddings."""

    def test_it_learns_the_score_s_class_and_only_small_weights_are_kept(self, clip, mlp, tmp_path):
        settings = Multitask(["compressibility", "aesthetic"], clip=clip, mlp=mlp)
        reward = settings.fit(pictures(200), 0, from_pretrained=True)
        attribute = reward.attributes[1]
        assert attribute.report.accuracy > 0.85
        scores = aesthetic_score(pictures(200), clip, mlp)
        assert_close(attribute.edges[0], scores.quantile(0.5), atol=1e-5)
        true = (scores >= attribute.edges[0]).long()
        assert reward.true_class(pictures(200))[:, 1].tolist() == true.tolist()
        assert not [name for name in attribute.state_dict() if name.startswith("classifier.features")]
        reward.save(tmp_path / "c.safetensors")
        loaded = LogLikelihood.load(tmp_path / "c.safetensors")
        images, label = pictures(4, seed=1), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        asked = Context(["cat"] * 4, torch.zeros(4, 1, 1), label)
        assert_close(loaded(images, asked), reward(images, asked), atol=0)
        assert loaded.true_class(images).tolist() == reward.true_class(images).tolist()

    def test_another_clip_in_the_place_of_its_own_is_noticed(self, mlp, tmp_path):
        place = write_clip(tmp_path / "clip")
        report = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())
        classifier, networks = Classifier(2, "clip", clip=place), {"clip": place, "mlp": mlp}
        attribute = Attribute("aesthetic", classifier, torch.zeros(1), report, networks=networks)
        LogLikelihood([attribute]).save(tmp_path / "c.safetensors")
        LogLikelihood.load(tmp_path / "c.safetensors")
        write_clip(tmp_path / "clip", seed=4)
        load_clip.cache_clear()
        with pytest.raises(DiffRLError, match=r"c\.safetensors: was fitted with other networks"):
            LogLikelihood.load(tmp_path / "c.safetensors")

    def test_published_edges_are_those_of_512_px_alone(self):
        edges = {
            (name, count, side): MEASURES[name].published_edges(count, side)
            for name in ("compressibility", "aesthetic")
            for count in (2, 3)
            for side in (512, 64)
        }
        known = {key: value for key, value in edges.items() if value}
        assert known == {("compressibility", 2, 512): (70.0,), ("aesthetic", 2, 512): (5.7,)}
