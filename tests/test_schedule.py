import pytest
import torch
from conftest import assert_close
from diffusers import DDIMScheduler, PNDMScheduler

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


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler])
def test_a_scheduler_in_memory_means_what_its_file_says(kind):
    """An early file leaves out what it was not asked about; in memory its class's defaults are there."""
    raw = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ours, theirs = make_scheduler(raw), make_scheduler(kind.from_config(raw).config)
    assert theirs.config.steps_offset == ours.config.steps_offset == 1
    assert theirs.config.clip_sample is ours.config.clip_sample is False
    assert theirs.config.set_alpha_to_one is ours.config.set_alpha_to_one is False
    asked = make_scheduler(kind(**raw, steps_offset=0, set_alpha_to_one=True).config)
    assert (asked.config.steps_offset, asked.config.set_alpha_to_one) == (0, True)


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


def test_a_scheduler_that_ends_at_alpha_one_is_followed_without_noise_and_refused_with_it():
    scheduler = make_scheduler({"set_alpha_to_one": True})
    assert_close(DDIMSchedule(scheduler, 50, 0.0).alpha_bar_prev[-1], 1.0, atol=0)
    with pytest.raises(DiffRLError, match="timestep 1 no noise"):
        DDIMSchedule(scheduler, 50, 1.0)


def test_a_first_timestep_past_the_last_one_is_refused():
    with pytest.raises(DiffRLError, match=r"num_steps=1000: .*steps_offset"):
        DDIMSchedule(make_scheduler(), 1000, 1.0)


def test_a_schedule_that_begins_at_pure_noise_is_refused():
    scheduler = make_scheduler({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    with pytest.raises(DiffRLError, match="rescale_betas_zero_snr"):
        DDIMSchedule(scheduler, 20, 1.0)


class TestOfACheckpoint:
    def test_sd15_s_pndm_config_becomes_ddim_that_does_not_clip(self):
        """As the hub has it: of another class, and without DDIM's own settings."""
        config = {
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.6.0",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
        }
        schedule = DDIMSchedule(make_scheduler(config), 50, 1.0)
        assert schedule.timesteps[:2].tolist() == [981, 961]
        assert schedule.timesteps[-1] == 1
        assert_close(schedule.alpha_bar_prev[-1], 1 - 0.00085, atol=1e-6)  # the first of the training times
        assert_close(schedule.sigma[[0, -1]], [0.4545, 0.0206], atol=5e-5)

    @pytest.mark.parametrize("kind", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "DDIM"])
    def test_its_own_settings_are_kept_whatever_class_it_names(self, kind):
        config = {
            "_class_name": f"{kind}Scheduler",
            "beta_start": 0.001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 500,
            "prediction_type": "v_prediction",
            "steps_offset": 3,
            "timestep_spacing": "leading",
        }
        schedule = DDIMSchedule(make_scheduler(config), 10, 1.0)
        assert schedule.prediction_type == "v_prediction"
        assert schedule.timesteps.tolist() == list(range(453, 0, -50))
        expected = (1 - torch.linspace(0.001, 0.02, 500, dtype=torch.float64)).cumprod(0)
        assert_close(schedule.train_alpha_bar, expected, atol=1e-6)

    def test_a_clipping_one_is_refused(self):
        with pytest.raises(DiffRLError, match="clip_sample"):
            DDIMSchedule(make_scheduler({"clip_sample": True}), 20, 1.0)

    def test_one_whose_network_predicts_x_0_is_refused_by_name(self):
        with pytest.raises(DiffRLError, match="prediction_type=sample: the checkpoint"):
            DDIMSchedule(make_scheduler({"prediction_type": "sample"}), 20, 1.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_v_prediction_steps_as_diffusers_does(eta):
    scheduler = make_scheduler({"prediction_type": "v_prediction"})
    schedule = DDIMSchedule(scheduler, 20, eta)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        x_t, v, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        eps = schedule.to_eps(v, x_t, timestep.repeat(2))
        law = schedule.step(x_t, eps, timestep.repeat(2))
        expected = scheduler.step(v, int(timestep), x_t, eta=eta, variance_noise=noise)
        assert_close(law.mean + law.stddev * noise, expected.prev_sample, atol=2e-6)


def test_the_true_v_means_the_noise_that_was_added():
    schedule = DDIMSchedule(make_scheduler({"prediction_type": "v_prediction"}), 20, 1.0).double()
    x_0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    timestep = torch.tensor([1, 500, 999])
    a = schedule.train_alpha_bar[timestep].view(-1, 1, 1, 1)
    v = a.sqrt() * eps - (1 - a).sqrt() * x_0
    assert_close(schedule.to_eps(v, schedule.add_noise(x_0, eps, timestep), timestep), eps, atol=1e-9)


@pytest.mark.parametrize(("steps", "eta"), [(0, 1.0), (1001, 1.0), (20, -0.1), (20, 1.5)])
def test_steps_and_eta_out_of_range_are_named(steps, eta):
    with pytest.raises(DiffRLError, match=str(steps) if eta == 1.0 else str(eta)):
        DDIMSchedule(make_scheduler(), steps, eta)
