"""Guidance on a model whose answers are known: a two-component mixture, its optimal denoiser, 50 steps.

The laws of label 1 were measured independently, by another program, with 6,000 samples or more.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from test_exact import TOY, solve

from diffrl.algorithms.guidance.base import Unguided
from diffrl.algorithms.guidance.mpgd import MPGD
from diffrl.algorithms.guidance.reconstruction import Reconstruction
from diffrl.algorithms.guidance.smc import SMC
from diffrl.algorithms.guidance.svdd import SVDD
from diffrl.backbones.gaussian_mixture import Mixture
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.exact import moments
from diffrl.policy import Policy
from diffrl.rewards.closed_form import Softmax
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule, make_scheduler
from diffrl.types import ActorStep, draw

ALPHA_BAR = make_scheduler().alphas_cumprod.double()


class ClosedFormPolicy:
    """The mixture's optimal denoiser in the place of a network."""

    guidance_scale = 1.0

    def __init__(self, mixture=TOY, num_steps=50):
        self.mixture = mixture
        self.schedule = DDIMSchedule(make_scheduler(), num_steps, 1.0).double()
        self.num_calls = 0

    def noise(self, obs):
        self.num_calls += len(obs["latents"])
        return self.mixture.eps(obs["latents"], ALPHA_BAR[obs["timestep"]])

    def unconditional(self, obs):
        return self.noise(obs) - 0.5

    def begin(self, obs):
        pass

    def act(self, obs, generator):
        law = self.schedule.step(obs["latents"], self.noise(obs), obs["timestep"])
        return ActorStep(draw(law, generator), law)


class Points:
    """A backbone whose latents are the points themselves."""

    unet = SimpleNamespace(device=torch.device("cpu"))
    scheduler, latent_shape, prompt_shape, image_size = make_scheduler(), (1, 1, 1), (1, 1), 1

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def decode(self, latents):
        return latents


class Linear:
    """r(x) = 1.5 x, whatever the label."""

    differentiable, num_classes = True, (2,)

    def __call__(self, images, context):
        return 1.5 * images.flatten(1)[:, 0]


def attach(guidance, count, *, policy=None, reward=None):
    policy = policy or ClosedFormPolicy()
    count *= guidance.population
    env = DenoisingVectorEnv(
        Points(),
        policy.schedule,
        reward or Softmax(),
        ["x"],
        num_envs=count,
        group_size=guidance.population,
    )
    return guidance.attach(policy, env), env


def run(guidance, count, *, label=1, seed=1, **kwargs):
    """Return x_0 of `count` guided samples, those that were chosen, and the actor."""
    actor, env = attach(guidance, count, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    label = torch.as_tensor(label).expand(env.num_envs)[:, None]
    x_0 = rollout(env, actor, generator, seed=seed, options={"label": label}).latents[-1].flatten()
    actor.particles = x_0.view(count, guidance.population)
    return x_0[actor.chosen(generator)], actor


@pytest.fixture(scope="module")
def target():
    """Mean, standard deviation, log Z of label 1, exactly."""
    toy = solve()
    return *(float(m) for m in moments(toy.target[1], toy.points)), float(toy.log_z[1])


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

    def test_reconstruction_overshoots_and_its_frozen_form_more(self, target):
        mean, deviation, _ = target
        full, frozen = (run(Reconstruction(jacobian=j), 4000)[0] for j in ("full", "frozen"))
        assert mean + 0.05 < full.mean() < frozen.mean() - 0.05
        assert full.std() < deviation - 0.05

    def test_weak_reconstruction_keeps_too_much_of_the_other_component(self, target):
        assert run(Reconstruction(scale=0.3), 4000)[0].std() > target[1] + 0.2

    def test_a_long_step_of_mpgd_goes_too_far_and_too_narrow(self, target):
        x_0, _ = run(MPGD(rho=1.0), 2000)
        assert x_0.mean() > target[0] + 0.2
        assert x_0.std() < target[1] / 2

    def test_svdd_goes_to_a_limit_past_the_target_as_candidates_grow(self, target):
        few, many = (run(SVDD(m, gamma=1.0), 4000)[0] for m in (4, 50))
        assert target[0] + 0.02 < few.mean() < many.mean()
        assert many.std() < few.std() < target[1]

    def test_two_twisted_particles_err_past_the_target_and_two_plain_ones_towards_the_prior(self, target):
        twisted, plain = (run(SMC(2, twisted=t, ess_threshold=1.0), 6000)[0].mean() for t in (True, False))
        assert plain + 0.05 < target[0] < twisted - 0.05


@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
class TestSMC:
    def test_a_large_population_has_the_targets_mean(self, target, twisted, resampling):
        form = "sigma2" if twisted else "eps"
        guidance = SMC(256, twisted=twisted, form=form, resampling=resampling)
        x_0, actor = run(guidance, 40)
        means = (actor.log_weights.softmax(1) * actor.particles).sum(1)
        assert abs(means.mean() - target[0]) < 3 * means.std() / len(means) ** 0.5 + 0.01
        assert len(x_0) == 40

    def test_z_is_estimated_without_bias(self, target, twisted, resampling):
        guidance = SMC(8, twisted=twisted, form="sigma2", resampling=resampling)
        _, actor = run(guidance, 3000)
        z = actor.log_z.exp()
        assert_close(z.mean(), torch.tensor(target[2]).exp(), atol=float(3 * z.std() / len(z) ** 0.5))
        assert z.std() / len(z) ** 0.5 < 0.01


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


@pytest.mark.parametrize(
    "guidance",
    [
        Reconstruction(),
        Reconstruction(jacobian="frozen"),
        MPGD(),
        MPGD(step="normalised"),
        SVDD(4, selection="argmax"),
        SMC(4, ess_threshold=1.0, twisted=True),
    ],
    ids=repr,
)
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


def test_the_published_mean_over_the_batch_shrinks_the_gradient_by_its_size():
    observation = state(count=5)
    plain, shrunk = (attach(Reconstruction(over_batch=b), 5)[0] for b in (False, True))
    for actor in (plain, shrunk):
        actor.env.reset(seed=0)
    assert_close(5 * shrunk._gradient(observation)[1], plain._gradient(observation)[1], atol=1e-12)


def state(count=5, i=20):
    latents = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timestep = DDIMSchedule(make_scheduler(), 50, 1.0).timesteps[i].expand(count)
    return {
        "latents": latents,
        "timestep": timestep,
        "prompt_embeds": torch.zeros(count, 1, 1),
        "label": torch.zeros(count, 1, dtype=torch.int64),
    }


def law_of(actor, observation):
    actor.env.reset(seed=0, options={"label": observation["label"]})
    actor.begin(observation)
    return actor.act(observation, torch.Generator().manual_seed(0)).distribution


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_reconstruction_gradient_is_the_derivative_of_the_reward_at_x0hat(offset):
    observation, h = state(), 1e-5
    actor, env = attach(Reconstruction(offset=offset), 5)
    env.reset(seed=0, options={"label": observation["label"]})

    def value(shift):
        moved = {**observation, "latents": observation["latents"] + shift}
        reward = actor.value(moved, actor.policy.noise(moved))
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
        observation["latents"], actor.policy.noise(observation), observation["timestep"]
    )
    # d/dx log p(0|x) of a softmax with slopes 0 and 4: -4 p(1|x)
    slope = -4 * torch.sigmoid(4 * x_0 - 1)
    p = float(actor.schedule.alpha_bar_prev[20])
    assert_close(moved.mean - plain.mean, 0.3 * slope * p**0.5, atol=1e-6)


def test_a_normalised_step_has_the_length_of_the_guidance_until_the_picture_is_good_enough():
    observation = state()
    observation["label"][:] = 1
    actor, env = attach(MPGD(rho=2.0, step="normalised"), 5)
    env.reset(seed=0, options={"label": observation["label"]})
    move = actor._move(observation, actor.policy.noise(observation))
    assert_close(move.abs().flatten(), torch.full((5,), 2.0 * 0.5), atol=1e-9)  # |eps - eps_null| = 0.5
    rested, env = attach(MPGD(step="normalised", enough=-1e9), 5)
    env.reset(seed=0, options={"label": observation["label"]})
    assert not rested._move(observation, rested.policy.noise(observation)).any()


def test_a_linear_reward_on_a_gaussian_prior_is_guided_exactly_in_many_steps():
    """r = a x and x_0 ~ N(0, 1): the posterior is N(a, 1); T = 500."""
    policy = ClosedFormPolicy(Mixture([1.0], [[0.0]], [1.0]), num_steps=500)
    x_0, _ = run(Reconstruction(), 4000, policy=policy, reward=Linear())
    assert_close(x_0.mean(), 1.5, atol=0.06)
    assert_close(x_0.std(), 1.0, atol=0.05)


def test_an_exact_potential_with_an_exact_proposal_leaves_nothing_to_weigh():
    """Gaussian prior, linear reward: log h_t = a E[x_0|x_t] + const, and its gradient is all the tilt."""
    policy = ClosedFormPolicy(Mixture([1.0], [[0.0]], [1.0]), num_steps=500)
    guidance = SMC(16, twisted=True, form="sigma2", ess_threshold=0.0)
    _, actor = run(guidance, 50, policy=policy, reward=Linear())
    _, blind = run(SMC(16, ess_threshold=0.0), 50, policy=policy, reward=Linear())
    # the potential at x_T still differs from particle to particle: its weight is left, the steps' is not
    assert actor.log_weights.std() < 0.35 * blind.log_weights.std()


def test_a_capped_proposal_is_still_weighed_right(target):
    _, actor = run(SMC(8, twisted=True, max_shift=0.05), 2000)
    z = actor.log_z.exp()
    assert_close(z.mean(), torch.tensor(target[2]).exp(), atol=float(3 * z.std() / len(z) ** 0.5))


def test_a_proposal_moves_no_further_than_it_may():
    observation = state(count=8)
    law = (
        SVDD()
        .attach(ClosedFormPolicy(), None)
        .schedule.step(
            observation["latents"], torch.zeros_like(observation["latents"]), observation["timestep"]
        )
    )
    gradient = torch.linspace(-100, 100, 8, dtype=torch.float64).view(8, 1, 1, 1)
    lengths = []
    for most in (None, 2.0):
        actor, _ = attach(SMC(8, twisted=True, max_shift=most), 1)
        moved = actor._propose(observation, torch.zeros_like(gradient), law, gradient)
        lengths.append(((moved.mean - law.mean) / law.stddev).flatten())
    assert lengths[0].abs().max() > 4
    assert_close(lengths[1], lengths[0].clamp(-2, 2), atol=1e-9)


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


def test_populations_of_several_labels_or_half_ones_are_refused():
    actor, env = attach(SMC(4), 2)
    with pytest.raises(DiffRLError, match="several prompts or labels"):
        rollout(env, actor, torch.Generator(), options={"label": torch.arange(8)[:, None] % 2})
    env = DenoisingVectorEnv(Points(), actor.schedule, Softmax(), ["x"], num_envs=6)
    with pytest.raises(DiffRLError, match="does not divide the 6 envs"):
        rollout(env, SMC(4).attach(actor.policy, env), torch.Generator())
