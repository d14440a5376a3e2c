import gymnasium
import numpy as np
import pytest
import torch
from conftest import assert_close

from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.prompts import LabelledPrompt
from diffrl.errors import DiffRLError
from diffrl.rewards.jpeg import Jpeg
from diffrl.schedule import DDIMSchedule
from diffrl.types import NO_LABEL


class Labelled:
    """A stand-in reward with one attribute of three classes: mean brightness."""

    differentiable = True
    num_classes = (3,)

    def __call__(self, images, context):
        return images.mean((1, 2, 3)) + context.label[:, 0].clamp(min=0)


def make_env(backbone, reward=None, num_envs=4, num_steps=3, **settings) -> DenoisingVectorEnv:
    schedule = DDIMSchedule(backbone.scheduler, num_steps, 1.0)
    return DenoisingVectorEnv(
        backbone, schedule, reward or Labelled(), ["cat", "dog", "bee"], num_envs=num_envs, **settings
    )


def test_an_episode_moves_the_clock_and_rewards_only_at_the_end(tiny):
    env = make_env(tiny)
    obs, info = env.reset(seed=0)
    assert info == {}
    for i in range(3):
        assert obs["timestep"].tolist() == [int(env.schedule.timesteps[i])] * 4
        action = torch.randn(4, 4, 8, 8)
        obs, reward, terminated, truncated, info = env.step(action)
        assert_close(obs["latents"], action, atol=0)
        assert terminated.tolist() == [i == 2] * 4
        assert not truncated.any()
        if i < 2:
            assert not reward.any()
    assert obs["timestep"].tolist() == [0] * 4
    expected = info["images"].mean((1, 2, 3)) + obs["label"][:, 0]
    assert_close(reward, expected, atol=1e-6)
    assert_close(env.value(action, env.context), reward, atol=1e-6)


def test_reset_with_a_seed_repeats_to_the_bit(tiny):
    env, other = make_env(tiny), make_env(tiny)
    first, _ = env.reset(seed=7)
    env.step(torch.zeros(4, 4, 8, 8))
    second, _ = other.reset(seed=7)
    third, _ = other.reset()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(first["latents"], third["latents"])


def test_a_batch_has_every_label_and_prompt_as_often_as_the_others(tiny):
    """8 envs, 3 labels, 3 prompts: each 2 or 3 times; over many resets, every pair equally often."""
    env = make_env(tiny, num_envs=8)
    pairs = torch.zeros(3, 3)
    env.reset(seed=0)
    for _ in range(1500):
        obs, _ = env.reset()
        label = obs["label"][:, 0]
        assert set(label.bincount(minlength=3).tolist()) == {2, 3}
        prompt = torch.tensor([env.prompts.index(word) for word in env.context.prompts])
        assert set(prompt.bincount(minlength=3).tolist()) == {2, 3}
        pairs.view(-1).index_add_(0, 3 * label + prompt, torch.ones(8))
    assert_close(pairs / pairs.sum(), torch.full((3, 3), 1 / 9), atol=0.005)


def test_spaces_hold_what_is_returned_as_numpy(tiny):
    env = make_env(tiny)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        arrays = {key: value.numpy() for key, value in obs.items()}
        assert env.observation_space.contains(arrays)
        for key, value in arrays.items():
            assert value.dtype == env.observation_space[key].dtype, key
            assert value.shape == env.observation_space[key].shape, key
        action = env.action_space.sample()
        assert env.action_space.contains(action)
        obs, *_ = env.step(torch.from_numpy(action))


def test_gymnasium_s_own_wrappers_give_numpy_arrays(tiny):
    from gymnasium.wrappers.vector import RecordEpisodeStatistics
    from gymnasium.wrappers.vector.array_conversion import ArrayConversion

    env = ArrayConversion(make_env(tiny), env_xp=torch, target_xp=np)
    obs, _ = env.reset(seed=0)
    assert isinstance(obs["latents"], np.ndarray)
    _, reward, *_ = env.step(np.zeros((4, 4, 8, 8), np.float32))
    assert isinstance(reward, np.ndarray)
    assert RecordEpisodeStatistics(env).num_envs == 4


def test_gradients_flow_from_reward_to_action(tiny):
    env = make_env(tiny, num_steps=1)
    env.reset(seed=0)
    action = torch.zeros(4, 4, 8, 8, requires_grad=True)
    _, reward, *_ = env.step(action)
    (gradient,) = torch.autograd.grad(reward.sum(), action)
    assert gradient.flatten(1).abs().sum(1).min() > 0


def test_groups_share_prompt_and_label_but_not_noise(tiny):
    env = make_env(tiny, num_envs=8, group_size=4)
    obs, _ = env.reset(seed=1)
    for group in (slice(0, 4), slice(4, 8)):
        assert len(set(env.context.prompts[group])) == 1
        assert len(obs["label"][group].unique()) == 1
    assert not torch.equal(obs["latents"][0], obs["latents"][1])


def test_the_first_latents_have_nothing_of_the_noise_of_a_generator_with_the_same_seed(tiny):
    """Random numbers come in a row: shifted by the env's other draws, the same ones would be in both."""
    obs, _ = make_env(tiny, num_envs=16).reset(seed=7)
    noise = torch.randn(2 * obs["latents"].numel(), generator=torch.Generator().manual_seed(7))
    assert torch.isin(obs["latents"], noise).double().mean() < 0.01


def test_options_replace_one_draw_and_leave_the_others(tiny):
    env = make_env(tiny)
    drawn, _ = env.reset(seed=3)
    given, _ = env.reset(seed=3, options={"label": torch.full((4, 1), NO_LABEL)})
    assert_close(given["latents"], drawn["latents"], atol=0)
    assert given["label"].tolist() == [[NO_LABEL]] * 4
    given, _ = env.reset(seed=3, options={"prompts": ["a cow"] * 4})
    assert env.context.prompts == ["a cow"] * 4
    assert given["label"].tolist() == drawn["label"].tolist()


def test_a_prompt_with_a_label_is_drawn_with_it_and_moves_no_other_draw(tiny):
    env = make_env(tiny, num_envs=8, group_size=2)
    drawn, _ = env.reset(seed=3)
    prompts, latents = list(env.context.prompts), drawn["latents"]
    env.prompts[1] = LabelledPrompt("dog")
    env.prompts[1].label = (2,)
    obs, _ = env.reset(seed=3)
    assert env.context.prompts == prompts
    assert torch.equal(obs["latents"], latents)
    expected = [
        2 if prompt == "dog" else y for prompt, y in zip(prompts, drawn["label"][:, 0], strict=True)
    ]
    assert obs["label"][:, 0].tolist() == expected
    assert drawn["label"][:, 0].tolist() != expected
    given, _ = env.reset(seed=3, options={"label": torch.zeros(8, 1, dtype=torch.int64)})
    assert not given["label"].any()


def test_a_reward_without_labels_leaves_those_of_prompts_aside(tiny):
    env = make_env(tiny, Jpeg())
    env.prompts = [LabelledPrompt("dog")]
    env.prompts[0].label = (2, 1)
    assert env.reset(seed=0)[0]["label"].shape == (4, 0)


def test_labels_are_drawn_uniformly(tiny):
    env = make_env(tiny, num_envs=3000)
    obs, _ = env.reset(seed=0)
    counts = obs["label"].flatten().bincount()
    assert_close(counts / 3000, [1 / 3] * 3, atol=4 * (2 / 9 / 3000) ** 0.5)


def test_render_returns_the_decoded_frames(tiny):
    env = make_env(tiny)
    env.reset(seed=0)
    frames = env.render()
    assert len(frames) == 4
    assert frames[0].shape == (16, 16, 3)
    assert frames[0].dtype == np.uint8
    with torch.no_grad():
        expected = (255 * tiny.decode(env.reset(seed=0)[0]["latents"])).round()
    assert_close(torch.from_numpy(frames[1]).permute(2, 0, 1), expected[1], atol=0)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (torch.zeros(4, 4, 8, 4), r"\[4, 4, 8, 4\].*\[4, 4, 8, 8\]"),
        (torch.zeros(3, 4, 8, 8), r"\[3, 4, 8, 8\]"),
        (torch.full((4, 4, 8, 8), torch.nan), "not finite in env 0"),
        (torch.full((4, 4, 8, 8), torch.inf), "not finite"),
    ],
)
def test_a_wrong_action_is_named(tiny, action, words):
    env = make_env(tiny)
    env.reset(seed=0)
    with pytest.raises(DiffRLError, match=words):
        env.step(action)


def test_on_an_accelerator_no_step_waits_for_a_look_at_its_numbers(tiny):
    env = make_env(tiny, num_steps=2)
    env._looks_at_once = False
    env.reset(seed=0)
    env.step(torch.full((4, 4, 8, 8), torch.nan))
    with pytest.raises(DiffRLError, match=r"step 1: x_\(t-1\) is not finite in env 0"):
        env.step(torch.full((4, 4, 8, 8), torch.nan))


def test_stepping_past_the_end_or_before_reset_is_refused(tiny):
    env = make_env(tiny, num_steps=1)
    with pytest.raises(DiffRLError, match="before the first reset"):
        env.step(torch.zeros(4, 4, 8, 8))
    with pytest.raises(DiffRLError, match="render"):
        env.render()
    env.reset(seed=0)
    env.step(torch.zeros(4, 4, 8, 8))
    with pytest.raises(DiffRLError, match="past the end"):
        env.step(torch.zeros(4, 4, 8, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": torch.full((4, 1), 3)}, "label=3: out of range.*0 to 2"),
        ({"label": torch.full((4, 1), -2)}, "label=-2"),
        ({"label": torch.zeros(4, 2, dtype=torch.long)}, r"\[4, 2\]"),
        ({"prompts": ["cat"]}, "1 prompts for 4 envs"),
        ({"latent": 0}, "unknown option 'latent'"),
        ({"latents": torch.zeros(4, 4, 4, 4)}, r"\[4, 4, 4, 4\]"),
    ],
)
def test_wrong_reset_options_are_named(tiny, options, words):
    with pytest.raises(DiffRLError, match=words):
        make_env(tiny).reset(options=options)


@pytest.mark.parametrize("settings", [{"num_envs": 0}, {"num_envs": 4, "group_size": 3}])
def test_impossible_sizes_are_refused(tiny, settings):
    with pytest.raises(DiffRLError):
        make_env(tiny, **settings)


def test_emoji_is_registered_with_gymnasium():
    env = gymnasium.make_vec("diffrl:diffrl/Emoji-v0", num_envs=2, num_steps=1)
    obs, _ = env.reset(seed=0)
    assert obs["latents"].shape == (2, 4, 16, 16)
    _, reward, terminated, _, info = env.step(obs["latents"])
    assert terminated.all()
    assert (reward < -0.6).all()  # minus kB; a JPEG's header alone is 0.6
    assert info["images"].shape == (2, 3, 64, 64)
    env.close()


def test_sd15_is_registered_and_loads_a_local_checkpoint(tiny_path):
    env = gymnasium.make_vec(
        "diffrl:diffrl/SD15-v0", num_envs=2, model=str(tiny_path), prompts=["a cat"], reward=Jpeg()
    )
    assert env.unwrapped.schedule.num_steps == 50
    assert env.observation_space["latents"].shape == (2, 4, 8, 8)
