"""The commands as a user types them, on a tiny checkpoint; each mistake is one line and exit code 2."""

import json
import shutil
import sys

import pytest
from conftest import assert_close
from PIL import Image
from safetensors.torch import load_file

from diffrl.algorithms.ctrl import CTRL
from diffrl.cli import main
from diffrl.restore import restore
from diffrl.weights import CONTROL_FILE, LORA_FILE

FAST = [
    "env.num_steps=2",
    "env.guidance_scale=1.5",
    "algo.updates=2",
    "algo.batch_size=4",
    "algo.micro_batch_size=2",
    "reward.num_pictures=40",
    "reward.num_classes=2",
    "eval_every=1",
    "eval_pictures=4",
]


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    """Return the folder of a finished tiny run."""
    return trained(tiny_path, tmp_path_factory.mktemp("runs"))


def trained(tiny_path, root):
    assert main(["train", f"env.model={tiny_path}", f"root={root}", "name=one", *FAST]) == 0
    return root / "one"


def fails(capsys, *argv):
    """Return the one line that a wrong command prints."""
    assert main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("diffrl: ")
    return lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ["algo=ddpo", "reward=jpeg"],
        ["algo=ddpo", "reward=jpeg_incompressible", "algo.kl=0.1"],
        ["algo=rwr", "reward=jpeg", "algo.epochs=1"],
        ["algo=ddpo", "reward=compressibility"],
        ["algo=rwr", "reward=compressibility", "algo.source=pretrained"],
        ["algo=reward_backprop", "algo.truncation.kind=last", "algo.truncation.count=1", "env.eta=0"],
        ["algo=reward_backprop", "algo.variance_samples=2"],
    ],
    ids=" ".join,
)
def test_every_algorithm_trains_and_its_run_can_be_measured(words, tiny_path, tmp_path, capsys):
    black_box = any("jpeg" in word for word in words)
    fast = [word for word in FAST if not (black_box and word.startswith("reward."))]
    assert main(["train", f"env.model={tiny_path}", f"root={tmp_path}", "name=run", *fast, *words]) == 0
    assert main(["eval", str(tmp_path / "run"), "--json", "-n", "4"]) == 0
    measures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measures["n"] == 4
    assert ("accuracy" in measures) != black_box
    assert (measures["kl_nats"] is None) == ("env.eta=0" in words)
    assert main(["sample", str(tmp_path / "run"), "--prompt", "cat", "-n", "2"]) == 0
    assert main(["eval", str(tmp_path / "run"), "-n", "4"]) == 0
    if black_box:
        line = fails(capsys, "sample", tmp_path / "run", "--prompt", "cat", "--label", "1")
        assert "no labels" in line


class TestTrain:
    def test_it_writes_everything_a_run_is(self, run):
        names = {path.name for path in run.iterdir()}
        assert names == {
            "config.yaml",
            "metrics.jsonl",
            "tensorboard",
            "pictures",
            ".lock",
            "checkpoints",
            "classifier.safetensors",
            "pytorch_lora_weights.safetensors",
            "control.safetensors",
        }
        assert list((run / "tensorboard").glob("events*"))
        grids = sorted((run / "pictures").iterdir())
        assert [path.name for path in grids] == ["grid-0000.png", "grid-0001.png", "grid-0002.png"]
        with Image.open(grids[-1]) as picture:
            assert picture.width > picture.height > 3 * 128  # the pretrained model's and two labels

    def test_every_update_logs_what_the_readme_promises(self, run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        updates = [line for line in lines if "train/loss" in line]
        assert [line["update"] for line in updates] == [1, 2]
        for line in updates:
            # two steps of the policy and, for both halves of the KL, of the reference; one posterior mean;
            # each with guidance
            assert line["time/calls_per_image"] == (2 + 2 + 1) * 2
            for name in (
                "rollout/reward_mean",
                "rollout/kl",
                "rollout/kl_mean",
                "rollout/objective",
                "rollout/accuracy",
                "train/grad_norm_lora",
                "train/grad_norm_embedding",
                "time/seconds_per_image",
            ):
                assert isinstance(line[name], float), name
        assert updates[0]["rollout/kl"] == 0.0  # the policy starts as the reference
        assert updates[1]["rollout/kl"] > 0.0

    def test_the_same_seed_gives_the_same_numbers_and_the_classifier_is_not_refitted(
        self, run, tiny_path, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path / "cache"))
        command = ["train", f"env.model={tiny_path}", f"root={tmp_path}", *FAST]
        assert main([*command, "name=a"]) == 0
        assert "drawing the offline dataset" in capsys.readouterr().out
        assert main([*command, "name=b"]) == 0
        out = capsys.readouterr().out
        assert "from the cache" in out
        assert "below 100 a class its classifier is hardly to be trusted" in " ".join(out.split())
        assert main([*command, "name=c", "reward.ceiling=0.9", "algo.updates=1"]) == 0
        assert "from the cache" in capsys.readouterr().out  # a ceiling is no part of the fit
        assert restore(tmp_path / "c", {})[2].ceiling == 0.9
        weights = [
            (folder / "pytorch_lora_weights.safetensors").read_bytes()
            for folder in (run, tmp_path / "a", tmp_path / "b")
        ]
        assert weights[0] == weights[1] == weights[2]

    def test_the_result_is_the_mean_of_the_last_updates_weights(self, tiny_path, tmp_path):
        command = ["train", f"env.model={tiny_path}", f"root={tmp_path}", *FAST, "algo.decay=constant"]
        settings = {"one": "algo.updates=1", "two": "algo.updates=2", "mean": "algo.average=1"}
        found = []
        for name, word in settings.items():
            assert main([*command, f"name={name}", word]) == 0
            weights = [load_file(tmp_path / name / file) for file in (LORA_FILE, CONTROL_FILE)]
            found.append(weights[0] | weights[1])
        one, two, mean = found
        for key, value in mean.items():
            assert_close(value, (one[key] + two[key]) / 2, atol=1e-7)
        assert any((one[key] - two[key]).abs().max() > 1e-4 for key in mean)

    def test_a_killed_run_keeps_what_its_last_evaluation_measured(self, tiny_path, tmp_path, monkeypatch):
        files = [tmp_path / "a" / name for name in (LORA_FILE, CONTROL_FILE)]
        monkeypatch.setattr(
            CTRL, "update", lambda *_: sys.exit(0 if all(f.is_file() for f in files) else 9)
        )
        with pytest.raises(SystemExit) as stop:
            main(["train", f"env.model={tiny_path}", f"root={tmp_path}", "name=a", *FAST])
        assert stop.value.code == 0

    def test_an_existing_run_is_left_alone(self, run, tiny_path, capsys):
        before = (run / "metrics.jsonl").read_bytes()
        line = fails(capsys, "train", f"env.model={tiny_path}", f"root={run.parent}", "name=one")
        assert "one: the run directory exists" in line
        assert "name=" in line
        assert (run / "metrics.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["algo=ctlr"], "algo=ctlr: no such algo. Did you mean 'ctrl'?"),
            (["env=emojy"], "env=emojy: no such env. Did you mean 'emoji'?"),
            (["reward=compresibility"], "Did you mean 'compressibility'?"),
            (["+experiment=ctrl_papr"], "Did you mean 'ctrl_paper'?"),
            (["algo.gama=3"], "algo.gama: no such setting. Did you mean 'algo.gamma'?"),
            (
                ["env=emoji", "env.num_step=3"],
                "env.num_step: no such setting. Did you mean 'env.num_steps'?",
            ),
            (["sead=3"], "sead: no such setting. Did you mean 'seed'?"),
            (["algo.gamma=strong"], "algo.gamma=strong: Value 'strong'"),
            (["seed=1.5"], "seed=1.5: Value '1.5'"),
            (["gamma"], "gamma: not of the form key=value"),
            (["~algo=ctrl"], "~algo=ctrl: not of the form key=value"),
            (["reward=jpeg"], "'jpeg' is a black box"),
            (["env.eta=0"], "env.eta=0"),
            (["algo.batch_size=10", "algo.micro_batch_size=4"], "algo.micro_batch_size=4 does not divide"),
            (["algo.kl_reduction=max"], "algo.kl_reduction=max: must be one of sum, mean"),
            (["policy.rank=0"], "policy.rank=0"),
            (["prompts=nothing"], "prompts=nothing"),
            (["env.model=/no/such/place"], "env.model=/no/such/place: no such folder"),
            (["env=sd15"], "no such folder here, not in the cache"),
            (["env=sd15", "env.image_size=510"], "env.image_size=510: must be a multiple of 8"),
            (["env.precision=half"], "env.precision=half: must be one of fp32, tf32, bf16, fp16"),
            (["env.precision=fp16"], "env.precision=fp16: gradients underflow in it"),
            (["dataset=/no/such/place"], "dataset=/no/such/place: no such folder"),
            (["dataset=/", "env=gaussian_mixture"], "dataset=/: for pictures"),
            (
                ["dataset=/", "algo=ddpo", "reward=jpeg"],
                "algo=ddpo reward=jpeg dataset=/: nothing reads it",
            ),
            (
                ["dataset=/", "reward.classifier=c.safetensors"],
                "reward.classifier=c.safetensors: is fitted",
            ),
            (["device=quantum"], "device=quantum: no such device"),
            (["reward.classifier=none.safetensors"], "none.safetensors: no such classifier"),
            (["env=gaussian_mixture", "eval_scales=[2]"], "eval_scales=[2.0]: for pictures"),
            (["reward.edges=[3,2]"], "reward.edges"),
            (["resume=always"], "resume=always: must be one of never, auto"),
            (["checkpoint_every=0"], "checkpoint_every=0: must be 1 or more"),
            (["keep_last=0"], "keep_last=0: must be 1 or more"),
            (["eval_every=0"], "eval_every=0: must be 1 or more"),
            (["seed=-1"], "seed=-1: must be 0 or more"),
            (["policy.targets=[to_q,to_z]"], "policy.targets=to_z: no such policy.targets. Did you mean"),
            (["algo.gamma=inf"], "algo.gamma=inf: must be positive and finite"),
            (["algo=reward_backprop", "algo.kl=1", "env.eta=0"], "algo=reward_backprop env.eta=0: without"),
        ],
    )
    def test_a_mistake_is_one_line_and_writes_nothing(self, words, expected, tmp_path, capsys):
        assert expected in fails(capsys, "train", *words, f"root={tmp_path / 'runs'}")
        assert not (tmp_path / "runs").exists()

    def test_a_folder_of_other_things_is_refused(self, tmp_path, capsys):
        folder = tmp_path / "pictures"
        folder.mkdir()
        assert "is empty" in fails(capsys, "train", f"dataset={folder}")
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        (folder / "notes.txt").write_text("x")
        assert "'notes.txt' is not a picture (1 of 2" in fails(capsys, "train", f"dataset={folder}")
        (folder / "notes.txt").rename(folder / "b.png")
        (folder / "a.png").write_bytes(b"x")
        line = fails(capsys, "fit", f"dataset={folder}")
        assert "a.png: not a whole picture, nor is any other of the 2" in line


class TestFit:
    def test_a_folder_of_pictures_is_fitted_and_the_file_is_used(self, tiny_path, tmp_path, capsys):
        import torch

        folder = tmp_path / "pictures"
        folder.mkdir()
        torch.manual_seed(0)
        for number in range(60):
            noise = (torch.rand(20, 20, 3) * 255 * (number % 4) / 3).byte().numpy()
            Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:500])
        out = tmp_path / "c.safetensors"
        words = [f"env.model={tiny_path}", f"dataset={folder}", "reward.num_classes=2"]
        assert main(["fit", *words, "--out", str(out)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "on 12 held-out pictures" in text
        assert "1 of 61 pictures cannot be read and are left out, the first is" in text
        assert "only 30 pictures of class" in text
        assert out.is_file()
        words = [*FAST, f"env.model={tiny_path}", f"root={tmp_path}", f"reward.classifier={out}"]
        assert main(["train", *words]) == 0
        assert "drawing" not in capsys.readouterr().out
        line = fails(capsys, "train", *words, "name=x", "reward.num_classes=4")
        assert "it knows 2 classes of compressibility" in line
        line = fails(capsys, "train", *words, "name=y", "env.image_size=24")
        assert "fitted to pictures of 16 px, and this env's have 24: another JPEG size" in line
        line = fails(capsys, "train", *words, "name=z", "reward.edges=[1.5]")
        assert "reward.edges asks for [1.5]. Leave them out" in line

    def test_a_black_box_has_nothing_to_fit(self, capsys):
        assert "nothing to fit" in fails(capsys, "fit", "reward=jpeg")


class TestEval:
    def test_json_has_every_promised_key(self, run, capsys):
        assert main(["eval", str(run), "--json", "-n", "6"]) == 0
        measures = json.loads(capsys.readouterr().out)
        promised = "accuracy macro_f1 confusion per_class kl_nats mean_logp n nfe_per_image"
        assert {*promised.split(), "seconds_per_image", "gap", "log_z", "objective"} <= measures.keys()
        assert measures["n"] == sum(map(sum, measures["confusion"])) == 6
        assert [sum(row) for row in measures["confusion"]] == [3, 3]
        hits = sum(measures["confusion"][y][y] for y in range(2))
        assert measures["accuracy"] == pytest.approx(hits / 6)
        assert measures["nfe_per_image"] == 2 * 2
        for y in range(2):
            gap = measures["log_z"][y] - measures["objective"][y]
            assert measures["gap"][y] == pytest.approx(gap)

    def test_it_repeats_and_the_table_agrees(self, run, capsys):
        numbers = []
        for _ in range(2):
            assert main(["eval", str(run), "--json", "-n", "6"]) == 0
            numbers.append(json.loads(capsys.readouterr().out) | {"seconds_per_image": 0})
        assert numbers[0] == numbers[1]
        assert main(["eval", str(run), "-n", "6"]) == 0
        assert f"accuracy {numbers[0]['accuracy']:.3f}" in capsys.readouterr().out

    def test_damaged_runs_are_named(self, run, tmp_path, capsys):
        assert "no such run" in fails(capsys, "eval", tmp_path / "none")
        assert "not a run directory" in fails(capsys, "eval", tmp_path)
        for name, words in (
            ("pytorch_lora_weights.safetensors", "damaged or cut short"),
            ("control.safetensors", "damaged or cut short"),
            ("classifier.safetensors", "not a whole classifier"),
            ("config.yaml", "cannot be read"),
        ):
            copy = tmp_path / name.replace(".", "-")
            shutil.copytree(run, copy)
            whole = (copy / name).read_bytes()
            (copy / name).write_bytes(whole[: len(whole) // 2])
            line = fails(capsys, "eval", copy)
            assert name in line
            assert words in line
            (copy / name).unlink()
            assert name in fails(capsys, "eval", copy)


class TestSample:
    def test_pictures_and_a_sheet_are_written(self, run, tmp_path, capsys):
        words = ["--prompt", "cat", "--label", "1", "-n", "3", "--control-scale", "1.5"]
        assert main(["sample", str(run), *words, "--out", str(tmp_path)]) == 0
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["cat-label1-00.png", "cat-label1-01.png", "cat-label1-02.png", "cat-label1.png"]

    def test_prompts_too_long_for_a_file_s_name_and_none_have_names_too(self, run, tmp_path):
        """Two that begin alike have names of their own, and no character is cut in two."""
        prompts = [f"the {'猫' * 100}", f"the {'猫' * 101}", "cat " * 20, ""]
        for prompt in prompts:
            assert main(["sample", str(run), "--prompt", prompt, "-n", "1", "--out", str(tmp_path)]) == 0
        names = {path.name for path in tmp_path.iterdir()}
        assert len(names) == 2 * len(prompts)
        assert {f"{'cat-' * 20}-label-1.png", "empty-label-1.png"} <= names
        assert sum(name.startswith(f"the-{'猫' * 25}-") for name in names) == 4

    def test_a_label_out_of_range_is_named(self, run, capsys):
        line = fails(capsys, "sample", run, "--prompt", "cat", "--label", "2")
        assert "label=2: out of range" in line
        assert "0 to 1" in line


def test_list_shows_every_choice(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for choice in ("algo=ctrl", "env=emoji", "env=sd15", "reward=jpeg", "+experiment=ctrl_paper"):
        assert choice in text


def test_learning_from_labels_takes_a_reward_that_gives_them(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Classed:\n    num_classes = (2,)\n    def __call__(self, images, context): ...\n"
    )
    line = fails(capsys, "train", "algo=classifier_free", f"reward={mine}:Classed")
    assert "classifier_free learns from labels, and" in line
    assert "gives none" in line


def test_a_run_without_training_is_its_evaluation_alone(tiny_path, tmp_path):
    words = [f"env.model={tiny_path}", f"root={tmp_path}", "name=plain", "algo=none", "guidance=svdd"]
    fast = [word for word in FAST if not word.startswith("algo.")]
    assert main(["train", *words, "guidance.num_candidates=2", *fast]) == 0
    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "eval/accuracy" in line] == [0]
    assert lines[-1]["spent/pictures"] == 0


def test_evaluations_have_prompts_of_their_own_if_asked(run, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("bee\n")
    setup, policy, reward = restore(run, {"eval_prompts": str(words)})
    assert setup.make_guided(policy, reward, 2).env.prompts == ["bee"]
    assert setup.make_env(reward, 2).prompts == setup.prompts != ["bee"]
    assert main(["eval", str(run), "-n", "2", "--prompts", str(words)]) == 0


def test_the_last_evaluation_tries_other_strengths_of_the_control(tiny_path, tmp_path):
    words = [f"env.model={tiny_path}", f"root={tmp_path}", "name=one", *FAST, "eval_scales=[0,1]"]
    assert main(["train", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    *before, last = [line for line in lines if "eval/accuracy" in line]
    assert not any(name.startswith("eval/scale") for line in before for name in line)
    assert last["eval/scale_0/kl_nats"] == 0.0  # the pretrained model
    for name in ("accuracy", "kl_nats", "confusion"):
        assert last[f"eval/scale_1/{name}"] == last[f"eval/{name}"]
    assert last["eval/kl_nats"] > 0.0
