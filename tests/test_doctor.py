"""Each trouble is put in on purpose, and the doctor must find it, and nothing else."""

import re

import pytest
import torch
from omegaconf import OmegaConf
from test_cli import FAST, fails
from torch.distributions import Independent

from diffrl import config, doctor
from diffrl.build import Setup
from diffrl.cache import cache_folder
from diffrl.cli import main
from diffrl.learned import make_reward
from diffrl.policy import Policy
from diffrl.rewards.jpeg import Jpeg
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rollout import rollout

LARGEST = "largest |ratio - 1| before an update"
GROUPED = ["algo.group_size=16", "algo.batch_size=32", "algo.micro_batch_size=32"]
FLOOR = "the same in other batch sizes (rounding floor)"


def with_fast(tiny_path, *words):
    fast = [w for w in FAST if not (w.startswith("reward.") and any("jpeg" in x for x in words))]
    return [f"env.model={tiny_path}", *fast, *words]


def findings(tiny_path, *words):
    return doctor.examine(config.load(with_fast(tiny_path, *words)))


def unsound(found):
    return [finding.check for finding in found if finding.sound is False]


def advice(found):
    """Return what is said of each check that failed."""
    return {finding.check: finding.advice for finding in found if finding.sound is False}


@pytest.fixture
def drift(request, monkeypatch):
    """A network that answers otherwise at each call, by 1e-3 or by what the test asks for."""
    forward, calls, size = Policy.forward, [0], getattr(request, "param", 1e-3)

    def drifting(self, obs, **options):
        calls[0] += 1
        return forward(self, {**obs, "latents": obs["latents"] + size * calls[0]}, **options)

    monkeypatch.setattr(Policy, "forward", drifting)


@pytest.fixture
def constant(monkeypatch):
    monkeypatch.setattr(Jpeg, "__call__", lambda self, images, context: torch.ones(len(images)))


@pytest.mark.parametrize(
    "words",
    [
        ["algo=ctrl"],
        ["algo=ddpo", "reward=jpeg"],
        ["algo=rwr", "reward=jpeg_incompressible"],
        ["algo=reward_backprop", "env.eta=0"],
        ["algo=ctrl", "reward=surrogate[jpeg]"],
        ["algo=ddpo", "reward=jpeg", *GROUPED],
    ],
    ids=" ".join,
)
def test_a_sound_combination_has_no_finding(words, tiny_path):
    found = findings(tiny_path, *words)
    assert unsound(found) == []
    checks = [finding.check for finding in found]
    assert (LARGEST in checks) == ("env.eta=0" not in words)
    assert "gradient in every adapter" in checks


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("word", ["reward.num_classes=8", "reward.edges=[1e-3,9000]"])
def test_a_classifier_that_few_pictures_could_not_be_fitted_to_is_rehearsed(word, tiny_path):
    """Eight classes of 40 pictures, or edges between which all of them lie."""
    found = findings(tiny_path, "algo=ctrl", word)
    assert unsound(found) == []
    assert "gradient in every adapter" in [finding.check for finding in found]
    assert not list(cache_folder().glob("*"))


def test_a_classifier_that_is_fitted_already_is_examined_itself(tiny_path, empty_cache, monkeypatch):
    setup = Setup(config.load(with_fast(tiny_path)))
    policy = setup.make_policy((2,))
    reward = make_reward(setup, policy)
    monkeypatch.setattr(doctor, "rehearse", None)
    env = setup.make_env(reward, 8)
    scores = rollout(env, policy, setup.generator(3), seed=0).reward
    assert findings(tiny_path)[0].value == f"{float(scores.min()):.3g} to {float(scores.max()):.3g}"


def test_what_rounding_alone_makes_after_a_step_is_found_in_half_precision(tiny_path):
    words = ["algo=ddpo", "reward=jpeg", "env.guidance_scale=7.5", "env.num_steps=20"]
    kl = {}
    for precision in ("fp32", "bf16"):
        found = findings(tiny_path, *words, f"env.precision={precision}")
        (nats,) = (each.value for each in found if each.check == "KL of adapters that are 1e-06")
        kl[precision] = float(nats.split()[0])
        said = advice(found)
        if precision == "fp32":
            assert said == {}
    assert kl["bf16"] > 1e-3 > 1e-5 > kl["fp32"]
    assert list(said) == ["the same of adapters that are 1e-06"]
    (ratios,) = said.values()
    assert "To mend it set env.precision=fp32 instead of bf16, or take fewer" in ratios


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds what is called tf32")
def test_on_a_cpu_it_does_not_advise_fp32_for_tf32(tiny_path):
    words = ["algo=ddpo", "reward=jpeg", "env.guidance_scale=7.5", "env.num_steps=20", "env.precision=tf32"]
    settings = config.load([f"env.model={tiny_path}", *words])
    wrong = doctor.Finding("ratios", "2", False, "rounded", doctor._AGAINST_ROUNDING)
    assert "env.precision" not in doctor._advised(settings, wrong).advice


def test_an_algorithm_that_trains_nothing_has_no_gradients_to_look_at(tiny_path):
    found = findings(tiny_path, "algo=none", "reward=jpeg")
    assert unsound(found) == []
    last = found[-1]
    assert (last.check, last.sound) == ("ratios and gradients", None)
    assert last.value == "skipped: algo=none trains nothing"
    assert not any("gradient in" in finding.check for finding in found)
    assert main(["doctor", *with_fast(tiny_path, "algo=none", "reward=jpeg")]) == 0


def test_constant_rewards_are_found(tiny_path, constant):
    said = advice(findings(tiny_path, "algo=rwr", "reward=jpeg"))
    assert list(said) == ["rewards of 8 pictures"]
    assert said["rewards of 8 pictures"].endswith("To mend it choose another reward than jpeg.")


def test_a_reward_that_is_cut_off_everywhere_names_its_clip(tiny_path):
    """Sizes are kB away from 0, each part is kept within .001 of it, and the two cancel."""
    words = ["algo=rwr", "reward=[jpeg,jpeg_incompressible]", "reward.clip=1e-3"]
    said = advice(findings(tiny_path, *words))
    assert list(said) == ["rewards of 8 pictures"]
    assert "raise reward.clip=0.001, or" in said["rewards of 8 pictures"]


def test_a_surrogate_of_constant_rewards_is_found(tiny_path, constant):
    found = findings(tiny_path, "algo=ctrl", "reward=surrogate[jpeg]")
    assert unsound(found) == ["rewards of 8 pictures", "gradient of the reward by the pixels"]
    assert found[0].value == "1 to 1, after 8 queries"
    assert found[-1].sound is None  # what would follow the reward's gradient


def test_a_policy_whose_re_scoring_differs_is_found(tiny_path, drift):
    said = advice(findings(tiny_path, "algo=ddpo", "reward=jpeg"))
    for check in (LARGEST, "KL of the untrained policy"):
        assert "To mend it let load() of env=emoji return its network in .eval() mode" in said[check]
    assert "policy.targets" in said["KL of the untrained policy"]
    assert FLOOR in said


@pytest.mark.parametrize(("drift", "advised"), [(1e-5, True), (1, False)], indirect=["drift"])
def test_a_wider_clip_range_is_advised_against_what_may_be_rounding(drift, advised, tiny_path):
    said = advice(findings(tiny_path, "algo=ddpo", "reward=jpeg"))
    assert ("raise algo.clip_range=0.0001 above" in said[FLOOR]) == advised
    assert ("raise algo.clip_range=0.0001 above" in said[LARGEST]) == advised


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["algo=ctrl"], "take fewer, larger steps than env.num_steps=2."),
        (["algo=reward_backprop", "env.eta=0.5"], "raise env.eta=0.5, whose little noise magnifies it, or"),
        (["algo=rwr", "reward=jpeg", "env.precision=bf16"], "set env.precision=fp32 instead of bf16, or"),
    ],
    ids=["ctrl", "little noise", "bf16"],
)
def test_a_ratio_is_mended_by_settings_that_are_there(words, mend, tiny_path, drift):
    said = advice(findings(tiny_path, *words))
    assert f"To mend it {mend}" in said[FLOOR]
    assert "clip_range" not in said[FLOOR] + said[LARGEST]


@pytest.mark.parametrize(
    "words",
    [["algo=ctrl"], ["algo=ddpo", "reward=jpeg"], ["algo=rwr"], ["algo=classifier_free"]],
    ids=" ".join,
)
def test_every_advice_names_an_option_and_only_those_there_are(words, tiny_path):
    words = with_fast(tiny_path, *words)
    tree, chosen = config.composed(words), config.load(words)
    found = [finding for finding in doctor._findings(chosen) if finding.sound is not None]
    assert len(found) >= 6
    for finding in found:
        said = doctor._advised(chosen, finding).advice
        dotted = re.findall(r"\b(?:algo|env|reward|policy)(?:\.[a-z_]+)+", said)
        assert all(OmegaConf.select(tree, name) is not None for name in dotted), said
        assert dotted or re.search(r"(algo|env)=\w|reward than \w", said), said


def test_steps_are_told_one_by_one_if_they_are_few():
    assert doctor._by_step(torch.zeros(20)) == "0 at each of 20 steps"
    assert doctor._by_step(torch.tensor([0.0, 2e-7, 0.5])) == "by step: 0 2e-07 0.5"
    many = torch.full((20,), 1e-6)
    many[17] = 1.3e-3
    assert doctor._by_step(many) == "0.0013 at step 17 of 0 to 19, median 1e-06"


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
    assert LARGEST not in unsound(findings(tiny_path, *words))
    calls[0] = 0
    words += ["algo.log_prob_reduction=sum"]
    assert LARGEST in unsound(findings(tiny_path, *words))


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
    said = advice(findings(tiny_path, "algo=ctrl"))
    dead = said["gradient in every adapter"]
    assert ".attn2.to_q: " in dead  # with no prompt to ask, nothing depends on what is asked
    assert "leave the layer out of policy.targets, or keep other steps than algo.truncation.kind=" in dead
    deaf = said["gradient in the label embedding, attribute 0"]
    assert "the network of env=emoji" in deaf
    assert "drop_label" not in deaf  # a setting of classifier_free


def test_an_overflow_along_the_steps_is_told_from_a_missing_gradient(tiny_path, monkeypatch):
    """`Algorithm.step` drops such a gradient, and takes no step."""
    original = Policy._eps

    def overflowing(self, *inputs):
        eps = original(self, *inputs)
        if eps.requires_grad:
            eps.register_hook(lambda gradient: gradient * float("inf"))
        return eps

    monkeypatch.setattr(Policy, "_eps", overflowing)
    said = advice(findings(tiny_path, "algo=ctrl"))
    assert list(said) == ["gradients finite"]
    assert "lower algo.gamma" in said["gradients finite"]


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


def test_a_bracket_in_an_advice_is_printed(tiny_path, constant, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", *with_fast(tiny_path, "algo=ctrl", "reward=surrogate[jpeg]")])
    report = " ".join(capsys.readouterr().out.split())
    assert "choose another reward than surrogate[jpeg]" in report
    assert "- gradients of the weights skipped: the reward has none to pass on" in report


def test_a_wrong_setting_is_one_line(capsys):
    assert "no such setting" in fails(capsys, "doctor", "algo.gama=1")
