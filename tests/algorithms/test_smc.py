"""Sequential Monte Carlo on a mixture whose answers are known: law, estimate of Z, proposals."""

import pytest
import torch
from conftest import assert_close
from mixture import ClosedFormPolicy, Linear, Points, attach, run, state, target

from diffrl.algorithms.guidance.smc import SMC
from diffrl.algorithms.guidance.svdd import SVDD
from diffrl.backbones.gaussian_mixture import Mixture
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.rewards.closed_form import Softmax
from diffrl.rollout import rollout


@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
class TestSMC:
    def test_a_large_population_has_the_targets_mean(self, twisted, resampling):
        form = "sigma2" if twisted else "eps"
        guidance = SMC(256, twisted=twisted, form=form, resampling=resampling)
        x_0, actor = run(guidance, 40)
        means = (actor.log_weights.softmax(1) * actor.particles).sum(1)
        assert abs(means.mean() - target()[0]) < 3 * means.std() / len(means) ** 0.5 + 0.01
        assert len(x_0) == 40

    def test_z_is_estimated_without_bias(self, twisted, resampling):
        guidance = SMC(8, twisted=twisted, form="sigma2", resampling=resampling)
        _, actor = run(guidance, 3000)
        z = actor.log_z.exp()
        assert_close(z.mean(), torch.tensor(target()[2]).exp(), atol=float(3 * z.std() / len(z) ** 0.5))
        assert z.std() / len(z) ** 0.5 < 0.01


class Coordinates(ClosedFormPolicy):
    """The mixture's law in every one of d dimensions, independently."""

    def guided_eps(self, obs, *, in_chain=False):
        each = {
            "latents": obs["latents"].reshape(-1, 1, 1, 1),
            "timestep": obs["timestep"].repeat_interleave(64),
        }
        return super().guided_eps(each).view_as(obs["latents"])


class MeanAbove:
    """log p(1|x) of the mean of all coordinates, three of its standard deviations from its own."""

    differentiable, num_classes = True, (2,)

    def __call__(self, images, context):
        return torch.nn.functional.logsigmoid(20 * (images.flatten(1).mean(1) - 0.2))


def test_in_many_dimensions_weights_collapse_unless_the_proposal_is_twisted():
    """Never resampled, 64 particles in 64 dimensions: how many of them count in the end."""
    policy, points = Coordinates(), Points()
    points.latent_shape = (64, 1, 1)
    shares = []
    for twisted in (False, True):
        env = DenoisingVectorEnv(points, policy.schedule, MeanAbove(), ["x"], num_envs=640, group_size=64)
        actor = SMC(64, twisted=twisted, ess_threshold=0.0).attach(policy, env)
        rollout(env, actor, torch.Generator().manual_seed(0), seed=0)
        weights = actor.log_weights.softmax(1)
        shares.append(float((1 / weights.square().sum(1)).mean()) / 64)
    assert shares[0] < 0.2
    assert shares[1] > 0.6


def test_an_exact_potential_with_an_exact_proposal_leaves_nothing_to_weigh():
    """Gaussian prior, linear reward: log h_t = a E[x_0|x_t] + const, and its gradient is all the tilt."""
    policy = ClosedFormPolicy(Mixture([1.0], [[0.0]], [1.0]), num_steps=500)
    guidance = SMC(16, twisted=True, form="sigma2", ess_threshold=0.0)
    _, actor = run(guidance, 50, policy=policy, reward=Linear())
    _, blind = run(SMC(16, ess_threshold=0.0), 50, policy=policy, reward=Linear())
    # the potential at x_T still differs from particle to particle: its weight is left, the steps' is not
    assert actor.log_weights.std() < 0.35 * blind.log_weights.std()


@pytest.mark.parametrize("last", [True, False])
def test_the_published_weights_end_with_the_predicted_x_0_not_with_the_reward_itself(last):
    """Never resampled, a particle's weights telescope: to r(x_0), or to r(x0hat) before the last step."""
    actor, env = attach(SMC(4, ess_threshold=0.0, last=last), 100)
    label = torch.ones(400, 1, dtype=torch.int64)
    drawn = rollout(env, actor, torch.Generator().manual_seed(0), seed=0, options={"label": label})
    *_, before, x = drawn.latents
    if not last:
        final = {"latents": before, "timestep": actor.schedule.timesteps[-1].expand(400)}
        x = actor.schedule.predict_x_0(before, actor.policy.guided_eps(final), final["timestep"])
    by_hand = torch.nn.functional.logsigmoid(4 * x - 1)  # log p(1|x)
    assert_close(actor.log_weights.flatten(), by_hand.flatten(), atol=1e-6)
    assert_close(actor.log_z, by_hand.view(100, 4).logsumexp(1) - torch.tensor(4.0).log(), atol=1e-6)


def test_a_capped_proposal_is_still_weighed_right():
    _, actor = run(SMC(8, twisted=True, max_shift=0.05), 2000)
    z = actor.log_z.exp()
    assert_close(z.mean(), torch.tensor(target()[2]).exp(), atol=float(3 * z.std() / len(z) ** 0.5))


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


def test_populations_of_several_labels_or_half_ones_are_refused():
    actor, env = attach(SMC(4), 2)
    with pytest.raises(DiffRLError, match="several prompts or labels"):
        rollout(env, actor, torch.Generator(), options={"label": torch.arange(8)[:, None] % 2})
    env = DenoisingVectorEnv(Points(), actor.schedule, Softmax(), ["x"], num_envs=6)
    with pytest.raises(DiffRLError, match="does not divide the 6 envs"):
        rollout(env, SMC(4).attach(actor.policy, env), torch.Generator())
