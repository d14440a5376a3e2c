import math
from itertools import product

import pytest
import torch
from conftest import assert_close

from diffrl.backbones.gaussian_mixture import Denoiser, GaussianMixtureModel, Mixture, fit
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.exact import ExactSolver, moments, total_variation
from diffrl.policy import LoRA, Policy
from diffrl.rewards.closed_form import Gaussian, Softmax
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule, make_scheduler

TOY = Mixture([0.6, 0.4], [[-1.0], [1.0]], [0.35, 0.35])
NO_PROMPT = torch.zeros(1, 1, 1)


def closed_form(schedule, mixture):
    """The reference law with the mixture's optimal denoiser instead of a trained one."""
    alpha_bar = make_scheduler().alphas_cumprod.double()

    def law(obs):
        eps = mixture.eps(obs["latents"], alpha_bar[obs["timestep"]])
        return schedule.step(obs["latents"], eps, obs["timestep"])

    return law


def solve(mixture=TOY, reward=None, gamma=1.0, num_steps=50, **kwargs):
    schedule = DDIMSchedule(make_scheduler(), num_steps, 1.0).double()
    log_prob = (reward or Softmax()).log_prob
    law = closed_form(schedule, mixture)
    return ExactSolver(schedule, law, log_prob, gamma, prompt_embeds=NO_PROMPT, **kwargs)


@pytest.fixture(scope="module")
def toy():
    return solve()


@pytest.fixture(scope="module")
def trained_network():
    """A policy on a hastily fitted denoiser, moved by hand, and its solved model: T = 8."""
    torch.manual_seed(0)
    denoiser = Denoiser(1)
    fit(denoiser, TOY, seed=0, num_steps=200)
    model = GaussianMixtureModel(TOY, denoiser)
    schedule = DDIMSchedule(model.scheduler, 8, 1.0)
    targets = LoRA(4, ["into", "of_time", "out"])
    policy = Policy(model.unet, schedule, NO_PROMPT, guidance_scale=1.0, num_classes=(2,), lora=targets)
    with torch.no_grad():
        for p in [*policy.lora_parameters(), policy.label_embedding.tables[0].weight[:2]]:
            p += 0.1 * torch.randn(p.shape)
    solver = ExactSolver(schedule, policy.reference, Softmax().log_prob, 2.0, prompt_embeds=NO_PROMPT)
    return model, policy, solver


class TestKnownAnswers:
    """Measured independently, by another program, on the same mixture: p(y=1|x) = sigmoid(4x - 1)."""

    def test_target_law_of_label_one(self, toy):
        mean, deviation = moments(toy.target[1], toy.points)
        assert_close(mean, 0.9732, atol=5e-5)
        assert_close(deviation, 0.3918, atol=5e-5)
        right = toy.target[1][toy.points > 0].sum() + toy.target[1][toy.points == 0].sum() / 2
        assert_close(right, 0.9752, atol=2e-4)
        assert_close(toy.target[1] @ toy.log_prob[1].exp(), 0.9023, atol=5e-5)

    def test_normaliser_and_best_objective(self, toy):
        assert_close(toy.log_z[1].exp(), 0.3710, atol=5e-5)
        assert_close(toy.log_z[1], -0.9916, atol=5e-5)
        assert_close(toy.best[1], -0.9961, atol=1e-4)
        kl = toy.gamma * toy.attainable[1] @ toy.log_prob[1] - toy.best[1]
        assert_close(kl, 0.8264, atol=5e-5)
        spread = ((toy.values[0, 1] - toy.best[1]).square() @ toy.start).sqrt()
        assert_close(spread, 0.096, atol=5e-4)

    def test_what_a_fixed_start_reaches(self, toy):
        mean, deviation = moments(toy.attainable[1], toy.points)
        assert_close(mean, 0.9719, atol=5e-5)
        assert_close(deviation, 0.3927, atol=5e-5)

    def test_the_chain_of_fifty_steps_is_not_the_ideal_prior(self, toy):
        # mixture: variance .35^2 + 1 - .2^2 = 1.0404^2; measured for the chain: 1.0125
        assert_close(moments(toy.prior, toy.points)[1], 1.0125, atol=5e-5)


class TestGaussianPrior:
    """One component and a Gaussian classifier: everything is Gaussian, every answer a scalar recursion."""

    mean, deviation, noise, steps = 0.4, 0.5, 0.7, 20
    seen = (-1.0, 0.3)

    def affine(self):
        """Return gain, offset, sigma^2 of each step: its mean is gain x + offset, as eps is affine in x."""
        schedule = DDIMSchedule(make_scheduler(), self.steps, 1.0).double()
        table = []
        for i in range(self.steps):
            a = float(schedule.alpha_bar[i])
            slope = (1 - a) ** 0.5 / (a * self.deviation**2 + 1 - a)  # eps = slope (x - sqrt(a) mean)
            gain = float(schedule.x_gain[i] + schedule.eps_gain[i] * slope)
            offset = -float(schedule.eps_gain[i]) * slope * a**0.5 * self.mean
            table.append((gain, offset, float(schedule.sigma[i]) ** 2))
        return table

    def solve(self):
        mixture = Mixture([1.0], [[self.mean]], [self.deviation])
        return solve(mixture, Gaussian(list(self.seen), self.noise), num_steps=self.steps)

    def test_prior_target_and_normaliser(self):
        solver = self.solve()
        m, v = 0.0, 1.0
        for gain, offset, s in self.affine():
            m, v = gain * m + offset, gain**2 * v + s
        assert_close(torch.stack(moments(solver.prior, solver.points)), [m, v**0.5], atol=1e-5)
        for y, seen in enumerate(self.seen):
            marginal = torch.distributions.Normal(m, (v + self.noise**2) ** 0.5)
            assert_close(solver.log_z[y], marginal.log_prob(torch.tensor(seen)), atol=1e-5)
            posterior = 1 / (1 / v + 1 / self.noise**2)
            expected = [posterior * (m / v + seen / self.noise**2), posterior**0.5]
            assert_close(torch.stack(moments(solver.target[y], solver.points)), expected, atol=1e-5)

    def test_best_objectives_are_those_of_the_riccati_recursion(self):
        """V = -a x^2 / 2 + b x + c stays quadratic, whether a step may have any law or any mean only."""
        solver = self.solve()
        for (y, seen), gaussian in product(enumerate(self.seen), (False, True)):
            a, b = 1 / self.noise**2, seen / self.noise**2
            c = -(seen**2) / (2 * self.noise**2) - math.log(self.noise * math.sqrt(2 * math.pi))
            for gain, offset, s in reversed(self.affine()):
                # log E exp V(m + sqrt(s) z), or max over mu of E V(mu + sqrt(s) z) - (mu - m)^2 / 2 s
                c += s * b**2 / (2 * (1 + a * s)) - (a * s if gaussian else math.log(1 + a * s)) / 2
                a, b = a / (1 + a * s), b / (1 + a * s)
                # m = gain x + offset
                c += b * offset - a * offset**2 / 2
                a, b = a * gain**2, gain * (b - a * offset)
            best = solver.best_gaussian if gaussian else solver.best
            assert_close(best[y], c - a / 2, atol=1e-5)


class TestInvariants:
    def test_rows_sum_to_one_and_the_grid_resolves_the_last_step(self, toy):
        for i in (0, 25, 48, 49):
            means = toy.reference_means[i]
            assert_close(toy.kernel(means, i).log_prob.exp().sum(1), torch.ones(len(means)), atol=1e-12)
            inner = toy.points.abs() < 3
            spacing = toy.points[1] - toy.points[0]
            density = (
                torch.distributions.Normal(means[inner, None], toy.sigma[i]).log_prob(toy.points).exp()
            )
            assert_close(density.sum(1) * spacing, torch.ones(int(inner.sum())), atol=1e-10)

    def test_log_z_is_the_same_from_both_ends_of_the_chain(self, toy):
        forward = (toy.prior * toy.log_prob.exp()).sum(1)
        backward = toy.values[0].exp() @ toy.start
        assert_close(backward, forward, atol=1e-12)
        assert_close(toy.log_z, forward.log(), atol=1e-12)

    def test_bounds_are_in_order(self, toy):
        assert bool((toy.best <= toy.log_z).all())  # Jensen
        assert bool((toy.best_gaussian < toy.best).all())
        reference = (toy.prior * toy.log_prob).sum(1)
        assert bool((toy.best_gaussian > reference).all())

    def test_without_gamma_the_target_is_the_prior_and_nothing_can_be_gained(self):
        solver = solve(gamma=0.0, num_steps=10)
        for law in (*solver.target, *solver.attainable):
            assert_close(law, solver.prior, atol=1e-12)
        zero = torch.zeros(2)
        for bound in (solver.best, solver.log_z, solver.best_gaussian):
            assert_close(bound, zero, atol=1e-9)

    def test_the_reference_has_no_kl_and_the_prior_s_law(self, toy):
        schedule = DDIMSchedule(make_scheduler(), 50, 1.0).double()
        measured = toy.measure(closed_form(schedule, TOY))
        assert measured.kl.tolist() == [0.0, 0.0]
        expected = (toy.prior * toy.log_prob).sum(1)
        assert_close(measured.gap, toy.best - expected, atol=1e-12)
        assert_close(measured.tv, total_variation(toy.prior, toy.target), atol=1e-12)
        assert measured.off_grid < 1e-6

    def test_huge_gamma_neither_under_nor_overflows(self):
        solver = solve(gamma=1000.0, num_steps=10)
        assert bool(solver.values.isfinite().all())
        assert_close(solver.target.sum(1), torch.ones(2), atol=1e-9)
        assert bool((solver.best <= solver.log_z).all())


def whole_matrix(solver, i):
    """The reference's log transition matrix of step i, without a band."""
    exponent = -(((solver.points - solver.reference_means[i][:, None]) / solver.sigma[i]) ** 2) / 2
    return exponent.log_softmax(1)


@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_a_band_of_each_matrix_gives_what_the_whole_one_gives(gamma):
    solver = solve(gamma=gamma, num_steps=20)
    law, values = solver.start, solver.values[-1]
    for i in range(20):
        law = law @ whole_matrix(solver, i).exp()
        kernel = whole_matrix(solver, 19 - i)
        values = torch.stack([(kernel + v).logsumexp(1) for v in values])
        assert_close(values, solver.values[19 - i], atol=1e-10 * gamma)
    assert_close(law, solver.prior, atol=1e-15)


def test_soft_optimal_objective_equals_its_definition():
    """gamma E[log p] - E[sum KL(p* || p_ref)] by the definition of KL, against E[V_T]."""
    solver = solve(gamma=2.0, num_steps=5)
    for y in range(2):
        law, kl = solver.start, 0.0
        for i in range(5):
            kernel = whole_matrix(solver, i)
            tilt = solver.values[i + 1, y] - solver.values[i, y][:, None]
            step = (kernel + tilt).exp()
            kl += law @ (step * tilt).sum(1)
            law = law @ step
        assert_close(law, solver.attainable[y], atol=1e-12)
        assert_close(2.0 * law @ solver.log_prob[y] - kl, solver.best[y], atol=1e-10)


def test_the_best_gaussian_policy_comes_twice_as_close_with_twice_the_steps():
    short, long = (float((s.best - s.best_gaussian)[1]) for s in (solve(num_steps=25), solve()))
    assert 1.6 < short / long < 2.4


def test_measured_policy_agrees_with_rollouts(trained_network):
    """Law, KL and objective of a policy that has moved, against 20,000 sampled episodes a label."""
    model, policy, solver = trained_network
    measured = solver.measure(policy)
    count = 20_000
    env = DenoisingVectorEnv(model, policy.schedule, Softmax(), ["-"], num_envs=count)
    generator = torch.Generator().manual_seed(1)
    for y in range(2):
        options = {"label": torch.full((count, 1), y)}
        episode = rollout(env, policy, generator, reference=policy.reference, seed=y, options=options)
        kl = episode.kl.sum(0).double()
        assert kl.mean() > 0.1  # the policy has moved
        x_0 = episode.latents[-1].flatten().double()
        mean, deviation = moments(measured.law[y], solver.points)
        assert_close(x_0.mean(), mean, atol=4 * float(deviation) / count**0.5)
        assert_close(x_0.std(), deviation, atol=0.03 * float(deviation))
        assert_close(kl.mean(), measured.kl[y], atol=4 * float(kl.std()) / count**0.5)
        objective = 2.0 * episode.reward.double() - kl
        error = 4 * float(objective.std()) / count**0.5
        assert_close(objective.mean(), measured.objective[y], atol=error)
        cumulative = measured.law[y].cumsum(0)
        for share in (0.1, 0.5, 0.9):
            point = solver.points[(cumulative < share).sum()]
            assert_close((x_0 <= point).double().mean(), share, atol=0.02)


def test_no_policy_beats_the_bounds(trained_network):
    _, policy, solver = trained_network
    for scale in (0.0, 0.5, 1.0):
        policy.control_scale = scale
        measured = solver.measure(policy)
        assert bool((measured.objective <= solver.best_gaussian + 1e-9).all())
    policy.control_scale = 1.0


def test_a_chain_that_leaves_the_grid_says_so(trained_network):
    _, policy, solver = trained_network

    def far(obs):
        law = policy.reference(obs)
        law.base_dist.loc = law.base_dist.loc + 9.0
        return law

    measured = solver.measure(far)
    assert measured.off_grid > 0.9
    assert bool(measured.law.isfinite().all())


@pytest.mark.parametrize(("eta", "words"), [(0.0, "noise in every step"), (0.01, "grid points to resolve")])
def test_a_step_too_narrow_for_a_grid_is_refused(eta, words):
    schedule = DDIMSchedule(make_scheduler(), 50, eta)
    with pytest.raises(DiffRLError, match=words):
        ExactSolver(schedule, lambda obs: None, Softmax().log_prob, 1.0, prompt_embeds=NO_PROMPT)
