"""A run that is stopped and resumed is, to the bit, the run that never was."""

import os
import signal
import sys
from functools import partial

import pytest
from safetensors.torch import load_file
from test_cli import fails
from test_datasets import noise, table
from torch.optim import Optimizer

from diffrl import checkpoint
from diffrl.algorithms.base import Algorithm
from diffrl.benchmarks.soak import RUN, bits, numbers, soak
from diffrl.cli import main
from diffrl.log import RunLog
from diffrl.restore import settings_of
from diffrl.run import Run
from diffrl.train import is_done, resume

UPDATES = 4
SMALL = [
    "env.num_steps=2",
    "env.guidance_scale=1",
    f"algo.updates={UPDATES}",
    "algo.batch_size=4",
    "algo.average=0.5",
    "reward.num_pictures=40",
    "reward.num_classes=2",
    "eval_every=2",
    "eval_pictures=2",
    "checkpoint_every=1",
]
ALGORITHMS = {
    "ctrl": [],
    "ctrl, accumulated, best kept": ["algo=ctrl", "algo.micro_batch_size=1", "keep_best=eval/mean_logp"],
    "ddpo": ["algo=ddpo", "algo.kl=0.5", "algo.per_prompt=true", "algo.min_count=2", "algo.minibatches=2"],
    "rwr": ["algo=rwr", "algo.epochs=2", "algo.fit_batch_size=2"],
    "reward_backprop": ["algo=reward_backprop", "algo.kl=0.01", "algo.kl_budget=0.5"],
    "classifier_free": ["algo=classifier_free", "algo.epochs=2", "algo.fit_batch_size=2"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("one-fit-for-all")


def command(tiny_path, name, root, *more):
    """Return the command that trains an algorithm of that name."""
    small = [*SMALL, "algo.micro_batch_size=4"]
    return ["train", f"env.model={tiny_path}", *small, *ALGORITHMS[name], f"root={root}", "name=run", *more]


@pytest.fixture
def words(tiny_path, cache, monkeypatch):
    """Return a function from an algorithm's name to the command that trains it."""
    monkeypatch.setenv("DIFFRL_CACHE", str(cache))
    return partial(command, tiny_path)


@pytest.fixture
def stopped_after(monkeypatch):
    """Return a function after which each of so many next trainings gets a signal in one of its updates."""

    def ask(number, after=1):
        train_once, count = Algorithm.step, [0]

        def step(self, policy, optimizer):
            count[0] += 1
            if count[0] == after:
                os.kill(os.getpid(), number)
            return train_once(self, policy, optimizer)

        monkeypatch.setattr(Algorithm, "step", step)
        return lambda: monkeypatch.setattr(Algorithm, "step", train_once)

    return ask


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stopped_and_resumed_it_is_the_run_that_never_was(name, words, tmp_path, stopped_after, capfd):
    """By three signals in a row, each in the first update after the last."""
    assert main(words(name, tmp_path / "whole")) == 0
    for stop in range(UPDATES - 1):
        number = signal.SIGTERM if stop % 2 else signal.SIGINT
        again = stopped_after(number)
        command = words(name, tmp_path / "parts", "resume=auto")
        assert main(command) == (130 if number == signal.SIGINT else 0)
        again()
        assert not is_done(tmp_path / "parts" / "run")
        said = capfd.readouterr()
        assert f"stopped after update {stop + 1}. Go on with" in " ".join(said.out.split())
        told = f"{number.name}: the run ends after the update at hand; a second one ends it at once"
        assert said.err.count(told) == 1
    assert resume(tmp_path / "parts" / "run") == tmp_path / "parts" / "run"
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert is_done(parts)
    assert numbers(whole) == numbers(parts)
    assert bits(whole) == bits(parts)


def test_a_second_ctrl_c_ends_it_in_the_midst_of_the_update(words, tmp_path, monkeypatch, capfd):
    def step(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setattr(Algorithm, "step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert main(words("ctrl", tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err.count("a second one ends it at once") == 1
    assert numbers(tmp_path / "run")[-1]["update"] == 0


def test_killed_before_its_first_update_it_begins_again(words, tmp_path, monkeypatch):
    assert main(words("ctrl", tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Algorithm, "step", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            main(words("ctrl", tmp_path / "parts"))
    assert main(words("ctrl", tmp_path / "parts", "resume=auto")) == 0
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert numbers(whole) == numbers(parts)
    assert bits(whole) == bits(parts)


def test_a_run_without_updates_that_was_killed_is_measured_once(words, tmp_path, monkeypatch, capsys):
    command = [word for word in words("ctrl", tmp_path, "algo=none") if not word.startswith("algo.")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "loop", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            main(command)
    assert main([*command, "resume=auto"]) == 0
    assert "eval/kl_nats" in numbers(tmp_path / "run")[-1]
    assert is_done(tmp_path / "run")
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "finished already, 0 updates" in " ".join(capsys.readouterr().out.split())


def test_a_run_is_gone_on_with_from_inside_its_folder(words, tmp_path, stopped_after, monkeypatch, capsys):
    again = stopped_after(signal.SIGTERM)
    assert main(words("ctrl", tmp_path / "my runs")) == 0
    again()
    assert "diffrl train --resume '/" in " ".join(capsys.readouterr().out.split())  # as a shell takes it
    monkeypatch.chdir(tmp_path / "my runs" / "run")
    assert main(["train", "--resume", "."]) == 0
    assert settings_of(tmp_path / "my runs" / "run").name == "run"


def test_an_update_without_a_finite_gradient_is_skipped_and_five_end_the_run(
    words, tmp_path, monkeypatch, capsys
):
    step, count = Algorithm.step, [0]

    def poisoned(self, policy, optimizer):
        count[0] += 1
        if count[0] == 2 or count[0] > 4:
            policy.lora_parameters()[0].grad[0, 0] = float("nan")
        return step(self, policy, optimizer)

    monkeypatch.setattr(Algorithm, "step", poisoned)
    assert main(words("ctrl", tmp_path)) == 0
    skipped = [
        line.get("train/skipped_steps", 0) for line in numbers(tmp_path / "run") if "train/loss" in line
    ]
    assert skipped == [0, 1, 0, 0]
    assert main(words("ctrl", tmp_path, "name=other", "algo.updates=20")) == 2
    assert "update 5: no finite gradient for 5 updates in a row; none was taken" in capsys.readouterr().err
    control = load_file(tmp_path / "other" / "control.safetensors")
    assert all(not table.any() for table in control.values())  # as it was before them


def test_of_several_steps_of_an_update_each_that_is_skipped_counts(words, tmp_path, monkeypatch):
    """DDPO's two minibatches: an update is lost where both are."""
    step, count = Algorithm.step, [0]

    def poisoned(self, policy, optimizer):
        count[0] += 1
        if count[0] in (1, 3, 4) or (count[0] % 2 == 0 and count[0] > 5):
            policy.lora_parameters()[0].grad[0, 0] = float("nan")
        return step(self, policy, optimizer)

    monkeypatch.setattr(Algorithm, "step", poisoned)
    assert main(words("ddpo", tmp_path, "algo.updates=8")) == 0  # half of each of the last six was taken
    lines = [line for line in numbers(tmp_path / "run") if "rollout/kl" in line]
    assert [line.get("train/skipped_steps", 0) for line in lines] == [1, 2, 1, 1, 1, 1, 1, 1]
    assert ["train/grad_norm_lora" in line for line in lines] == [True, False, *[True] * 6]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_run(
    words, tmp_path, stopped_after, capsys
):
    assert main(words("ctrl", tmp_path / "whole")) == 0
    again = stopped_after(signal.SIGTERM, after=3)
    assert main(words("ctrl", tmp_path / "parts")) == 0
    again()
    run = tmp_path / "parts" / "run"
    last, before = checkpoint.newest_first(run / "checkpoints")
    assert (last.name, before.name) == ("step-000003", "step-000002")
    (last / "tensors.safetensors").write_bytes(b"")
    assert main(["train", "--resume", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tensors.safetensors: 0 bytes" in said
    assert "goes on after update 2 of 4" in said
    assert numbers(run) == numbers(tmp_path / "whole" / "run")
    assert bits(run) == bits(tmp_path / "whole" / "run")


def test_killed_thirty_times_at_random_moments_it_is_the_run_that_never_was(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("DIFFRL_CACHE", str(cache))
    result = soak(30, RUN, tmp_path, seed=0)
    assert (result["kills"], result["failures"]) == (30, 0), result
    assert result["runs"] > 1


def older(run, claims, **settings):
    """Save a run once more as a version did that made none of these claims, and had these settings."""
    last = next(checkpoint.newest_first(run / "checkpoints"))
    stored = checkpoint.read(last)
    known = {name: claim for name, claim in stored.claims.items() if name not in claims}
    assert len(known) == len(stored.claims) - len(claims)
    stored.state["settings"].update(settings)
    step = checkpoint.step_of(last) + 1
    checkpoint.write(last.parent, step, stored.tensors, stored.state, claims=known, keep=1)


class TestEditedFiles:
    """Of the user's own, between a stop and the next start."""

    CLAIMS = ("prompts and labels", "evaluation prompts and labels", "hash of the data set")

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            (
                "my.csv",
                "prompt,label\ncat,0\ndog,0\n",
                "prompts and labels after loading: [['cat', 0], ['dog', 0]], and when it was saved: "
                "[['cat', 0], ['dog', 1]]",
            ),
            (
                "my.txt",
                "dog\n",
                "evaluation prompts and labels after loading: [['dog']], and when it was saved: [['bee']]",
            ),
        ],
    )
    def test_labels_of_prompts_and_prompts_of_evaluations_are_noticed(
        self, words, tmp_path, capsys, name, text, said
    ):
        (tmp_path / "my.csv").write_text("prompt,label\ncat,0\ndog,1\n")
        (tmp_path / "my.txt").write_text("bee\n")
        files = {"prompts": f"{tmp_path}/my.csv", "eval_prompts": f"{tmp_path}/my.txt"}
        more = [f"{key}={path}" for key, path in files.items()]
        assert main(words("reward_backprop", tmp_path, "algo.updates=1", *more)) == 0
        (tmp_path / name).write_text(text)
        assert said in fails(capsys, "train", "--resume", tmp_path / "run")
        older(tmp_path / "run", self.CLAIMS, **files)
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0

    def test_a_data_set_is_noticed_where_it_is_learnt_from(self, words, tmp_path, capsys):
        noise(tmp_path / "d", 60)
        table(tmp_path / "d", "label", [number % 2 for number in range(60)])
        more = [f"dataset={tmp_path}/d", "algo.updates=1"]
        assert main(words("classifier_free", tmp_path, *more)) == 0
        assert main(words("reward_backprop", tmp_path, *more, "name=fitted")) == 0
        table(tmp_path / "d", "label", [0, *(number % 2 for number in range(1, 60))][::-1])
        line = fails(capsys, "train", "--resume", tmp_path / "run")
        assert "hash of the data set after loading: " in line
        older(tmp_path / "run", self.CLAIMS)
        for name in ("run", "fitted"):
            assert main(["train", "--resume", str(tmp_path / name)]) == 0


class TestMistakes:
    @pytest.fixture
    def run(self, words, tmp_path):
        assert main(words("reward_backprop", tmp_path, "algo.updates=1")) == 0
        return tmp_path / "run"

    def line(self, capsys, *command):
        capsys.readouterr()
        assert main([str(word) for word in command]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    def test_a_finished_run_is_left_as_it_is(self, run, words, tmp_path, capsys):
        before = numbers(run), bits(run)
        assert main(["train", "--resume", str(run)]) == 0
        assert main(words("reward_backprop", tmp_path, "algo.updates=1", "resume=auto")) == 0
        assert "finished already, 1 updates" in " ".join(capsys.readouterr().out.split())
        assert (numbers(run), bits(run)) == before

    def test_other_settings_no_checkpoint_and_no_run_are_named(self, run, words, tmp_path, capsys):
        other = words("reward_backprop", tmp_path, "algo.updates=1", "resume=auto", "seed=1")
        assert "a run of other settings, so resume=auto cannot go on" in self.line(capsys, *other)
        line = self.line(capsys, "train", "--resume", run, "seed=1")
        assert "seed=1: the settings of" in line
        assert "all that may change is algo.micro_batch_size and eval_batch" in line
        assert "algo.batch_size=4: algo.micro_batch_size=3 does not divide it" in self.line(
            capsys, "train", "--resume", run, "algo.micro_batch_size=3"
        )
        assert "no such run" in self.line(capsys, "train", "--resume", tmp_path / "none")
        for folder in checkpoint.newest_first(run / "checkpoints"):
            (folder / checkpoint.MANIFEST).unlink()
        assert "no whole checkpoint in it" in self.line(capsys, "train", "--resume", run)

    def test_what_is_loaded_is_held_against_the_manifest(self, run, capsys, monkeypatch):
        """A weight that something else overwrites on the way, and another learning rate."""
        load = Optimizer.load_state_dict

        def meddles(optimizer, state):
            load(optimizer, state)
            optimizer.param_groups[0]["params"][0].data[0, 0] += 1e-3

        with monkeypatch.context() as patch:
            patch.setattr(Optimizer, "load_state_dict", meddles)
            line = self.line(capsys, "train", "--resume", run)
        assert "step-000001: hash of the adapters after loading: " in line
        monkeypatch.setattr(Algorithm, "rate", lambda *_: 0.5)
        line = self.line(capsys, "train", "--resume", run)
        assert "learning rates after loading: [0.0005, 0.025], and when it was saved: [0.0, 0.0]" in line

    def test_settings_that_were_edited_are_named(self, run, capsys):
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("updates: 1", "updates: 2"))
        line = self.line(capsys, "train", "--resume", run)
        assert "step-000001: algo.updates was 1 when it was saved, and is 2 now, in config.yaml" in line

    def test_a_classifier_that_was_changed_is_noticed(self, run, capsys):
        path = run / "classifier.safetensors"
        sound = bytearray(path.read_bytes())
        sound[-1] ^= 1  # of a weight
        path.write_bytes(sound)
        assert "hash of the classifier after loading" in self.line(capsys, "train", "--resume", run)

    @pytest.mark.parametrize("size", [0, 30])
    def test_metrics_that_were_cut_go_on_after_their_last_whole_line(self, run, capsys, size, monkeypatch):
        path = run / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes((lines[0] + lines[1])[: len(lines[0]) + size] if size else b"")
        with RunLog(run, len(b"".join(lines)), 1) as log:
            log.write(2, {"a": 1.0})
        assert path.read_bytes() == (lines[0] if size else b"") + b'{"update": 2, "a": 1.0}\n'
        assert "it was cut" in capsys.readouterr().out

    def test_a_checkpoint_of_another_version_says_so(self, run, capsys):
        (folder,) = [f for f in checkpoint.newest_first(run / "checkpoints") if f.name == "step-000001"]
        stored = checkpoint.read(folder)
        del stored.state["spent"]
        checkpoint.write(folder.parent, 2, stored.tensors, stored.state, claims=stored.claims, keep=1)
        line = self.line(capsys, "train", "--resume", run)
        assert "step-000002: it lacks 'spent'; diffrl 0.1.0 wrote it, this is 0.1.0" in line

    def test_never_is_the_default(self, run, words, tmp_path, capsys):
        line = self.line(capsys, *words("reward_backprop", tmp_path, "algo.updates=1"))
        assert "the run directory exists. Go on with it by resume=auto" in line
