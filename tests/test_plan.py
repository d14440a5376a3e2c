"""What a run is said to take: its network calls are counted, so the answer is known without a clock."""

import json

import pytest
from PIL import Image

from diffrl import config
from diffrl import plan as planning
from diffrl.build import Setup
from diffrl.cli import main
from diffrl.learned import make_reward
from diffrl.plan import plan
from diffrl.train import train

pytestmark = pytest.mark.usefixtures("empty_cache")

SIZES = ["env.num_steps=3", "algo.updates=3", "eval_every=2", "eval_pictures=4", "eval_batch=4"]
LEARNED = ["reward.num_pictures=128", "reward.num_classes=2"]


def stages(words):
    return {stage.name: stage for stage in plan(config.load(words))}


@pytest.mark.parametrize(
    "words",
    [
        ["algo=ctrl", "algo.batch_size=4", "algo.micro_batch_size=2", *LEARNED],
        ["algo=ddpo", "algo.batch_size=4", "algo.micro_batch_size=2", "reward=jpeg"],
    ],
    ids=lambda words: words[0],
)
def test_it_counts_the_network_calls_that_training_makes(words, tiny_path, tmp_path):
    words = [*words, *SIZES, f"env.model={tiny_path}", f"root={tmp_path}", "name=run"]
    told = stages(words)
    train(config.load(words))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert told["update"].calls == lines[-1]["spent/network_calls"]
    assert told["update"].times == 3 * 2  # updates of two micro-batches
    # before the first update and after the second; the last one of four times as many pictures:
    # each picture by policy and reference, in batches of 4, and one batch more to be timed
    assert told["evaluate"].calls == (2 * (2 + 1) + (4 * 2 + 1)) * 4 * 3
    # three times, eight columns, four at a time, and a row more for each of two labels
    assert told["draw the grids"].calls == 3 * 8 * 3 * (3 if "algo=ctrl" in words else 2)
    assert all(stage.seconds > 0 for stage in told.values())
    if "algo=ctrl" in words:
        assert told["draw the offline data set"].calls == 128 * 3
    else:
        assert "fit the classifier" not in told


def test_the_one_more_evaluation_of_a_run_that_keeps_its_best_is_counted(tiny_path, tmp_path):
    words = ["algo=ddpo", "reward=jpeg", "algo.batch_size=2", "algo.micro_batch_size=2", *SIZES]
    words += ["algo.minibatches=1", f"env.model={tiny_path}", f"root={tmp_path}", "name=run"]
    words += ["keep_best=eval/reward_mean"]
    told = stages(words)
    train(config.load(words))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    taken = [json.loads(line)["update"] for line in lines if "eval/reward_mean" in line]
    assert taken == [0, 2, 3, 3]
    assert told["draw the grids"].times == 4
    assert told["evaluate"].calls == (3 * (2 + 1) + (4 * 2 + 1)) * 4 * 3


def test_of_a_data_set_nothing_is_drawn_and_its_own_pictures_are_fitted(tiny_path, tmp_path):
    for number in range(30):
        Image.new("RGB", (16, 16), (8 * number, 0, 0)).save(tmp_path / f"{number}.png")
    words = [*SIZES, f"env.model={tiny_path}", f"dataset={tmp_path}", "reward.num_classes=2"]
    told = stages(words)
    assert told.keys() == {"load the model", "fit the classifier", "evaluate", "draw the grids", "update"}
    assert (told["fit the classifier"].times, told["fit the classifier"].calls) == (30 / 128, 0)


def test_what_is_in_the_cache_is_not_drawn_again(tiny_path, tmp_path):
    words = [*SIZES, *LEARNED, f"env.model={tiny_path}", f"root={tmp_path}"]
    assert "fit the classifier" in stages(words)
    setup = Setup(config.load(words))
    make_reward(setup, setup.make_policy((2,)))
    assert stages(words).keys() == {"load the model", "evaluate", "draw the grids", "update"}


@pytest.mark.parametrize("word", ["reward.num_classes=4", "reward.num_classes=20", "reward.edges=[9000]"])
def test_a_fit_is_timed_whatever_the_few_pictures_that_were_drawn_show(word, tiny_path):
    told = stages([*SIZES, f"env.model={tiny_path}", "eval_batch=2", word])
    assert told["draw the offline data set"].times == 1024
    assert told["fit the classifier"].seconds > 0


def test_a_black_box_s_batch_of_episodes_is_held_at_once(tiny_path):
    words = ["algo=ddpo", "reward=jpeg", *SIZES, f"env.model={tiny_path}", "algo.micro_batch_size=2"]
    words += ["algo.minibatches=1"]
    one, many = (stages([*words, f"algo.batch_size={n}"])["update"].memory for n in (2, 200_000))
    # 99,999 times two pictures of 3 x 16 x 16, and of each T + 1 = 4 latents of 4 x 8 x 8, all float32
    least = 99_999 * 2 * 4 * (3 * 16 * 16 + 4 * 4 * 8 * 8)
    assert least < many - one < 1.2 * least


def test_a_large_model_on_a_cpu_is_asked_for_its_memory_alone(tiny_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "_LARGE", 0)
    update, taken = planning._Update.__call__, []
    monkeypatch.setattr(planning._Update, "__call__", lambda self: (taken.append(30), update(self)))
    monkeypatch.setattr(planning, "peak_memory", lambda cuda: 100 + sum(taken))
    words = [*SIZES, f"env.model={tiny_path}", "algo.batch_size=16", "algo.truncation.low=2"]
    for size, most in ((1, 130), (16, 100 + 16 * 30)):
        taken.clear()
        told = stages([*words, f"algo.micro_batch_size={size}"])
        assert told.keys() == {"load the model", "update"}
        assert (told["load the model"].memory, told["update"].memory) == (100, most)
        assert told["update"].seconds is None
        assert len(taken) == 1  # of one picture
    assert main(["plan", *words]) == 0
    assert "not timed" in capsys.readouterr().out


def test_a_model_that_is_not_here_is_planned_with_random_weights(monkeypatch):
    asked = []

    def setup(chosen):
        asked.append(chosen.env.random_weights)
        if not chosen.env.random_weights:
            raise planning.DiffRLError("not in the cache")
        raise KeyError

    monkeypatch.setattr(planning, "Setup", setup)
    with pytest.raises(KeyError):
        plan(config.load(["env=sd15"]))
    assert asked == [False, True]


def test_the_table_has_the_whole_run_below(tiny_path, capsys):
    words = ["algo=ddpo", "reward=jpeg", *SIZES, f"env.model={tiny_path}"]
    assert main(["plan", *words, "algo.minibatches=1", "algo.batch_size=2", "algo.micro_batch_size=2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    # evaluations and grids as above; three updates of two pictures, each drawn, and learnt from, in 3 steps
    assert last.split()[:3] == ["whole", "run", f"{180 + 144 + 3 * 2 * 2 * 3:,}"]
