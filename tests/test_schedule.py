import pytest
import torch
from conftest import assert_close
from diffusers import DDIMScheduler

from diffrl.errors import DiffRLError
from diffrl.schedule import DDIMSchedule, make_scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [7, 20, 50])
def test_step_agrees_with_diffusers_at_every_timestep(num_steps, eta):
    schedule = DDIMSchedule(make_scheduler(), num_steps, eta)
    theirs = make_scheduler()
    theirs.set_timesteps(num_steps)
    assert schedule.timesteps.tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for timestep in theirs.timesteps:
        x_t, eps, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        law = schedule.step(x_t, eps, timestep.repeat(2))
        expected = theirs.step(eps, int(timestep), x_t, eta=eta, variance_noise=noise)
        assert_close(law.mean + law.stddev * noise, expected.prev_sample, atol=2e-6)
        x_0 = schedule.predict_x_0(x_t, eps, timestep.repeat(2))
        assert_close(x_0, expected.pred_original_sample, atol=1e-4)  # up to 15 times x_t


def test_sigma_and_kappa_equal_the_published_table_of_sd15():
    schedule = DDIMSchedule(make_scheduler(), 50, 1.0)
    table = {  # timestep: (sigma, kappa), four digits
        981: (0.4545, 0.1314),
        961: (0.4483, 0.1272),
        781: (0.3908, 0.0959),
        481: (0.2877, 0.0706),
        181: (0.1771, 0.1001),
        41: (0.0999, 0.5174),
        21: (0.0395, 5.362),
        1: (0.0206, 0.5032),
    }
    for timestep, (sigma, kappa) in table.items():
        i = schedule.timesteps.tolist().index(timestep)
        assert_close(schedule.sigma[i], sigma, atol=5e-5)
        assert_close(schedule.kappa[i], kappa, atol=5e-4 if kappa > 1 else 5e-5)


def test_kl_of_two_steps_is_kappa_times_squared_noise_difference():
    schedule = DDIMSchedule(make_scheduler(), 20, 1.0).double()
    x_t, ours, theirs = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
    for i in (0, 9, 18, 19):
        timestep = schedule.timesteps[i : i + 1]
        laws = (schedule.step(x_t, eps, timestep) for eps in (ours, theirs))
        kl = torch.distributions.kl_divergence(*laws)
        assert_close(kl[0], schedule.kappa[i] * (ours - theirs).square().sum(), atol=0, rtol=1e-6)


def test_kl_agrees_with_monte_carlo():
    schedule = DDIMSchedule(make_scheduler(), 20, 1.0).double()
    timestep = schedule.timesteps[10:11]
    torch.manual_seed(0)
    x_t, eps = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    p, q = schedule.step(x_t, eps, timestep), schedule.step(x_t, eps + 1.5, timestep)
    draws = p.sample((200_000,))
    ratio = p.log_prob(draws) - q.log_prob(draws)
    standard_error = float(ratio.std() / len(ratio) ** 0.5)
    assert_close(ratio.mean(), torch.distributions.kl_divergence(p, q)[0], atol=4 * standard_error)


def test_mixed_timesteps_in_a_batch_equal_one_at_a_time():
    schedule = DDIMSchedule(make_scheduler(), 20, 1.0)
    x_t, eps = torch.randn(2, 3, 4, 8, 8)
    timestep = schedule.timesteps[[0, 7, 19]]
    mean = schedule.step(x_t, eps, timestep).mean
    for n in range(3):
        one = schedule.step(x_t[n : n + 1], eps[n : n + 1], timestep[n : n + 1]).mean
        assert_close(mean[n : n + 1], one, atol=0)


def test_a_scheduler_that_ends_at_alpha_one_is_followed():
    scheduler = DDIMScheduler.from_config(make_scheduler().config, set_alpha_to_one=True)
    schedule = DDIMSchedule(scheduler, 50, 1.0)
    assert_close(schedule.alpha_bar_prev[-1], 1.0, atol=0)
    assert_close(schedule.sigma[-1], 0.0, atol=0)


@pytest.mark.parametrize(("steps", "eta"), [(0, 1.0), (1001, 1.0), (20, -0.1), (20, 1.5)])
def test_steps_and_eta_out_of_range_are_named(steps, eta):
    with pytest.raises(DiffRLError, match=str(steps) if eta == 1.0 else str(eta)):
        DDIMSchedule(make_scheduler(), steps, eta)


def test_a_clipping_scheduler_is_refused():
    scheduler = DDIMScheduler.from_config(make_scheduler().config, clip_sample=True)
    with pytest.raises(DiffRLError, match="clip_sample"):
        DDIMSchedule(scheduler, 20, 1.0)
