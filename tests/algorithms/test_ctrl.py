import itertools

import pytest
import torch
from conftest import assert_close
from test_policy import learn_a_little, make_policy

from diffrl import config
from diffrl.algorithms.ctrl import CTRL
from diffrl.algorithms.truncation import Truncation
from diffrl.build import Setup
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.policy import without_label
from diffrl.rollout import rollout
from diffrl.types import ActorStep, draw


class Smooth:
    """A differentiable stand-in for log p(y|x): minus a squared distance that depends on the label."""

    differentiable = True
    num_classes = (3,)

    def __call__(self, images, context):
        return -((images.mean((2, 3)) - 0.2 * context.label) ** 2).sum(1) * 50


def make(tiny, num_envs=2, num_steps=4, guidance_scale=2.0):
    policy = make_policy(tiny, num_steps=num_steps, guidance_scale=guidance_scale, double=True)
    tiny.double()
    env = DenoisingVectorEnv(tiny, policy.schedule, Smooth(), ["cat", "dog"], num_envs=num_envs)
    learn_a_little(policy)
    return policy, env


def objective(env, policy, grad_steps, gamma=2.0, seed=5):
    generator = torch.Generator().manual_seed(seed)
    trajectory = rollout(
        env, policy, generator, reference=policy.reference, grad_steps=grad_steps, seed=seed
    )
    return (gamma * trajectory.reward - trajectory.kl.sum(0)).mean()


def trainable(policy):
    return [*policy.lora_parameters(), *policy.label_embedding.parameters()]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_gradient_equals_finite_differences(tiny, guidance_scale):
    policy, env = make(tiny, guidance_scale=guidance_scale)
    parameters = trainable(policy)
    gradients = torch.autograd.grad(objective(env, policy, grad_steps=4), parameters)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):  # random directions in parameter space
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        direction[-1][-1] = 0  # the null row does not learn
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        values, h = [], 1e-5
        for sign in (1, -2, 1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * h * d
                values.append(float(objective(env, policy, grad_steps=0)))
        assert_close((values[0] - values[1]) / (2 * h), slope, atol=0, rtol=1e-5)


def test_the_reference_is_part_of_the_kl_gradient(tiny):
    """Cutting mu_ref from the graph must change the gradient: this is what the finite differences see."""
    policy, env = make(tiny)

    def cut(obs):
        with torch.no_grad():
            return policy.reference(obs)

    gradients = []
    for reference in (policy.reference, cut):
        generator = torch.Generator().manual_seed(5)
        trajectory = rollout(env, policy, generator, reference=reference, grad_steps=4, seed=5)
        gradients.append(torch.autograd.grad(trajectory.kl.sum(), policy.lora_parameters()[1])[0])
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_truncation_equals_detaching_the_noise_prediction(tiny):
    """Steps that are not kept, by hand: the same chain with eps.detach() there."""
    policy, env = make(tiny)
    kept = [True, False, True, False]
    fast = torch.autograd.grad(objective(env, policy, kept), policy.lora_parameters())

    class Detaching:
        def begin(self, obs):
            self.i = -1

        def laws(self, obs, keep):
            eps = policy._guided_eps(obs, adapters=True)
            eps_ref = policy._guided_eps(without_label(obs), adapters=False)
            if not keep:
                eps, eps_ref = eps.detach(), eps_ref.detach()
            step = policy.schedule.step
            return [step(obs["latents"], e, obs["timestep"]) for e in (eps, eps_ref)]

        def act(self, obs, generator):
            self.i += 1
            law, self.reference = self.laws(obs, kept[self.i])
            return ActorStep(draw(law, generator), law)

    actor = Detaching()
    generator = torch.Generator().manual_seed(5)
    trajectory = rollout(env, actor, generator, reference=lambda obs: actor.reference, grad_steps=4, seed=5)
    by_hand = (2.0 * trajectory.reward - trajectory.kl.sum(0)).mean()
    slow = torch.autograd.grad(by_hand, policy.lora_parameters())
    for a, b in zip(fast, slow, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-7)


def test_kl_from_one_random_step_is_unbiased_in_value_and_gradient(tiny):
    """The expectation over the step drawn of KL_i / p_i is the whole sum, and so is its gradient."""
    policy, env = make(tiny)

    def kl_and_gradient(kl_weights):
        generator = torch.Generator().manual_seed(5)
        trajectory = rollout(
            env, policy, generator, reference=policy.reference, grad_steps=4, kl_weights=kl_weights, seed=5
        )
        kl = trajectory.kl.sum(0).mean()
        gradient = torch.autograd.grad(kl, policy.lora_parameters(), materialize_grads=True)
        return torch.cat([kl.detach()[None], *(g.flatten() for g in gradient)])

    share = (policy.schedule.kappa / policy.schedule.kappa.sum()).tolist()
    single = [share[i] * kl_and_gradient([(i == j) / share[j] for j in range(4)]) for i in range(4)]
    assert_close(torch.stack(single).sum(0), kl_and_gradient(None), atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("kl_steps", [1, None])
def test_the_default_estimate_is_unbiased_over_the_subset_of_kept_steps(tiny, kl_steps):
    """The mean over all six pairs of the window's four steps is the whole window's, value and gradient."""
    policy, env = make(tiny, num_steps=5)

    def value_and_gradient(kept):
        algorithm = CTRL(gamma=3.0, truncation=Truncation(count=len(kept)), kl_steps=kl_steps)
        algorithm.truncation.kept = lambda *_: [i in kept for i in range(5)]
        env.reset(seed=5)
        trajectory = algorithm.collect(env, policy, torch.Generator().manual_seed(5))
        kl = trajectory.kl.sum(0).mean()
        assert len(trajectory.kl) == (5 if kl_steps is None else len(kept) + 1)  # and one never kept
        gradient = torch.autograd.grad((trajectory.reward - kl / 3).sum(), policy.lora_parameters())
        return torch.cat([kl.detach()[None], *(g.flatten() for g in gradient)])

    pairs = [value_and_gradient(pair) for pair in itertools.combinations(range(4), 2)]
    whole = value_and_gradient(range(4))
    assert_close(torch.stack(pairs).mean(0), whole, atol=1e-12, rtol=1e-8)


def test_a_kl_from_some_steps_needs_kept_steps_of_a_known_chance():
    with pytest.raises(DiffRLError, match=r"kl_steps=1 algo\.truncation\.kind=uniform: .*kl_steps=null"):
        CTRL(truncation=Truncation(kind="uniform"))
    CTRL(truncation=Truncation(kind="uniform"), kl_steps=None)


def test_a_step_measured_for_its_kl_alone_gives_the_reward_no_gradient(tiny):
    policy, env = make(tiny)
    gradients = []
    for kl_weights in ([0, 4.0, 0, 0], [0, 0, 0, 4.0]):
        trajectory = rollout(
            env,
            policy,
            torch.Generator().manual_seed(5),
            reference=policy.reference,
            grad_steps=[True, False, False, False],
            kl_weights=kl_weights,
            seed=5,
        )
        gradients.append(torch.autograd.grad(trajectory.reward.sum(), policy.lora_parameters()[1])[0])
    assert_close(gradients[0], gradients[1], atol=1e-12)
    assert gradients[0].any()


def test_the_posterior_means_jacobian_is_the_true_gradient_for_gaussian_latents(tiny):
    """Of law N(0, I) the optimal denoiser is eps = sqrt(1 - A) x_t, x_0's covariance constant."""
    policy, env = make(tiny, num_steps=5)
    schedule = policy.schedule
    bias = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    class Optimal:
        def begin(self, obs):
            self.i = -1

        def act(self, obs, generator):
            self.i += 1
            eps = (1 - schedule.alpha_bar[self.i]).sqrt() * obs["latents"] + bias
            law = schedule.step(obs["latents"], eps, obs["timestep"])
            return ActorStep(draw(law, generator), law)

    def posterior_mean(obs):
        # the chain stops at the first timestep's signal, a little short of 1
        return schedule.normal_mean(obs) / schedule.alpha_bar_prev[-1].sqrt()

    def gradient(mean):
        trajectory = rollout(
            env, Optimal(), torch.Generator().manual_seed(1), grad_steps=5, posterior_mean=mean, seed=1
        )
        return torch.autograd.grad(trajectory.reward.sum(), bias)[0]

    assert_close(gradient(posterior_mean), gradient(None), atol=0, rtol=1e-6)


def test_by_the_posterior_mean_the_kept_steps_add_up(tiny):
    """No step's gradient passes through another's network, so all together are the sum of each alone."""
    policy, env = make(tiny)

    def gradient(kept):
        trajectory = rollout(
            env,
            policy,
            torch.Generator().manual_seed(5),
            grad_steps=kept,
            posterior_mean=policy.posterior_mean,
            seed=5,
        )
        return torch.autograd.grad(trajectory.reward.sum(), policy.lora_parameters()[1])[0]

    single = [gradient([i == j for j in range(4)]) for i in range(4)]
    assert all(g.any() for g in single)
    assert_close(sum(single), gradient([True] * 4), atol=1e-12, rtol=1e-8)


def test_the_posterior_mean_moves_no_picture_and_has_no_gradient_of_its_own(tiny):
    """It is a map from x_t alone: the trained weights are not in it, and its value adds nothing to x_0."""
    policy, env = make(tiny)
    runs = [
        rollout(env, policy, torch.Generator().manual_seed(5), grad_steps=4, posterior_mean=mean, seed=5)
        for mean in (None, policy.posterior_mean)
    ]
    assert torch.equal(runs[0].latents, runs[1].latents)
    obs, _ = env.reset(seed=0)
    obs["latents"].requires_grad_()
    policy.posterior_mean(obs).sum().backward()
    assert obs["latents"].grad.any()
    assert not any(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_no_graph_is_kept_without_gradient_steps(tiny):
    policy, env = make(tiny)
    assert not objective(env, policy, grad_steps=0).requires_grad


def test_micro_batches_add_up_to_the_whole_batch(tiny):
    policy, env = make(tiny, num_envs=4)
    whole = CTRL(batch_size=4, micro_batch_size=4, max_grad_norm=1e9)
    halves = CTRL(batch_size=4, micro_batch_size=2, max_grad_norm=1e9)
    trajectory = rollout(
        env,
        policy,
        torch.Generator().manual_seed(0),
        reference=policy.reference,
        grad_steps=4,
        seed=0,
    )

    def gradient_of(algorithm, trajectories):
        class Recorder:
            def step(self):
                self.gradients = [p.grad.clone() for p in trainable(policy)]

            def zero_grad(self):
                for p in trainable(policy):
                    p.grad = None

        recorder = Recorder()
        metrics = algorithm.update(trajectories, policy, recorder)
        return recorder.gradients, metrics

    from dataclasses import replace

    parts = [
        replace(trajectory, reward=trajectory.reward[half], kl=trajectory.kl[:, half])
        for half in (slice(0, 2), slice(2, 4))
    ]
    for part in parts:  # one graph serves both halves here, as it never does in training
        part.reward.mean().backward(retain_graph=True)
    for p in trainable(policy):
        p.grad = None
    backward = torch.Tensor.backward
    torch.Tensor.backward = lambda self: backward(self, retain_graph=True)
    try:
        (a, metrics_a), (b, metrics_b) = gradient_of(whole, [trajectory]), gradient_of(halves, parts)
    finally:
        torch.Tensor.backward = backward
    for x, y in zip(a, b, strict=True):
        assert_close(x, y, atol=1e-10, rtol=1e-8)
    for name in metrics_a:
        assert_close(metrics_a[name], metrics_b[name], atol=1e-6, rtol=1e-6)


def test_mean_kl_with_gamma_trains_as_summed_kl_with_gamma_times_dims(tiny):
    """gamma * r - KL / d is 1/d of (gamma d) * r - KL."""
    policy, env = make(tiny)
    dims = 4 * 8 * 8
    directions = []
    for algorithm in (
        CTRL(gamma=3.0, kl_reduction="mean", batch_size=2, micro_batch_size=2, max_grad_norm=1e9),
        CTRL(gamma=3.0 * dims, kl_reduction="sum", batch_size=2, micro_batch_size=2, max_grad_norm=1e9),
    ):
        env.reset(seed=3)
        trajectory = algorithm.collect(env, policy, torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(trainable(policy), lr=0.0)
        gradients = []
        optimizer.register_step_pre_hook(
            lambda *_, out=gradients: out.extend(p.grad.clone() for p in trainable(policy))
        )
        algorithm.update([trajectory], policy, optimizer)
        directions.append(torch.cat([g.flatten() for g in gradients]))
    # each loss is divided by its own gamma: -(r - KL / (gamma d)) both times
    assert_close(directions[0], directions[1], atol=1e-12, rtol=1e-8)


def test_training_raises_the_objective(tiny):
    policy, env = make(tiny, num_envs=8)
    algorithm = CTRL(updates=15, batch_size=8, micro_batch_size=8, gamma=10.0, learning_rate=1e-2)
    optimizer = algorithm.make_optimizer(policy)
    generator = torch.Generator().manual_seed(0)
    before = objective(env, policy, 0, gamma=10.0)
    for _ in range(algorithm.updates):
        algorithm.update([algorithm.collect(env, policy, generator)], policy, optimizer)
    assert objective(env, policy, 0, gamma=10.0) > before + 1


def test_the_mean_kl_aims_at_gamma_times_dims():
    """Which is what it trains as; DDPO's weight and RWR's exponent are of the sum."""
    assert CTRL(gamma=3.0).target_gamma(64) == 3.0
    assert_close(CTRL(gamma=3.0, kl_reduction="mean").target_gamma(64), 192.0, atol=1e-9)
    setup = Setup(config.load(["algo.gamma=2", "algo.kl_reduction=mean"]))
    assert_close(setup.target_gamma, 2.0 * 4 * 16 * 16, atol=1e-9)


def test_the_objective_that_is_told_is_the_one_that_is_maximised(tiny):
    policy, env = make(tiny)
    for reduction, dims in (("sum", 1), ("mean", 4 * 8 * 8)):
        algorithm = CTRL(gamma=3.0, kl_reduction=reduction, batch_size=2, micro_batch_size=2)
        env.reset(seed=3)
        trajectory = algorithm.collect(env, policy, torch.Generator().manual_seed(1))
        expected = 3.0 * trajectory.reward.mean() - trajectory.kl.sum(0).mean() / dims
        metrics = algorithm.update([trajectory], policy, torch.optim.SGD(trainable(policy), lr=0.0))
        assert_close(metrics["rollout/objective"], expected, atol=0, rtol=1e-6)


def test_the_rates_rise_over_the_warm_up_and_fall_to_the_end():
    linear = CTRL(updates=8, warmup=3)
    by_hand = [1 / 4, 2 / 4 * 7 / 8, 3 / 4 * 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert_close([linear.rate(update) for update in range(8)], by_hand, atol=1e-12)
    constant = CTRL(updates=4, warmup=1, decay="constant")
    assert [constant.rate(update) for update in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert CTRL(updates=4).rate(0) == 1.0


def test_the_optimizer_s_settings_are_the_algorithm_s(tiny):
    policy, _ = make(tiny)
    groups = CTRL(beta2=0.97, weight_decay=0.5, learning_rate=0.1).make_optimizer(policy).param_groups
    assert [group["betas"] for group in groups] == [(0.9, 0.97)] * 2
    assert [group["weight_decay"] for group in groups] == [0.5] * 2
    assert [group["lr"] for group in groups] == [0.1, CTRL.embedding_learning_rate]


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": -1.0},
        {"kl_reduction": "max"},
        {"updates": 0},
        {"batch_size": 10, "micro_batch_size": 4},
        {"learning_rate": 0.0},
        {"decay": "cosine"},
        {"truncation": Truncation(path="network")},
        {"beta2": 1.0},
        {"warmup": -1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DiffRLError, match=next(iter(settings))):
        CTRL(**settings)
