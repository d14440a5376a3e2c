"""Each trouble is put in on purpose, and the doctor must find it, and nothing else."""

import pytest
import torch
from test_cli import FAST, fails
from torch.distributions import Independent

from diffrl import config, doctor
from diffrl.cli import main
from diffrl.policy import Policy
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.log_likelihood import LogLikelihood


def findings(tiny_path, *words):
    fast = [w for w in FAST if not (w.startswith("reward.") and any("jpeg" in x for x in words))]
    return doctor.examine(config.load([f"env.model={tiny_path}", *fast, *words]))


def unsound(found):
    return [finding.check for finding in found if not finding.sound]


@pytest.mark.parametrize(
    "words",
    [
        ["algo=ctrl"],
        ["algo=ddpo", "reward=jpeg"],
        ["algo=rwr", "reward=jpeg_incompressible"],
        ["algo=reward_backprop", "env.eta=0"],
    ],
    ids=" ".join,
)
def test_a_sound_combination_has_no_finding(words, tiny_path):
    found = findings(tiny_path, *words)
    assert unsound(found) == []
    assert ("largest |ratio - 1| before an update" in [f.check for f in found]) == (
        "env.eta=0" not in words
    )


def test_constant_rewards_are_found(tiny_path, monkeypatch):
    monkeypatch.setattr(Jpeg, "__call__", lambda self, images, context: torch.ones(len(images)))
    assert unsound(findings(tiny_path, "algo=rwr", "reward=jpeg")) == ["rewards of 8 pictures"]


def test_a_policy_whose_re_scoring_differs_is_found(tiny_path, monkeypatch):
    forward, calls = Policy.forward, [0]

    def drifting(self, obs):
        calls[0] += 1
        obs = {**obs, "latents": obs["latents"] + 1e-3 * calls[0]}
        return forward(self, obs)

    monkeypatch.setattr(Policy, "forward", drifting)
    found = unsound(findings(tiny_path, "algo=ddpo", "reward=jpeg"))
    assert "largest |ratio - 1| before an update" in found
    assert "KL of the untrained policy" in found


@pytest.mark.filterwarnings("ignore:algo.clip_range=0.2 algo.log_prob_reduction=mean")
def test_a_summed_log_probability_is_held_against_the_clip_range_unreduced(tiny_path, monkeypatch):
    """Off by 1e-3 in each of 256 dims: 1e-3 on average, .26 in sum, and .1 is allowed."""
    log_prob, calls = Independent.log_prob, [0]

    def drifting(self, value):
        calls[0] += 1
        return log_prob(self, value) + 1e-3 * value[0].numel() * (
            calls[0] > 2
        )  # two steps draw, then scored

    monkeypatch.setattr(Independent, "log_prob", drifting)
    words = ["algo=ddpo", "reward=jpeg", "algo.clip_range=0.2"]
    assert "largest |ratio - 1| before an update" not in unsound(findings(tiny_path, *words))
    calls[0] = 0
    words += ["algo.log_prob_reduction=sum"]
    assert "largest |ratio - 1| before an update" in unsound(findings(tiny_path, *words))


def test_a_rounding_reward_is_found(tiny_path, monkeypatch):
    forward = LogLikelihood.forward
    monkeypatch.setattr(
        LogLikelihood,
        "forward",
        lambda self, images, context: forward(self, (255 * images).round() / 255, context),
    )
    assert "gradient of the reward by the pixels" in unsound(findings(tiny_path, "algo=ctrl"))


def test_a_dead_adapter_and_a_deaf_embedding_are_found(tiny_path, monkeypatch):
    original = Policy._eps

    def deaf(self, x_t, timestep, prompt_embeds, label):
        return original(self, x_t, timestep, 0 * prompt_embeds, torch.full_like(label, -1))

    monkeypatch.setattr(Policy, "_eps", deaf)
    found = unsound(findings(tiny_path, "algo=ctrl"))
    assert "gradient in every adapter" in found  # keys and values of the prompt see nothing
    assert "gradient in the label embedding, attribute 0" in found


def test_the_command_prints_the_report_and_fails_if_something_is_bad(tiny_path, capsys, monkeypatch):
    words = [f"env.model={tiny_path}", *FAST]
    assert main(["doctor", *words]) == 0
    report = capsys.readouterr().out
    assert "KL of the untrained policy" in report
    assert "bad" not in report
    forward = LogLikelihood.forward
    monkeypatch.setattr(
        LogLikelihood, "forward", lambda self, images, context: forward(self, images.detach(), context)
    )
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *words])
    assert stopped.value.code == 1
    assert "Keep it in tensor operations" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_setting_is_one_line(capsys):
    assert "no such setting" in fails(capsys, "doctor", "algo.gama=1")
