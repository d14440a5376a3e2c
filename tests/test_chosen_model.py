"""What `eval` and `sample` are about: a run as it is or guided, or the pretrained model."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from test_cli import fails, trained

from diffrl.algorithms.guidance.smc import SMC
from diffrl.algorithms.guidance.svdd import SVDD
from diffrl.cli import main
from diffrl.commands.chosen_model import load
from diffrl.restore import restore, settings_of


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    return trained(tiny_path, tmp_path_factory.mktemp("runs"))


GUIDED = [
    ["guidance=reconstruction"],
    ["guidance=mpgd", "guidance.step=normalised"],
    ["guidance=smc", "guidance.num_particles=2"],
    ["guidance=svdd", "guidance.num_candidates=2"],
]


@pytest.mark.parametrize("words", GUIDED, ids=" ".join)
def test_eval_and_sample_guide_a_run_and_the_pretrained_model(run, tiny_path, tmp_path, capsys, words):
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "-n", "4", *words]) == 0
    measures = json.loads(capsys.readouterr().out)
    assert measures["n"] == 4
    # SMC and SVDD have no density to compare
    assert (measures["kl_nats"] is None) == ("smc" in words[0] or "svdd" in words[0])
    assert measures["reward_calls_per_image"] > 0
    assert ("log_z_hat" in measures) == ("smc" in words[0])
    assert main(["sample", str(run), *words, "--prompt=cat", "--label=1", "-n=3", f"--out={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("cat-label1-*.png"))) == 3
    settings = [f"env.model={tiny_path}", "env.num_steps=2", "reward=jpeg"]
    if "smc" in words[0] or "svdd" in words[0]:  # a black box will do
        assert main(["eval", *settings, "--json", "-n", "3", *words]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 3
    else:
        assert "follows the reward's gradient" in fails(capsys, "eval", *settings, *words)


def test_guided_evaluation_needs_a_model_and_guidance_words_only(run, capsys):
    assert "give the folder of a run" in fails(capsys, "eval")
    assert "trained with settings of its own" in fails(capsys, "eval", run, "algo.gamma=3")
    assert "guidance=sdvv: no such guidance" in fails(capsys, "eval", run, "guidance=sdvv")
    assert "num_candidates=0" in fails(capsys, "eval", run, "guidance=svdd", "guidance.num_candidates=0")
    assert "an untrained policy does not know its label" in fails(
        capsys, "eval", "env=emoji", "guidance=classifier_free"
    )
    assert "guidance asks for a label" in fails(capsys, "sample", run, "guidance=svdd", "--prompt=cat")
    assert "nothing to choose from" in fails(
        capsys, "eval", "env=gaussian_mixture", "env.eta=0", "guidance=svdd"
    )


def test_a_word_beside_a_run_changes_nothing_else_of_it(run, monkeypatch):
    """A run of its own guidance and batch, as its settings say, is measured with them."""
    own = settings_of(run)
    own.guidance, own.eval_batch = SMC(num_particles=3), 7
    monkeypatch.setattr("diffrl.restore.settings_of", lambda path: replace(own))
    setup, _, _ = load(Namespace(words=[str(run), "eval_batch=3"], control_scale=1.0))
    assert (setup.config.guidance, setup.config.eval_batch) == (own.guidance, 3)
    setup, _, _ = load(Namespace(words=[str(run), "guidance=svdd", "guidance.gamma=3"], control_scale=1.0))
    assert (setup.config.guidance, setup.config.eval_batch) == (SVDD(gamma=3.0), 7)


def test_a_guided_evaluation_draws_no_more_at_once_than_it_may(run):
    setup, policy, reward = restore(run, {"guidance": SMC(num_particles=3), "eval_batch": 7})
    actor = setup.make_guided(policy, reward, 100)
    assert (actor.env.num_envs, actor.env.group_size) == (6, 3)
    assert restore(run, {"eval_batch": 7})[0].make_guided(policy, reward, 5).env.num_envs == 5
