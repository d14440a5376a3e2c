"""What a CPU cannot tell: every way to learn, to draw and to resume on a GPU. `pytest -n 0 -m gpu`."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_cli import FAST
from test_processes import launch

from diffrl import config
from diffrl.benchmarks import throughput
from diffrl.build import Setup
from diffrl.cli import main

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]

ALGORITHMS = {
    "ctrl": ["algo=ctrl"],
    "ctrl through the chain": ["algo=ctrl", "algo.truncation.path=network", "algo.truncation.kind=fixed"],
    "reward_backprop": ["algo=reward_backprop", "algo.variance_samples=2"],
    "ddpo": ["algo=ddpo", "algo.minibatches=2", "algo.kl=0.5", "algo.group_size=2"],
    "rwr": ["algo=rwr", "algo.epochs=2"],
    "classifier_free": ["algo=classifier_free", "algo.epochs=2"],
}
SOME = ("ctrl", "ddpo")
BRIGHT = """
class Bright:
    "How bright a picture is: so steep that four steps show it."
    differentiable = True

    def __call__(self, images, context):
        return 2000 * images.mean((1, 2, 3))
"""


def train(tiny_path, root, *words):
    command = ["train", f"env.model={tiny_path}", f"device={DEVICE}", f"root={root}", "name=run"]
    return [*command, *FAST, "checkpoint_every=1", *words]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_from_a_kl_of_exactly_zero(name, precision, tiny_path, tmp_path):
    words = [*ALGORITHMS[name], f"env.precision={precision}"]
    assert main(train(tiny_path, tmp_path, *words)) == 0
    seen = lines(tmp_path / "run")
    first = next(line for line in seen if "eval/kl_nats" in line)
    assert (first["update"], first["eval/kl_nats"]) == (0, 0)
    losses = [line["train/loss"] for line in seen if "train/loss" in line]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert not any("train/skipped_steps" in line for line in seen)


@pytest.mark.parametrize("name", SOME)
def test_a_run_is_resumed_to_where_it_was(name, tiny_path, tmp_path):
    """To its numbers, not its bits: some kernels of a GPU give others each time."""
    assert main(train(tiny_path, tmp_path, *ALGORITHMS[name])) == 0
    last = tmp_path / "run/checkpoints/step-000002"
    whole = load_file(last / "tensors.safetensors")
    shutil.rmtree(last)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    for key, value in load_file(last / "tensors.safetensors").items():
        assert torch.allclose(value, whole[key], rtol=1e-2, atol=1e-4), key


def measures(capsys, *words):
    capsys.readouterr()
    assert main(["eval", *map(str, words), "-n", "16", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("guidance", ["reconstruction", "mpgd", "smc", "svdd"])
def test_guidance_raises_the_reward_that_it_goes_by(guidance, tiny_path, tmp_path, capsys):
    (tmp_path / "bright.py").write_text(BRIGHT)
    words = [f"env.model={tiny_path}", f"device={DEVICE}", "env.num_steps=4"]
    words += [f"reward={tmp_path / 'bright.py'}:Bright"]
    plain, guided = (measures(capsys, *words, f"guidance={name}") for name in ("none", guidance))
    assert guided["reward_mean"] > plain["reward_mean"]


def test_classifier_free_guidance_leads_further_than_the_policy_goes(learnt_run, capsys):
    plain, guided = (
        measures(capsys, learnt_run, f"guidance={name}") for name in ("none", "classifier_free")
    )
    assert guided["kl_nats"] > plain["kl_nats"]


@pytest.mark.parametrize("form", ["diffrl", "diffusers", "kohya"])
def test_a_run_is_exported_as_it_draws(form, tiny_path, tmp_path):
    assert main(train(tiny_path, tmp_path, "env.num_steps=20", "env.guidance_scale=7.5")) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", form, "-n", "4"]) == 0


@pytest.mark.parametrize("name", SOME)
def test_the_doctor_finds_nothing(name, tiny_path):
    fast = [word for word in FAST if not word.startswith("algo.")]
    words = [f"env.model={tiny_path}", f"device={DEVICE}", *fast, *ALGORITHMS[name]]
    assert main(["doctor", *words]) == 0


def test_only_tf32_rounds_the_factors_of_float32_products(tiny_path):
    """1 + 2^-12 has twelve bits behind the point, and TF32 keeps ten."""
    fine, identity = torch.full((64, 64), 1 + 2**-12, device=DEVICE), torch.eye(64, device=DEVICE)
    for precision, rounded in (("tf32", True), ("fp32", False)):
        Setup(config.load([f"env.model={tiny_path}", f"device={DEVICE}", f"env.precision={precision}"]))
        assert bool((fine @ identity != fine).any()) is rounded


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_the_benchmark_tells_time_memory_and_the_share_of_the_peak(compiled, tiny_path, capsys):
    words = [f"env.model={tiny_path}", f"device={DEVICE}", f"env.compile={compiled}"]
    options = ["--quick", "--no-scaling", "--json", "--rows", "sampling", "ctrl, full", "ddpo"]
    assert throughput.main([*words, *options]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["row"] for record in records] == ["sampling", "ctrl, full", "ddpo"]
    for record in records:
        assert 0 < record["held_gb"] <= record["peak_gb"]
        assert 0 < record["share_of_peak"] < 1


def test_a_process_of_torchrun_trains_as_it_does_alone(tiny_path, tmp_path):
    """By NCCL on a GPU."""
    command = train(tiny_path, tmp_path, *ALGORITHMS["ddpo"])
    run = launch(1, [command], tmp_path / "cache", tmp_path / "log")
    run.join()
    assert run.exitcode == 0, (tmp_path / "log").read_text()
    assert len([line for line in lines(tmp_path / "run") if "train/loss" in line]) == 2
