"""Guidance on a model whose answers are known: a two-component mixture, its optimal denoiser, 50 steps.

The laws of label 1 were measured independently, by another program, with 6,000 samples or more.
"""

import pytest
import torch
from conftest import assert_close
from mixture import ALPHA_BAR, ClosedFormPolicy, Linear, attach, run, state, target
from test_exact import solve

from diffrl import config
from diffrl.algorithms.guidance.base import Unguided
from diffrl.algorithms.guidance.mpgd import MPGD
from diffrl.algorithms.guidance.reconstruction import Reconstruction
from diffrl.algorithms.guidance.smc import SMC
from diffrl.algorithms.guidance.svdd import SVDD
from diffrl.backbones.gaussian_mixture import Mixture
from diffrl.build import Setup
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.exact import moments
from diffrl.policy import Policy
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule


@pytest.mark.parametrize(
    ("guidance", "mean", "deviation"),
    [
        (Unguided(), -0.2, 1.03),  # the mixture itself: sd^2 = .35^2 + .96
        (Reconstruction(), 1.098, 0.281),
        (Reconstruction(scale=0.3), 0.632, 0.787),
        (Reconstruction(form="sigma2"), 1.076, 0.298),
        (Reconstruction(jacobian="frozen"), 1.253, 0.292),
        (MPGD(rho=1.0), 1.603, 0.165),
        (MPGD(rho=0.1), 1.195, 0.225),
        (MPGD(rho=0.02), 0.628, 0.670),
        (SVDD(4, gamma=1.0), 1.022, 0.371),
        (SVDD(20, gamma=1.0), 1.064, 0.317),
        (SVDD(20, selection="argmax"), 4.23, 0.16),
    ],
    ids=repr,
)
def test_law_of_label_one_is_the_published_one(guidance, mean, deviation):
    x_0, _ = run(guidance, 6000)
    assert_close(x_0.mean(), mean, atol=0.03)
    assert_close(x_0.std(), deviation, atol=0.03)


class TestBias:
    """Where theory says: too far into the class and too narrow, each in its degree."""

    def test_reconstruction_overshoots_and_its_frozen_form_more(self):
        mean, deviation, _ = target()
        full, frozen = (run(Reconstruction(jacobian=j), 4000)[0] for j in ("full", "frozen"))
        assert mean + 0.05 < full.mean() < frozen.mean() - 0.05
        assert full.std() < deviation - 0.05

    def test_weak_reconstruction_keeps_too_much_of_the_other_component(self):
        assert run(Reconstruction(scale=0.3), 4000)[0].std() > target()[1] + 0.2

    def test_a_long_step_of_mpgd_goes_too_far_and_too_narrow(self):
        x_0, _ = run(MPGD(rho=1.0), 2000)
        assert x_0.mean() > target()[0] + 0.2
        assert x_0.std() < target()[1] / 2

    def test_svdd_goes_to_a_limit_past_the_target_as_candidates_grow(self):
        few, many = (run(SVDD(m, gamma=1.0), 4000)[0] for m in (4, 50))
        assert target()[0] + 0.02 < few.mean() < many.mean()
        assert many.std() < few.std() < target()[1]

    def test_svdd_s_bias_is_its_value_function_s_with_the_true_one_it_has_none(self):
        toy = solve()

        class Oracle(SVDD):
            def value(self, obs, eps):
                log_h = toy.values[int(self.schedule.index(obs["timestep"])[0]), 1]
                x = obs["latents"].flatten().clamp(toy.points[0], toy.points[-1])
                place = torch.searchsorted(toy.points, x).clamp(1, len(log_h) - 1)
                share = (x - toy.points[place - 1]) / (toy.points[place] - toy.points[place - 1])
                return torch.lerp(log_h[place - 1], log_h[place], share)

        best = [float(m) for m in moments(toy.attainable[1], toy.points)]  # x_T ~ N(0, 1)
        true, learnt = (run(kind(50, gamma=1.0), 4000)[0] for kind in (Oracle, SVDD))
        assert_close([true.mean(), true.std()], best, atol=0.02)  # three standard errors
        assert learnt.mean() > best[0] + 0.05
        assert learnt.std() < best[1] - 0.05

    def test_two_twisted_particles_err_past_the_target_and_two_plain_ones_towards_the_prior(self):
        twisted, plain = (run(SMC(2, twisted=t, ess_threshold=1.0), 6000)[0].mean() for t in (True, False))
        assert plain + 0.05 < target()[0] < twisted - 0.05


@pytest.mark.parametrize(
    "guidance",
    [
        Reconstruction(scale=0.0),
        Reconstruction(scale=0.0, form="sigma2", jacobian="frozen"),
        MPGD(rho=0.0),
        MPGD(rho=0.0, eps="rederive"),
        MPGD(rho=0.0, step="normalised"),
        MPGD(start=0.5, stop=0.5),
        SVDD(1),
        SVDD(4, gamma=0.0),
        SMC(1),
        SMC(4, gamma=0.0, ess_threshold=1.0),
        SMC(4, gamma=0.0, ess_threshold=1.0, twisted=True),
        SMC(4, gamma=0.0, ess_threshold=1.0, resampling="multinomial"),
    ],
    ids=repr,
)
def test_without_strength_it_is_the_plain_sampler_to_the_bit(guidance, tiny):
    torch.manual_seed(0)
    schedule = DDIMSchedule(tiny.scheduler, 4, 1.0)
    policy = Policy(
        tiny.unet,
        schedule,
        tiny.encode_prompts([""]),
        guidance_scale=2.0,
        num_classes=(2,),
        checkpointing=False,
    )
    with torch.no_grad():
        for p in [*policy.lora_parameters(), *policy.embedding_parameters()]:
            p += 0.1 * torch.randn(p.shape)
    env = DenoisingVectorEnv(tiny, schedule, Bright(), ["cat", "dog"], num_envs=8, group_size=4)
    plain, guided = (
        rollout(env, g.attach(policy, env), torch.Generator().manual_seed(3), seed=4)
        for g in (Unguided(), guidance)
    )
    assert torch.equal(plain.latents, guided.latents)


class Bright:
    """Mean brightness, times the label."""

    differentiable, num_classes = True, (2,)

    def __call__(self, images, context):
        return images.flatten(1).mean(1) * (1 + context.label[:, 0])


EACH_ALONE = [
    Reconstruction(),
    Reconstruction(jacobian="frozen"),
    MPGD(),
    MPGD(step="normalised"),
    SVDD(4, selection="argmax"),
    SMC(4, ess_threshold=1.0, twisted=True),
    SMC(4),  # its populations resample at different steps
]
DRAWN = [SVDD(4), SMC(4, ess_threshold=1.0, resampling="multinomial")]  # by torch.multinomial


@pytest.mark.parametrize("guidance", [*EACH_ALONE, *DRAWN], ids=repr)
def test_no_sample_depends_on_another_ones_label(guidance):
    """Label and x_T of the last population change, the others stay where they were."""
    actor, env = attach(guidance, 3)
    k = guidance.population

    def draw_with(label, shift):
        latents = torch.randn(3 * k, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
        latents[2 * k :] += shift
        options = {"label": torch.tensor([0, 1, label]).repeat_interleave(k)[:, None], "latents": latents}
        return rollout(env, actor, torch.Generator().manual_seed(1), seed=0, options=options).latents[-1]

    one, other = draw_with(0, 0.0), draw_with(1, 0.5)
    assert_close(one[: 2 * k], other[: 2 * k], atol=1e-12)
    assert (one[2 * k :] - other[2 * k :]).abs().min() > 1e-3


@pytest.mark.parametrize("guidance", EACH_ALONE, ids=repr)
def test_a_batch_in_another_order_is_drawn_in_that_order(guidance, monkeypatch):
    """All that belongs to a population moves with it: label, x_T and every random number."""
    actor, env = attach(guidance, 3)
    k = guidance.population
    x_t = torch.randn(3 * k, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    label = torch.tensor([0, 1, 1]).repeat_interleave(k)[:, None]
    real = {name: getattr(torch, name) for name in ("rand", "randn")}

    def drawn(order):
        rows = (torch.tensor(order)[:, None] * k + torch.arange(k)).flatten()
        for name in real:  # a number a population, or one a particle
            monkeypatch.setattr(
                torch,
                name,
                lambda *a, of=name, **kw: (x := real[of](*a, **kw))[rows if len(x) > 3 else order],
            )
        options = {"label": label[rows], "latents": x_t[rows]}
        generator = torch.Generator().manual_seed(1)
        return rollout(env, actor, generator, seed=0, options=options).latents[-1], rows

    straight, _ = drawn([0, 1, 2])
    turned, rows = drawn([2, 0, 1])
    assert_close(turned, straight[rows], atol=1e-12)


def test_the_published_mean_over_the_batch_shrinks_the_gradient_by_its_size():
    observation = state(count=5)
    plain, shrunk = (attach(Reconstruction(over_batch=b), 5)[0] for b in (False, True))
    for actor in (plain, shrunk):
        actor.env.reset(seed=0)
    assert_close(5 * shrunk._gradient(observation)[1], plain._gradient(observation)[1], atol=1e-12)


def law_of(actor, observation):
    actor.env.reset(seed=0, options={"label": observation["label"]})
    actor.begin(observation)
    return actor.act(observation, torch.Generator().manual_seed(0)).distribution


@pytest.mark.parametrize("guidance", [SVDD(gamma=0.0), SMC(gamma=0.0), Reconstruction(scale=0.0)], ids=repr)
def test_without_strength_it_aims_at_the_pretrained_law(guidance):
    setup = Setup(config.load(["env=gaussian_mixture", "algo=none"]))
    setup.config.guidance = guidance
    assert setup.target_gamma == 0


@pytest.mark.parametrize(
    ("words", "gamma"),
    [
        (["algo=none"], 1),  # the posterior itself
        (["algo=none", "guidance=smc", "guidance.gamma=3"], 3),
        (["algo=ctrl", "algo.gamma=2"], 2),
        (["algo=ctrl", "algo.gamma=2", "guidance=smc", "guidance.gamma=3"], 5),
        (["algo=ctrl", "algo.gamma=2", "guidance=mpgd"], 2),  # aims at no law of its own
    ],
)
def test_guidance_sharpens_what_the_policy_aims_at(words, gamma):
    assert Setup(config.load(["env=gaussian_mixture", *words])).target_gamma == gamma


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_reconstruction_gradient_is_the_derivative_of_the_reward_at_x0hat(offset):
    observation, h = state(), 1e-5
    actor, env = attach(Reconstruction(offset=offset), 5)
    env.reset(seed=0, options={"label": observation["label"]})

    def value(shift):
        moved = {**observation, "latents": observation["latents"] + shift}
        reward = actor.value(moved, actor.policy.guided_eps(moved))
        return (reward.exp() + offset).log()

    expected = (value(h) - value(-h)) / (2 * h)
    assert_close(actor._gradient(observation)[1].flatten(), expected, atol=1e-8)


@pytest.mark.parametrize("i", [0, 20, 49])
def test_frozen_guidance_is_mpgd_with_a_step_that_falls_with_the_noise(i):
    """Both move eps along the same gradient: rho = s (1 - A) / A. Two code paths, one number."""
    observation = state(i=i)
    a = float(ALPHA_BAR[observation["timestep"][0]])
    one = law_of(attach(Reconstruction(scale=0.7, jacobian="frozen"), 5)[0], observation)
    other = law_of(attach(MPGD(rho=0.7 * (1 - a) / a, eps="rederive"), 5)[0], observation)
    assert_close(one.mean, other.mean, atol=1e-6)


def test_keeping_eps_moves_the_mean_by_sqrt_p_times_the_step():
    observation = state()
    actor, env = attach(MPGD(rho=0.3), 5)
    plain = law_of(attach(Unguided(), 5)[0], observation)
    moved = law_of(actor, observation)
    env.reset(seed=0, options={"label": observation["label"]})
    x_0 = actor.schedule.predict_x_0(
        observation["latents"], actor.policy.guided_eps(observation), observation["timestep"]
    )
    # d/dx log p(0|x) of a softmax with slopes 0 and 4: -4 p(1|x)
    slope = -4 * torch.sigmoid(4 * x_0 - 1)
    p = float(actor.schedule.alpha_bar_prev[20])
    assert_close(moved.mean - plain.mean, 0.3 * slope * p**0.5, atol=1e-6)


def test_mpgd_moves_a_picture_within_its_window_alone():
    """From a quarter of the trajectory on, and no longer from its half on."""
    whole, part, plain = (attach(g, 5)[0] for g in (MPGD(), MPGD(start=0.25, stop=0.5), Unguided()))
    num_steps = part.schedule.num_steps
    moved = []
    for i in range(num_steps):
        means = [law_of(actor, state(i=i)).mean for actor in (whole, part, plain)]
        moved.append(not torch.equal(means[1], means[2]))
        assert torch.equal(means[1], means[0] if moved[-1] else means[2])
    assert moved == [0.25 <= i / num_steps < 0.5 for i in range(num_steps)]
    assert any(moved)


def test_a_normalised_step_has_the_length_of_the_guidance_until_the_picture_is_good_enough():
    observation = state()
    observation["label"][:] = 1
    actor, env = attach(MPGD(rho=2.0, step="normalised"), 5)
    env.reset(seed=0, options={"label": observation["label"]})
    move = actor._move(observation, actor.policy.guided_eps(observation))
    assert_close(move.abs().flatten(), torch.full((5,), 2.0 * 0.5), atol=1e-9)  # |eps - eps_null| = 0.5
    rested, env = attach(MPGD(step="normalised", enough=-1e9), 5)
    env.reset(seed=0, options={"label": observation["label"]})
    assert not rested._move(observation, rested.policy.guided_eps(observation)).any()


def test_the_published_normalised_step_is_measured_over_the_whole_batch():
    """Every picture moves along its own gradient, by one factor: rho rms(1, ..., 5) / rms(gradients)."""
    observation = state()
    observation["label"][:] = 1
    actor, env = attach(MPGD(rho=2.0, step="normalised", over_batch=True), 5)
    env.reset(seed=0, options={"label": observation["label"]})
    eps = actor.policy.guided_eps(observation)
    actor.policy.unconditional = lambda obs: eps - torch.arange(1.0, 6.0).view(-1, 1, 1, 1)
    x_0 = actor.schedule.predict_x_0(observation["latents"], eps, observation["timestep"])
    slope = 4 * torch.sigmoid(1 - 4 * x_0)  # d/dx log p(1|x)
    assert slope.max() > 1.5 * slope.min()
    by_hand = 2.0 * 11**0.5 * slope / slope.square().mean().sqrt()  # (1 + 4 + 9 + 16 + 25) / 5 = 11
    assert_close(actor._move(observation, eps), by_hand, atol=1e-9)


@pytest.mark.parametrize(("last", "mean", "deviation"), [(True, 1.867, 0.525), (False, 0.0, 1.0)])
def test_the_published_svdd_takes_the_last_step_as_it_comes(last, mean, deviation):
    """Else it is the best of 20 under a reward that rises: the largest of 20 normal numbers, as tabled."""
    observation = state(count=4000, i=49)
    observation["label"][:] = 1
    actor, env = attach(SVDD(20, selection="argmax", last=last), 4000)
    env.reset(seed=0, options={"label": observation["label"]})
    actor.begin(observation)
    x = actor.act(observation, torch.Generator().manual_seed(0)).prev_sample
    law = law_of(attach(Unguided(), 4000)[0], observation)
    z = (x - law.mean) / law.stddev
    assert_close(z.mean(), mean, atol=0.05)
    assert_close(z.std(), deviation, atol=0.03)


def test_a_linear_reward_on_a_gaussian_prior_is_guided_exactly_in_many_steps():
    """r = a x and x_0 ~ N(0, 1): the posterior is N(a, 1); T = 500."""
    policy = ClosedFormPolicy(Mixture([1.0], [[0.0]], [1.0]), num_steps=500)
    x_0, _ = run(Reconstruction(), 4000, policy=policy, reward=Linear())
    assert_close(x_0.mean(), 1.5, atol=0.06)
    assert_close(x_0.std(), 1.0, atol=0.05)


def test_network_calls_a_picture():
    for guidance, calls in ((Reconstruction(), 50), (MPGD(), 50), (SVDD(4), 1 + 49 * 4), (SMC(4), 200)):
        _, actor = run(guidance, 2)
        assert actor.policy.num_calls == 2 * calls


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SVDD(0), r"guidance.num_candidates=0: must be 1 or more"),
        (lambda: SMC(0), r"guidance.num_particles=0: must be 1 or more"),
        (lambda: SMC(ess_threshold=2.0), r"ess_threshold=2.0: must be between 0 and 1"),
        (lambda: SMC(max_shift=0.0), r"max_shift=0.0: must be positive"),
        (lambda: Reconstruction(scale=-1.0), r"guidance.scale=-1.0: must be 0 or more"),
        (lambda: Reconstruction(form="x"), r"guidance.form=x: must be one of eps, sigma2"),
        (lambda: MPGD(start=0.7, stop=0.3), r"start=0.7 guidance.stop=0.3: must be shares"),
    ],
)
def test_bad_settings_name_the_value(make, said):
    with pytest.raises(DiffRLError, match=said):
        make()
