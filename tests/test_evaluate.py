import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from test_cli import FAST, fails

import diffrl.evaluate
from diffrl import config
from diffrl.benchmarks.cost import unfitted_reward
from diffrl.build import Setup
from diffrl.cli import main
from diffrl.evaluate import GRID_COLUMNS, _control, _index, _log_means, picture_grid
from diffrl.restore import measure, restore
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.tables import control_rows
from diffrl.types import every_label


def likelihood(*counts):
    """As much of a LogLikelihood as scoring asks for."""
    names = ("size", "colour")
    classifiers = [SimpleNamespace(num_classes=count) for count in counts]
    attributes = [
        SimpleNamespace(name=n, classifier=c)
        for n, c in zip(names[: len(counts)], classifiers, strict=True)
    ]
    return SimpleNamespace(num_classes=counts, attributes=attributes, split=lambda label: label)


class TestControl:
    def test_one_attribute_by_hand(self):
        """Three of four right; class 2 is never asked for and never drawn, so its F1 of 0 counts."""
        target, true = torch.tensor([[0], [0], [1], [1]]), torch.tensor([[0], [1], [1], [1]])
        measures = _control(likelihood(3), target, true)
        assert measures["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
        assert_close(measures["per_class"], [0.5, 1.0, 0.0], atol=1e-9)
        assert measures["accuracy"] == 0.75
        assert_close(measures["macro_f1"], (2 / 3 + 4 / 5 + 0) / 3, atol=1e-9)
        assert set(measures) == {"accuracy", "macro_f1", "labels", "confusion", "per_class"}

    def test_of_two_attributes_a_picture_is_right_if_both_are(self):
        target = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        true = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])
        measures = _control(likelihood(2, 2), target, true)
        assert measures["accuracy"] == 0.5
        assert measures["size/accuracy"] == measures["size/macro_f1"] == 1.0
        assert measures["colour/accuracy"] == 0.5
        assert_close(measures["colour/macro_f1"], 0.5, atol=1e-9)
        assert measures["confusion"] == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
        assert measures["labels"] == ["0,0", "0,1", "1,0", "1,1"]  # its rows, and its columns

    def test_a_label_s_index_is_its_place_in_every_label(self):
        labels = every_label((2, 3, 4))
        assert _index(labels, (2, 3, 4)).tolist() == list(range(24))


def test_a_joint_label_asks_for_a_class_of_each_measure():
    """The last measure counts fastest; of sizes the last class is the smaller."""
    report = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())
    attributes = [
        Attribute("compressibility", Classifier(2, "dct"), torch.tensor([4.0]), report),
        Attribute("colourfulness", Classifier(2, "colour"), torch.tensor([15.0]), report),
    ]
    rows = control_rows({"per_class": [0.1, 0.2, 0.3, 0.4]}, LogLikelihood(attributes, joint=True))
    assert rows[0][:4] == ["label", "JPEG size", "colourfulness", "accuracy"]
    assert [row[:4] for row in rows[1:]] == [
        ["0", "> 4.00 kB", "< 15.00", "0.100"],
        ["1", "> 4.00 kB", ">= 15.00", "0.200"],
        ["2", "<= 4.00 kB", "< 15.00", "0.300"],
        ["3", "<= 4.00 kB", ">= 15.00", "0.400"],
    ]


def test_prompts_with_labels_are_evaluated_under_their_own(tiny_path, tmp_path, capsys):
    """No picture is asked for label 0: nothing is known of it, and that is valid JSON."""
    path = tmp_path / "words.csv"
    path.write_text("prompt,label\ncat,1\ndog,1\n")
    words = [f"env.model={tiny_path}", f"root={tmp_path}", "name=run", f"prompts={path}", *FAST]
    assert main(["train", *words]) == 0
    run = str(tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", run, "-n", "6", "--json"]) == 0
    measures = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert [sum(row) for row in measures["confusion"]] == [0, 6]
    assert measures["objective"][0] is measures["gap"][0] is None
    assert_close(measures["gap"][1], measures["log_z"][1] - measures["objective"][1], atol=1e-6)
    assert main(["eval", run, "-n", "6", "--prompts", "simple_animals", "--json"]) == 0
    measures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [sum(row) for row in measures["confusion"]] == [3, 3]
    assert measures["log_z"] is measures["gap"] is None  # Z is of the prompts that were trained on


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        ("cat,0 cat,1 dog,0 dog,1", True),
        ("cat,1 dog,1", True),
        ("cat,0 dog,1", False),
        ("cat,0 cat,1 dog,1", False),
    ],
)
def test_z_is_known_where_every_label_is_asked_of_every_prompt(rows, known, tiny_path, tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("\n".join(["prompt,label", *rows.split()]))
    words = [f"env.model={tiny_path}", f"prompts={path}", "reward.num_classes=2"]
    assert Setup(config.load(words)).z_known == known


def test_a_classifier_claims_what_it_says_without_the_ceiling(tiny_path, tmp_path, capsys):
    words = [f"env.model={tiny_path}", f"root={tmp_path}", "name=run", *FAST]
    assert main(["train", *words]) == 0
    measured = []
    for ceiling in (1.0, 0.4):
        setup, policy, reward = restore(tmp_path / "run", {})
        reward.ceiling = ceiling
        measured.append(measure(setup, policy, reward, 6))
    free, capped = measured
    assert_close(free["mean_logp"], free["reward_mean"], atol=1e-6)
    assert capped["reward_mean"] < free["reward_mean"]
    for name in ("mean_logp", "claimed_accuracy"):
        assert_close(capped[name], free[name], atol=1e-6)


@pytest.mark.parametrize("guidance", ["reconstruction", "mpgd", "smc", "svdd", "classifier_free"])
def test_every_guidance_follows_two_controls_at_once(two_controls, capsys, guidance):
    assert main(["eval", str(two_controls), f"guidance={guidance}", "-n", "8", "--json"]) == 0
    measures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measures["labels"] == ["0,0", "0,1", "1,0", "1,1"]
    assert [sum(row) for row in measures["confusion"]] == [2, 2, 2, 2]
    assert {"compressibility/accuracy", "colourfulness/macro_f1"} <= measures.keys()


def test_two_controls_are_trained_measured_and_asked_for(tiny_path, tmp_path, capsys):
    fast = [word for word in FAST if word != "reward.num_classes=2"]
    words = [f"env.model={tiny_path}", f"root={tmp_path}", "name=two", "reward=multitask", *fast]
    assert main(["train", *words, "algo.updates=1"]) == 0
    said = capsys.readouterr().out
    assert "classifier of JPEG size" in said
    assert "classifier of colourfulness" in said
    run = str(tmp_path / "two")
    assert main(["eval", run, "--json", "-n", "8"]) == 0
    measures = json.loads(capsys.readouterr().out)
    assert [sum(row) for row in measures["confusion"]] == [2, 2, 2, 2]
    assert measures["accuracy"] <= min(
        measures[f"{name}/accuracy"] for name in ("compressibility", "colourfulness")
    )
    assert len(measures["gap"]) == 4
    assert main(["eval", run, "-n", "8"]) == 0
    table = capsys.readouterr().out
    assert "colourfulness alone: accuracy" in table
    assert [line.split()[0] for line in table.splitlines()[1:5]] == ["0,0", "0,1", "1,0", "1,1"]
    assert main(["sample", run, "--prompt=cat", "--label=1,0", "-n=2", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "cat-label1,0.png").is_file()
    for label in ("1", "x,0", "1,0,1"):
        line = fails(capsys, "sample", run, "--prompt=cat", f"--label={label}")
        assert f"--label {label}: not 2 number(s); give them as --label 0,0" in line
    line = fails(capsys, "sample", run, "--prompt=cat", "--label=-1,-1", "guidance=svdd")
    assert "no --label" in line
    words = [f"env.model={tiny_path}", f"root={tmp_path}", "name=x", "reward=multitask", *fast]
    swapped = "reward.measures=[colourfulness,compressibility]"
    line = fails(capsys, "train", *words, swapped, f"reward.classifier={run}/classifier.safetensors")
    assert "knows 2 classes of compressibility and 2 classes of colourfulness" in line
    assert "has 2 classes of colourfulness and 2 classes of compressibility" in line


def test_estimates_of_z_are_averaged_before_the_logarithm_and_by_label():
    z = torch.tensor([0.5, 0.2, 1.5], dtype=torch.float64)
    means = _log_means(z.log(), torch.tensor([[0], [1], [0]]), (3,))
    assert_close(means[:2], [0.0, math.log(0.2)], atol=1e-9)
    assert means[2] is None


class TestPictureGrid:
    """Rows of it, before they are put together."""

    def rows(self, monkeypatch, tiny_path, *words):
        found = []
        monkeypatch.setattr(
            diffrl.evaluate, "grid", lambda rows, names, columns: found.extend([rows, columns])
        )
        setup = Setup(config.load([f"env.model={tiny_path}", "env.num_steps=2", *words]))
        reward = unfitted_reward()
        policy = setup.make_policy(reward.num_classes)
        actor = setup.make_guided(policy, reward, GRID_COLUMNS)
        picture_grid(actor, ["cat", "dog", "cow"])
        return *found, actor

    def test_the_pretrained_row_is_the_same_whatever_guides_and_every_row_has_its_noise(
        self, monkeypatch, tiny_path
    ):
        plain, columns, _ = self.rows(monkeypatch, tiny_path)
        assert columns == ["cat", "dog", "cow", "cat", "dog", "cow", "cat", "dog"]
        for row in plain:  # untrained, and no label moves it
            assert torch.equal(row, plain[0])
        guided, *_ = self.rows(monkeypatch, tiny_path, "guidance=mpgd", "guidance.rho=3")
        assert torch.equal(guided[0], plain[0])
        assert not torch.equal(guided[1], plain[1])

    def test_it_has_all_its_columns_however_few_envs_there_is_room_for(self, monkeypatch, tiny_path):
        whole, *_ = self.rows(monkeypatch, tiny_path)
        parts, columns, actor = self.rows(monkeypatch, tiny_path, "eval_batch=3")
        assert actor.env.num_envs == 3
        assert [len(row) for row in parts] == [len(columns)] * 5 == [8] * 5
        assert torch.equal(parts[0], parts[4])
        smc = ("guidance=smc", "guidance.num_particles=4", "guidance.gamma=30", "eval_batch=8")
        populations, _, actor = self.rows(monkeypatch, tiny_path, *smc)
        assert actor.env.num_envs == 8
        assert [row.shape for row in populations] == [row.shape for row in whole]
