"""The solvable model as an env: its denoiser, its rewards in closed form, and the commands on it."""

import json
import math

import gymnasium
import pytest
import torch
from conftest import assert_close
from test_cli import fails
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

import diffrl.backbones.gaussian_mixture as backbone
from diffrl import config, evaluate_mixture
from diffrl.backbones.gaussian_mixture import Denoiser, GaussianMixtureModel, Mixture
from diffrl.build import Setup
from diffrl.cli import main
from diffrl.errors import DiffRLError
from diffrl.policy import LoRA, Policy
from diffrl.restore import pretrained
from diffrl.rewards.closed_form import Gaussian, Softmax
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule, make_scheduler
from diffrl.types import NO_LABEL, Context

PLANE = Mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.4, 0.2])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a short run; the cache beside it holds its denoiser."""
    root = tmp_path_factory.mktemp("runs")
    words = ["env.num_steps=8", "algo.updates=40", "eval_every=20"]
    words += ["algo.batch_size=128", "algo.micro_batch_size=64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(root / "cache"))
        assert main(["train", "env=gaussian_mixture", f"root={root}", "name=one", *words]) == 0
    return root / "one"


def points(count, num_dims):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, num_dims, 1, 1, generator=generator, dtype=torch.float64)


def context(labels):
    label = torch.tensor(labels)[:, None]
    return Context([""] * len(label), torch.zeros(len(label), 1, 1), label)


class TestMixture:
    def test_density_at_any_noise_agrees_with_torch(self):
        x, a = points(6, 2), torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99, 1.0]).double()
        for x_t, alpha_bar, log_prob in zip(x, a, PLANE.log_prob(x, a), strict=True):
            variance = alpha_bar * PLANE.variances + 1 - alpha_bar
            parts = MultivariateNormal(
                alpha_bar.sqrt() * PLANE.means, variance[:, None, None] * torch.eye(2).double()
            )
            law = MixtureSameFamily(Categorical(PLANE.weights), parts)
            assert_close(log_prob, law.log_prob(x_t.flatten()), atol=1e-12)

    def test_optimal_noise_is_the_score_by_autograd(self):
        x, a = points(5, 2).requires_grad_(), torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99]).double()
        (score,) = torch.autograd.grad(PLANE.log_prob(x, a).sum(), x)
        assert_close(PLANE.eps(x, a).detach(), -(1 - a).sqrt()[:, None, None, None] * score, atol=1e-12)

    def test_draws_have_the_mixture_s_moments(self):
        x = PLANE.draw(40_000, torch.Generator().manual_seed(0)).flatten(1)
        assert_close(x.mean(0), [0.4, 0.15], atol=0.02)
        # by hand: sum w (s^2 + m^2) - mean^2
        expected = [0.3 * 1.16 + 0.7 * 1.04 - 0.16, 0.3 * (0.16 + 0.25) + 0.7 * 0.04 - 0.0225]
        assert_close(x.var(0), expected, atol=0.03)


class TestDenoiser:
    def test_it_has_learnt_the_optimal_noise_and_is_fitted_once(self, run, monkeypatch):
        monkeypatch.setenv("DIFFRL_CACHE", str(run.parent / "cache"))
        monkeypatch.setattr(backbone, "fit", None)  # a second fit would fail
        mixture = Mixture([0.6, 0.4], [[-1.0], [1.0]], [0.35, 0.35])
        model = GaussianMixtureModel.load(mixture)
        for timestep in (1, 181, 481, 981):
            a = make_scheduler().alphas_cumprod[timestep].double().expand(2000)
            generator = torch.Generator().manual_seed(1)
            noise = torch.randn(2000, 1, 1, 1, generator=generator, dtype=torch.float64)
            x_t = a[0].sqrt() * mixture.draw(2000, generator) + (1 - a[0]).sqrt() * noise
            predicted = model.unet(x_t.float(), torch.full((2000,), timestep))[0]
            assert (predicted.double() - mixture.eps(x_t, a)).square().mean().sqrt() < 0.03

    def test_a_damaged_cache_is_fitted_again(self, hasty):
        model = GaussianMixtureModel.load(PLANE)
        (path,) = backbone.cache_folder().glob("gaussian-mixture-*.safetensors")
        path.write_bytes(path.read_bytes()[:100])
        again = GaussianMixtureModel.load(PLANE)
        assert_close(again.unet.last.weight, model.unet.last.weight, atol=0)

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_every_trainable_tensor_gets_a_gradient(self, checkpointing):
        torch.manual_seed(0)
        model = GaussianMixtureModel(PLANE, Denoiser(2))
        policy = Policy(
            model.unet,
            DDIMSchedule(model.scheduler, 4, 1.0),
            model.encode_prompts([""]),
            guidance_scale=1.0,
            num_classes=(2,),
            lora=LoRA(2, ["into", "of_time", "out"]),
            checkpointing=checkpointing,
        )
        obs = {
            "latents": points(3, 2).float(),
            "timestep": policy.schedule.timesteps[[1, 2, 3]],
            "prompt_embeds": torch.zeros(3, 1, 1),
            "label": torch.tensor([[0], [1], [NO_LABEL]]),
        }
        assert torch.equal(policy(obs).mean, policy.reference(obs).mean)
        with torch.no_grad():
            for p in policy.lora_parameters():
                p += 0.1
        policy(obs, in_chain=True).mean.square().sum().backward()
        trainable = [*policy.lora_parameters(), *policy.label_embedding.parameters()]
        assert len(trainable) == 2 * 3 + 1  # A and B of the three layers; the labels
        for name, p in policy.named_parameters():
            learns = any(p is other for other in trainable)
            assert p.requires_grad == learns, name
            assert (p.grad is not None and bool(p.grad.any())) == learns, name


class TestRewards:
    def test_softmax_of_two_labels_is_a_logistic_function(self):
        x = points(5, 1)
        expected = torch.nn.functional.logsigmoid(4 * x.flatten() - 1)
        assert_close(Softmax()(x, context([1] * 5)), expected, atol=1e-12)
        assert_close(Softmax().log_prob(x).exp().sum(1), torch.ones(5), atol=1e-12)

    def test_gaussian_is_the_density_of_the_observation(self):
        x = points(4, 1)
        expected = Normal(x.flatten(), 0.7).log_prob(torch.tensor(0.3, dtype=torch.float64))
        assert_close(Gaussian([-1.0, 0.3], 0.7)(x, context([1] * 4)), expected, atol=1e-12)
        x = points(4, 2)
        seen = torch.tensor([0.3, -0.2], dtype=torch.float64)
        law = MultivariateNormal(x.flatten(1), 0.49 * torch.eye(2).double())
        actual = Gaussian([[0.3, -0.2], [1.0, 1.0]], 0.7)(x, context([0] * 4))
        assert_close(actual, law.log_prob(seen), atol=1e-12)

    def test_each_point_is_scored_for_its_own_label_and_none_counts_nothing(self):
        x = points(3, 1)
        table = Softmax().log_prob(x)
        actual = Softmax()(x, context([1, NO_LABEL, 0]))
        assert_close(actual, [table[0, 1], 0.0, table[2, 0]], atol=0)

    def test_the_true_class_is_the_likeliest_label(self):
        x = torch.tensor([-1.0, 0.2, 0.3, 1.0])[:, None, None, None]
        assert Softmax().true_class(x).tolist() == [0, 0, 1, 1]  # p(y=1|x) = .5 at x = .25

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Softmax(intercepts=[0.0]), "1 of them for 2 slopes"),
            (lambda: Softmax([1.0], [0.0]), "2 labels or more"),
            (lambda: Softmax([[1.0], [1.0, 2.0]]), "lists of as many numbers"),
            (lambda: Softmax(["a", 1.0]), "must be numbers"),
            (lambda: Softmax([math.inf, 1.0]), "must be finite"),
            (lambda: Gaussian(standard_deviation=0.0), "standard_deviation=0.0: must be positive"),
            (lambda: Gaussian([]), "must be one number each"),
        ],
    )
    def test_bad_settings_are_named(self, make, words):
        with pytest.raises(DiffRLError, match=words):
            make()


class TestSettings:
    def test_the_env_alone_chooses_its_reward_its_layers_and_ctrl_s_rates(self):
        chosen = config.load(["env=gaussian_mixture"])
        assert isinstance(chosen.reward, Softmax)
        assert chosen.policy.targets == ["into", "of_time", "out"]
        assert chosen.algo.truncation.path == "network"
        other = config.load(["env=gaussian_mixture", "reward=gaussian", "algo.gamma=10", "policy.rank=3"])
        assert isinstance(other.reward, Gaussian)
        assert (other.algo.gamma, other.policy.rank) == (10, 3)
        assert config.load([]).algo.truncation.path == "posterior_mean"  # emoji keeps its own

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["env.weights=[.6,.6]"], "they sum to 1.2, not 1. Try [0.5,0.5]"),
            (["env.weights=[1.5,-.5]"], "each must be positive"),
            (["env.weights=[1]"], "env.weights=[1.0]: 1 of them for 2 means"),
            (["env.standard_deviations=[.3,0]"], "0 is not a standard deviation"),
            (["env.standard_deviations=[.3,-.3]"], "-0.3 is not a standard deviation"),
            (["env.standard_deviations=[.3]"], "1 of them for 2 means"),
            (["env.means=[[0,0,0],[1,1,1]]"], "3 dimensions; give 1 or 2"),
            (["env.means=[[0,0],[1,1]]"], "points of 2 dimension(s)"),
            (["env.eta=2"], "env.eta=2.0"),
            (["env.num_steps=0"], "env.num_steps=0"),
            (["reward=compressibility"], "the reward scores pictures. Use reward=softmax"),
        ],
    )
    def test_bad_input_is_one_line_that_names_it(self, words, message, capsys, tmp_path):
        line = fails(capsys, "train", "env=gaussian_mixture", f"root={tmp_path}", *words)
        assert message in line

    def test_a_reward_of_points_scores_no_pictures(self, capsys, tmp_path):
        line = fails(capsys, "train", "reward=softmax", f"root={tmp_path}")
        assert "the env makes pictures" in line
        assert "Use reward=compressibility" in line


def test_it_is_a_gymnasium_env(hasty):
    env = gymnasium.make_vec("diffrl/GaussianMixture-v0", num_envs=3, num_steps=4)
    obs, _ = env.reset(seed=0)
    assert env.observation_space["latents"].shape == (3, 1, 1, 1)
    for _ in range(4):
        obs, reward, terminated, _, info = env.step(0.5 * obs["latents"])
    assert terminated.all()
    x, y = info["images"].flatten(), obs["label"].flatten()
    expected = torch.nn.functional.logsigmoid((2 * y - 1) * (4 * x - 1))
    assert_close(reward, expected, atol=1e-6)
    with pytest.raises(DiffRLError, match="render_mode=None"):
        env.render()


class TestCommands:
    def test_training_closes_most_of_the_gap_and_says_how_much_is_left(self, run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first, _, last = (line for line in lines if "exact/gap_nats" in line)
        for line in (first, last):
            assert line["exact/gap_nats"] == max(line["exact/gap_nats_per_label"])
            assert line["exact/tv"] == max(line["exact/tv_per_label"])
            columns = (line[f"exact/{name}_per_label"] for name in ("best", "objective", "gap_nats"))
            for best, objective, gap in zip(*columns, strict=True):
                assert gap == pytest.approx(best - objective)
                assert gap > 0
        assert first["exact/kl_nats_per_label"] == [0.0, 0.0]
        assert last["exact/gap_nats"] < 0.5 * first["exact/gap_nats"]
        assert last["exact/tv"] < 0.5 * first["exact/tv"]
        names = [path.name for path in sorted((run / "pictures").iterdir())]
        assert names == ["laws-0000.png", "laws-0020.png", "laws-0040.png"]

    def test_eval_repeats_the_last_evaluation(self, run, capsys, monkeypatch):
        monkeypatch.setenv("DIFFRL_CACHE", str(run.parent / "cache"))
        assert main(["eval", str(run), "--json"]) == 0
        measures = json.loads(capsys.readouterr().out)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "exact/gap_nats" in line][-1]
        assert_close(measures["exact/gap_nats"], last["exact/gap_nats"], atol=1e-6)
        assert main(["eval", str(run)]) == 0
        assert "gap (nats)" in capsys.readouterr().out

    def test_there_are_no_pictures_to_sample(self, run, capsys, hasty):
        line = fails(capsys, "sample", run, "--prompt", "cat", "--label", "0")
        assert "points, not pictures" in line


def test_two_dimensions_train_without_an_exact_answer(hasty, tmp_path):
    words = ["env.means=[[-1,0],[1,0]]", "reward.slopes=[[0,0],[4,0]]", "env.num_steps=3"]
    words += ["algo.updates=1", "algo.batch_size=4", "algo.micro_batch_size=4"]
    assert main(["train", "env=gaussian_mixture", *words, f"root={tmp_path}", "name=a"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert "sampled/objective_per_label" in lines[-1]
    assert not any("exact/gap_nats" in line for line in lines)


def test_points_are_sampled_a_few_at_a_time_each_from_noise_of_its_own(hasty, monkeypatch):
    drawn = []

    def noted(*arguments, **named):
        drawn.append(rollout(*arguments, **named))
        return drawn[-1]

    monkeypatch.setattr(evaluate_mixture, "_SAMPLES", 10)
    monkeypatch.setattr(evaluate_mixture, "_AT_ONCE", 4)
    monkeypatch.setattr(evaluate_mixture, "rollout", noted)
    setup = Setup(config.load(["env=gaussian_mixture", "env.num_steps=3", "algo=none", "guidance=mpgd"]))
    policy, reward = pretrained(setup)
    measures = evaluate_mixture.MixtureEvaluation(setup, policy, reward).measure(seed=0)
    assert [len(part.reward) for part in drawn] == [4] * 6  # of two labels, the last two points left out
    rewards = torch.cat([part.reward for part in drawn]).view(2, 12)[:, :10]
    assert_close(torch.tensor(measures["sampled/log_prob_per_label"]), rewards.mean(1), atol=1e-6)
    starts = torch.cat([part.latents[0] for part in drawn]).view(2, 12)
    assert (starts[0] == starts[1]).all()  # one seed for every label
    assert len(starts[0].unique()) == 12


def test_rollouts_keep_points_as_their_own_pictures(hasty):
    setup = Setup(config.load(["env=gaussian_mixture", "env.num_steps=3"]))
    env = setup.make_env(setup.config.reward, 5)
    policy = setup.make_policy((2,))
    episode = rollout(env, policy, torch.Generator().manual_seed(0), seed=0)
    assert_close(episode.images, episode.latents[-1], atol=0)


def test_a_frozen_denoiser_predicts_what_it_did_before():
    torch.manual_seed(0)
    denoiser = Denoiser(1)
    x_t, timestep = torch.randn(7, 1, 1, 1), torch.tensor([0, 1, 5, 100, 400, 981, 999])
    before = denoiser(x_t, timestep)[0]
    denoiser.freeze(1000)
    assert denoiser.times is not None
    assert_close(denoiser(x_t, timestep)[0], before, atol=1e-6)
    assert not any(p.requires_grad for p in denoiser.parameters())
