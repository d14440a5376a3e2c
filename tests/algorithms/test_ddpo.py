import json

import pytest
import torch
from conftest import assert_close
from toy import Recorder, ToyEnv, ToyPolicy, linear_gain, objective

from diffrl.algorithms.advantages import GroupStatistics, groups_of, standardise
from diffrl.algorithms.ddpo import DDPO
from diffrl.cli import main
from diffrl.errors import DiffRLError

WHOLE = {"minibatches": 1, "max_grad_norm": 1e9, "per_prompt": False, "advantage_clip": 1e9}
SUM = {"log_prob_reduction": "sum", "clip_range": 0.2}


def run(algorithm, policy, seed=0):
    """One update on a fresh batch; returns the recorded gradients and the batch."""
    torch.manual_seed(seed)
    env = ToyEnv(policy.schedule, algorithm.batch_size, num_dims=policy.num_dims)
    batch = algorithm.collect(env, policy, torch.Generator().manual_seed(seed))
    recorder = Recorder(policy)
    metrics = algorithm.update([batch], policy, recorder)
    return recorder.gradients, batch, metrics


def sized(number, **settings):
    return DDPO(batch_size=number, micro_batch_size=number, **(WHOLE | SUM | settings))


def test_score_function_gradient_equals_the_formula_written_out():
    """-1/(B T) sum A_b grad log p(x_{t-1}|x_t), with grad log N = (x - mu)/sigma^2 dmu/dtheta."""
    policy = ToyPolicy()
    (gradient,), batch, _ = run(sized(64, estimator="sf"), policy)
    schedule, reward = policy.schedule, batch.reward
    advantage = (reward - reward.mean()) / reward.std(unbiased=False)
    by_hand = torch.zeros(2, dtype=torch.float64)
    for t in range(4):
        for b in range(64):
            y = int(batch.context.label[b])
            x, action = batch.latents[t][b].item(), batch.latents[t + 1][b].item()
            mu = linear_gain(schedule)[t] * x + schedule.eps_gain[t] * policy.theta[y].detach()
            score = (action - mu) / schedule.sigma[t] ** 2 * schedule.eps_gain[t]
            by_hand[y] -= advantage[b] * score / (64 * 4)
    assert_close(gradient, by_hand, atol=1e-10, rtol=1e-7)


def test_the_reference_is_asked_for_no_graph():
    """It would be one of zeros, as large as the policy's own."""
    policy, graphs = ToyPolicy(), []
    original = policy.reference
    policy.reference = lambda obs: graphs.append(torch.is_grad_enabled()) or original(obs)
    run(sized(8, kl=0.3, kl_form="loss"), policy)
    assert graphs
    assert not any(graphs)


@pytest.mark.parametrize("form", ["reward", "loss"])
def test_a_mean_over_dims_divides_the_whole_gradient_by_their_number(form):
    """The KL's part with the reward's, or the objective's weights would be others."""
    policy = ToyPolicy(num_dims=3)
    settings = {"estimator": "sf", "kl": 0.3, "kl_form": form}
    (mean,), _, _ = run(sized(16, log_prob_reduction="mean", **settings), policy)
    (total,), _, _ = run(sized(16, log_prob_reduction="sum", **settings), policy)
    assert_close(3 * mean, total, atol=0, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:algo.clip_range")  # the ratio is 1: any range will do
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_first_importance_sampled_step_equals_the_score_function(reduction):
    policy = ToyPolicy(num_dims=3)
    (a,), _, metrics = run(sized(32, log_prob_reduction=reduction), policy)
    (b,), _, _ = run(sized(32, log_prob_reduction=reduction, estimator="sf"), policy)
    assert_close(a, b, atol=1e-12, rtol=1e-9)
    assert metrics["train/ratio_deviation"] < 1e-12
    assert metrics["train/clip_fraction"] == 0


@pytest.mark.parametrize(
    ("kl", "form"), [(0.0, "loss"), (0.3, "reward"), (0.3, "loss")], ids=["no KL", "in reward", "as loss"]
)
def test_expected_gradient_is_that_of_the_closed_form_objective(kl, form):
    """Both forms of the KL, each with all its halves: within four standard errors of the truth."""
    policy = ToyPolicy()
    truth = torch.autograd.grad(objective(policy, kl).mean(), policy.theta)[0]
    estimates = []
    for seed in range(40):
        (gradient,), batch, _ = run(sized(2048, estimator="sf", kl=kl, kl_form=form), policy, seed)
        # the loss is minus the objective in units of the batch's standard deviation, a mean over T steps
        estimates.append(-gradient * 4 * batch.reward.std(unbiased=False))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - truth).abs() < 4 * error).all(), (estimates.mean(0), truth, error)
    assert (error < 0.1 * truth.abs()).all()  # the check can fail


def test_a_ratio_beyond_the_range_gives_no_gradient_where_the_step_is_already_favoured():
    policy = ToyPolicy(num_labels=1)
    algorithm = sized(32)
    env = ToyEnv(policy.schedule, 32, num_labels=1)
    batch = algorithm.collect(env, policy, torch.Generator().manual_seed(0))
    pairs = torch.tensor([[0, 1], [0, 1]])
    batch.log_prob[1, 0] -= 1.0  # as if the old policy had liked it less: ratio e > 1.2
    kl_weight = torch.zeros(2)
    loss, _ = algorithm._loss(batch, torch.tensor([2.0, -2.0]), kl_weight, pairs, policy)
    assert_close(loss, [-2 * 1.2, 2 * torch.e], atol=1e-6)
    good, bad = (torch.autograd.grad(part, policy.theta, retain_graph=True)[0] for part in loss)
    assert not good.any()
    assert bad.any()


def test_constant_rewards_teach_nothing():
    policy = ToyPolicy()
    algorithm = sized(8)
    env = ToyEnv(policy.schedule, 8)
    env.value = lambda x_0, context: torch.full((8,), 0.1, dtype=torch.float64)
    recorder = Recorder(policy)
    algorithm.update([algorithm.collect(env, policy, torch.Generator().manual_seed(0))], policy, recorder)
    assert not recorder.gradients[0].any()


def test_minibatches_and_fractions_give_the_promised_number_of_steps_and_pairs(monkeypatch):
    policy = ToyPolicy()
    seen = []
    original = DDPO._loss

    def spy(self, batch, advantage, kl_weight, pairs, policy):
        seen.append(pairs)
        return original(self, batch, advantage, kl_weight, pairs, policy)

    monkeypatch.setattr(DDPO, "_loss", spy)
    settings = {"minibatches": 2, "inner_epochs": 3, "timestep_fraction": 0.5}
    gradients, _, _ = run(sized(8, **settings), policy)
    assert len(gradients) == 6
    every = torch.cat(seen).tolist()
    assert len(every) == 3 * 8 * 2
    first_epoch = torch.cat(seen[:2]) if len(seen) == 6 else torch.cat(seen[: len(seen) // 3])
    assert sorted(first_epoch[:, 0].tolist()) == sorted(2 * list(range(8)))
    assert len({tuple(pair) for pair in first_epoch.tolist()}) == 16


def test_training_with_a_kl_ends_near_the_closed_form_optimum_and_without_it_goes_past():
    ends = {}
    for kl in (0.0, 0.5):
        policy = ToyPolicy(num_labels=1)
        algorithm = sized(256, kl=kl, updates=120, learning_rate=0.05, weight_decay=0.0)
        optimizer = torch.optim.AdamW([policy.theta], lr=0.03, weight_decay=0.0)
        env = ToyEnv(policy.schedule, 256, num_labels=1)
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        for update in range(120):
            optimizer.param_groups[0]["lr"] = 0.03 * algorithm.rate(update)
            algorithm.update([algorithm.collect(env, policy, generator)], policy, optimizer)
        ends[kl] = policy
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    probe = ToyPolicy(num_labels=4001)
    probe.theta.data = grid
    best = grid[objective(probe, 0.5).argmax()]
    assert_close(ends[0.5].theta[0], best, atol=0.02)
    assert ends[0.0].theta[0] < best - 0.1 < best < 0  # x_0 falls with theta: past it is below it
    assert objective(ends[0.0])[0] > objective(ends[0.5])[0]


class TestStatistics:
    def test_a_ring_remembers_the_last_rewards_and_few_fall_back_to_the_batch(self):
        statistics = GroupStatistics(size=3, min_count=2)
        a, b = ("cat", (0,)), ("cat", (1,))
        mean, std = statistics.update([a, b], torch.tensor([1.0, 5.0]))
        assert_close(mean, [3, 3], atol=0)  # one each: the batch stands in
        assert_close(std, [2, 2], atol=0)
        mean, std = statistics.update([a, a], torch.tensor([3.0, 8.0]))
        assert_close(mean, [4, 4], atol=1e-6)  # of 1, 3, 8
        mean, _ = statistics.update([a, b], torch.tensor([1.0, 7.0]))
        assert_close(mean, [4, 6], atol=1e-6)  # of 3, 8, 1 and of 5, 7

    def test_its_state_survives_a_round_trip_through_json(self):
        import json

        one, other = GroupStatistics(4, 2), GroupStatistics(4, 2)
        one.update([("cat", (1,)), ("dog", (0,))], torch.tensor([1.0, 2.0]))
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        rewards = torch.tensor([4.0, 6.0])
        groups = [("cat", (1,)), ("cat", (1,))]
        for a, b in zip(one.update(groups, rewards), other.update(groups, rewards), strict=True):
            assert_close(a, b, atol=0)
        assert one.state_dict() == other.state_dict()

    def test_standardised_rewards_are_clipped_and_alike_ones_are_zero(self):
        reward, mean, std = (
            torch.tensor([3.0, 30.0, 7.0]),
            torch.tensor([1.0, 0, 7]),
            torch.tensor([4.0, 2, 0]),
        )
        assert_close(standardise(reward, mean, std, 5.0), [0.5, 5.0, 0.0], atol=0)


def test_a_group_shares_prompt_and_label_and_competes_at_once(tiny_path, tmp_path, monkeypatch):
    seen = []
    update = DDPO.update
    monkeypatch.setattr(
        DDPO, "update", lambda self, parts, *rest: update(self, (seen.append(p) or p for p in parts), *rest)
    )
    words = ["algo=ddpo", "algo.group_size=2", "algo.min_count=2", "algo.batch_size=8", "algo.updates=1"]
    words += ["algo.minibatches=1", "algo.micro_batch_size=4", "env.num_steps=2", "eval_pictures=2"]
    words += [f"env.model={tiny_path}", "reward.num_pictures=40", "reward.num_classes=2"]
    assert main(["train", *words, f"root={tmp_path}", "name=run"]) == 0
    assert len(seen) == 2
    for part in seen:
        groups = groups_of(part.context)
        assert groups[::2] == groups[1::2]
        assert groups[0] != groups[2]
    kept = json.loads(next(tmp_path.glob("run/checkpoints/*/state.json")).read_text())
    assert [len(rewards) for *_, rewards in kept["algorithm"]["rewards"]] == [2] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "ppo"},
        {"minibatches": 3},
        {"estimator": "sf", "minibatches": 2},
        {"timestep_fraction": 0.0},
        {"clip_range": 0.0},
        {"kl": -1.0},
        {"kl_form": "both"},
        {"inner_epochs": 0},
        {"group_size": 0},
        {"group_size": 3},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DiffRLError, match=r"algo\."):
        DDPO(**settings)


@pytest.mark.parametrize("settings", [{"log_prob_reduction": "sum"}, {"clip_range": 0.2}])
def test_a_clip_range_that_does_not_fit_the_reduction_is_warned_of(settings):
    with pytest.warns(UserWarning, match="Pair mean with 1e-4"):
        DDPO(**settings)
