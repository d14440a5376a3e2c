"""A surrogate learns another reward from its scores, and then has its gradient."""

import json
import shutil
import threading

import pytest
import torch
from conftest import assert_close
from test_cli import FAST, fails

import diffrl
from diffrl import config, settings_file
from diffrl.benchmarks.soak import bits, numbers
from diffrl.build import Setup
from diffrl.cli import main
from diffrl.errors import DiffRLError
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.types import Context


def context(count):
    return Context(["x"] * count, torch.zeros(count, 1, 1), torch.zeros(count, 0, dtype=torch.int64))


def pictures(count, seed):
    """Noise of any strength on any ground."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.rand(count, 3, 1, 1, generator=generator)
    strength = 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    return (ground + strength * torch.randn(count, 3, 32, 32, generator=generator)).clamp(0, 1)


class Brightness:
    """A black box that counts what it is asked."""

    differentiable, num_classes = False, ()

    def __init__(self):
        self.asked = []

    def __call__(self, images, context):
        self.asked += images.mean((1, 2, 3)).tolist()
        return images.detach().mean((1, 2, 3))


def round_of(count, seed):
    return [(pictures(count, seed), context(count))]


def test_its_error_falls_with_queries_and_its_gradient_points_where_the_true_one_does():
    surrogate, test = OnlineSurrogateReward(of=Brightness()), pictures(32, 9).requires_grad_()
    truth, errors, cosines = test.detach().mean((1, 2, 3)), [], []
    for number, count in enumerate((32, 96, 384)):
        told = surrogate.observe(round_of(count, number))
        value = surrogate(test, context(32))
        (gradient,) = torch.autograd.grad(value.sum(), test)
        errors.append(float((value.detach() - truth).square().mean().sqrt()))
        # the true gradient is the same number at every pixel
        flat = gradient.flatten(1)
        cosines.append(flat.mean(1) * flat.shape[1] ** 0.5 / flat.norm(dim=1))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]
    assert errors[2] < 0.1 * float(truth.std())
    assert cosines[0].mean() < cosines[1].mean() < cosines[2].mean()
    assert cosines[2].min() > 0.25  # of 3,072 dimensions: chance is .02
    assert told["reward/queries"] == 512
    assert told["reward/surrogate_error"] < errors[0]


def test_before_it_has_asked_it_is_nothing_and_so_is_its_gradient():
    images = pictures(3, 0).requires_grad_()
    value = OnlineSurrogateReward(of=Brightness())(images, context(3))
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert value.tolist() == [0.0] * 3
    assert not gradient.any()


def test_a_black_box_that_does_not_answer_is_given_up():
    door = threading.Event()

    class Stuck(Brightness):
        def __call__(self, images, context):
            door.wait()

    surrogate = OnlineSurrogateReward(of=Stuck())
    with pytest.raises(DiffRLError, match=r"Stuck has not answered for 0\.01 s on 2 pictures"):
        surrogate.observe(round_of(2, 0), timeout=0.01)
    door.set()


def test_a_run_gives_its_black_box_as_long_as_its_settings_say(tiny_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from threading import Event\n\ndef stuck(images, context):\n    Event().wait()\n"
    )
    monkeypatch.chdir(tmp_path)
    words = [word for word in FAST if not word.startswith("reward.")]
    words += [f"env.model={tiny_path}", "algo=ctrl", "reward=surrogate[mine.py:stuck]", "eval_every=9"]
    said = fails(capsys, "train", *words, "reward_timeout=0.01")
    assert "reward stuck has not answered for 0.01 s" in said


def test_after_a_single_query_it_is_that_score_everywhere_near_it():
    surrogate = OnlineSurrogateReward(of=Brightness(), queries=1)
    ((images, where),) = round_of(1, 3)
    surrogate.observe([(images, where)])
    found = surrogate(images, where)
    assert_close(found, images.mean((1, 2, 3)), atol=1e-3)


def test_it_asks_about_the_pictures_drawn_in_their_order_until_the_budget_is_spent():
    true = Brightness()
    surrogate = OnlineSurrogateReward(of=true, queries=7)
    first, second = pictures(4, 0), pictures(6, 1)
    assert surrogate.observe([(first[:2], context(2)), (first[2:], context(2))]) == {"reward/queries": 4.0}
    assert surrogate.observe([(second[:2], context(2)), (second[2:], context(4))])["reward/queries"] == 7
    assert surrogate.observe(round_of(3, 2)) == {"reward/queries": 7.0}
    assert_close(true.asked, torch.cat([first, second[:3]]).mean((1, 2, 3)), atol=0)


def test_the_fit_follows_from_the_queries_and_not_from_the_rounds_or_who_was_resumed():
    whole, parts, resumed = (OnlineSurrogateReward(of=Brightness()) for _ in range(3))
    images, test = pictures(40, 0), pictures(5, 1)
    whole.observe([(images, context(40))])
    for part in images.split(10):
        parts.observe([(part, context(10))])
    resumed.load_state_dict(parts.state_dict())
    for other in (parts, resumed):
        assert torch.equal(other(test, context(5)), whole(test, context(5)))


def test_when_it_has_learnt_it_has_none_of_the_faults_that_a_check_finds():
    surrogate = OnlineSurrogateReward(of=Brightness())
    surrogate.observe(round_of(64, 0))
    diffrl.check_reward(surrogate)


def test_guidance_asks_what_a_surrogate_stands_for(tiny_path):
    """A run that is opened again has no surrogate: it would say 0 of every candidate."""
    chosen = ["algo=reward_backprop", "reward=surrogate[jpeg]", "guidance=svdd"]
    setup = Setup(config.load([f"env.model={tiny_path}", *chosen]))
    reward = setup.config.reward
    assert setup.guide(setup.make_policy(()), reward, 2).env.reward is reward.of


@pytest.fixture
def words(tiny_path, tmp_path):
    words = [f"env.model={tiny_path}", "env.num_steps=2", "env.guidance_scale=1", "algo.updates=3"]
    words += ["algo.batch_size=4", "algo.micro_batch_size=2", "eval_pictures=2", f"root={tmp_path}"]
    return [*words, "checkpoint_every=1", "keep_last=9", "algo=reward_backprop", "reward.queries=6"]


def test_a_run_with_it_counts_its_queries_is_judged_by_the_true_reward_and_resumes_exactly(
    words, tmp_path, capsys
):
    assert main(["train", *words, "reward=surrogate[jpeg]", "name=run"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward/queries"] for line in lines if "reward/queries" in line] == [4, 6, 6]
    # a surrogate of nothing learnt would say 0; no JPEG file is smaller than its header, 300 bytes
    assert all(line["eval/reward_mean"] < -0.3 for line in lines if "eval/reward_mean" in line)
    claims = ["eval/claimed_reward" in line for line in lines if "eval/reward_mean" in line]
    assert claims == [False, True]  # before the first query it claims nothing
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    for step in (2, 3):
        (found,) = (tmp_path / "stopped" / "checkpoints").glob(f"step-*{step}")
        shutil.rmtree(found)
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    assert bits(tmp_path / "stopped") == bits(tmp_path / "run")
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json", "-n", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reward_mean"] < -0.3
    assert "knows nothing here" in fails(capsys, "eval", str(tmp_path / "run"), "guidance=mpgd")


def test_settings_of_the_true_reward_are_reached_and_come_back(tmp_path):
    words = ["reward=surrogate[[jpeg,jpeg_incompressible]]", "reward.of.weights=[1,3]", "reward.queries=9"]
    chosen = config.load(words)
    settings_file.write(chosen, tmp_path / "config.yaml")
    again = settings_file.read(tmp_path / "config.yaml").reward
    assert (again.queries, again.of.weights) == (9, [1.0, 3.0])
    assert again.differentiable
    assert not again.of.differentiable


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("reward=surrogate[jpge]", "reward=jpge: no such reward. Did you mean 'jpeg'?"),
        ("reward=surrogate[softmax]", "a surrogate sees no label"),
        ("reward=surrogate[compressibility]", "none that is itself fitted"),
        ("reward=[jpeg,surrogate[jpeg]]", "write surrogate[[one,other]]"),
        ("reward=surrogate[jpeg] reward.queries=0", "reward.queries=0: must be 1 or more"),
        ("reward=surrogate[jpeg] reward.query=9", "Did you mean 'reward.queries'?"),
    ],
)
def test_mistakes_are_named(capsys, word, expected):
    assert expected in fails(capsys, "train", *word.split())
