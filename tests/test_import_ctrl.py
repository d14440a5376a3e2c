"""Checkpoints in the layout of CTRL's authors, made here at small width."""

import json

import pytest
import torch
from conftest import assert_close
from ctrl_files import residual, write_classifier
from safetensors.torch import save_file
from test_cli import fails
from tiny_clip import head, head_state, write_clip

from diffrl.cli import main
from diffrl.policy import without_label
from diffrl.restore import restore
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.types import NO_LABEL

WORDS = ("q", "k", "v", "out")


def checkpoint(folder, unet, rows=5, suffix="bin"):
    """Write random adapters and rows for every attention of `unet`; return them, and the rows."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name in unet.attn_processors:  # "....attn1.processor"
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for word in WORDS:
            layer = attention.to_out[0] if word == "out" else getattr(attention, f"to_{word}")
            wide, narrow = layer.weight.shape
            lora[f"{name}.to_{word}_lora.down.weight"] = 0.3 * torch.randn(4, narrow, generator=generator)
            lora[f"{name}.to_{word}_lora.up.weight"] = torch.randn(wide, 4, generator=generator)
    table = torch.randn(rows, unet.time_embedding.linear_2.out_features, generator=generator)
    table[-1] = 0
    folder.mkdir(exist_ok=True)
    path = folder / f"pytorch_lora_weights.{suffix}"
    save_file(lora, path) if suffix == "safetensors" else torch.save(lora, path)
    torch.save({"weight": table}, folder / "class_embedding.pth")
    return lora, table


@pytest.fixture
def classifier(tmp_path):
    return write_classifier(tmp_path / "CNN_5class.pth", residual(5), 1.0)


def settings(tmp_path, tiny_path, classifier):
    return [
        f"root={tmp_path}", "name=theirs", f"env.model={tiny_path}", "env.num_steps=2", "device=cpu",
        "eval_batch=4", f"reward.classifier={classifier}",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_restored_policy_is_their_network(tmp_path, tiny, tiny_path, classifier, suffix):
    """Their layers are W x + up(down(x)), their time embedding has the label's row added to it."""
    lora, table = checkpoint(tmp_path / "checkpoint_8", tiny.unet, suffix=suffix)
    words = settings(tmp_path, tiny_path, classifier)
    assert main(["import-ctrl", str(tmp_path / "checkpoint_8"), *words]) == 0
    setup, policy, reward = restore(tmp_path / "theirs", {})
    assert (policy.label_embedding.num_classes, reward.num_classes) == ((4,), (4,))
    assert reward.attributes[0].edges.tolist() == [60.0, 85.0, 110.0]
    assert (setup.config.env.guidance_scale, setup.config.env.eta, setup.config.policy.rank) == (
        7.5,
        1.0,
        4,
    )
    unet = tiny.unet
    with torch.no_grad():
        for name in unet.attn_processors:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for word in WORDS:
                layer = attention.to_out[0] if word == "out" else getattr(attention, f"to_{word}")
                down, up = (lora[f"{name}.to_{word}_lora.{half}.weight"] for half in ("down", "up"))
                layer.weight += up @ down
    unet.class_embedding = torch.nn.Embedding(5, table.shape[1], _weight=table)
    generator = torch.Generator().manual_seed(1)
    x_t, embeds = torch.randn(3, 4, 8, 8, generator=generator), tiny.encode_prompts(["cat", "dog", ""])
    timestep, label = torch.tensor([981, 500, 1]), torch.tensor([0, 3, 4])
    expected = unet(x_t, timestep, embeds, class_labels=label).sample
    ours = torch.tensor([[0], [3], [NO_LABEL]])
    with torch.no_grad():
        obs = {"latents": x_t, "timestep": timestep, "prompt_embeds": embeds, "label": ours}
        assert_close(policy.eps(obs), expected.detach(), atol=1e-4)
        assert float((policy.eps(without_label(obs)) - expected).abs().amax()) > 1e-2


def test_the_run_is_sampled_and_measured(tmp_path, tiny, tiny_path, capsys):
    """With a classifier of ours: theirs reads pictures of 512 px."""
    report = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())
    edges = torch.tensor([60.0, 85.0, 110.0])
    ours = Attribute("compressibility", Classifier(4, "dct"), edges, report)
    LogLikelihood([ours]).save(tmp_path / "ours.safetensors")
    checkpoint(tmp_path / "checkpoint_8", tiny.unet)
    words = settings(tmp_path, tiny_path, tmp_path / "ours.safetensors")
    assert main(["import-ctrl", str(tmp_path / "checkpoint_8"), *words]) == 0
    folder = str(tmp_path / "theirs")
    assert main(["sample", folder, "--prompt", "cat", "--label", "3", "-n", "2"]) == 0
    assert len(list((tmp_path / "theirs" / "samples").glob("cat-label3-*.png"))) == 2
    capsys.readouterr()
    assert main(["eval", folder, "-n", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4


def test_of_their_multitask_the_label_is_joint(tmp_path, tiny, tiny_path, capsys):
    torch.save(head_state(head(1)), tmp_path / "mlp.pth")
    network = head(3)
    ours = write_classifier(tmp_path / "aesthetic.pth", network, 1.0, head_state(network))
    size = write_classifier(tmp_path / "CNN_3class.pth", residual(3), 1.0)
    _, table = checkpoint(tmp_path / "multitask_bs=512", tiny.unet)
    command = ["import-ctrl", str(tmp_path / "multitask_bs=512")]
    single = write_classifier(tmp_path / "CNN_5class.pth", residual(5), 1.0)
    line = fails(capsys, *command, *settings(tmp_path, tiny_path, single))
    assert "of CTRL's multitask, whose label is 2 aesthetic + compressibility" in line
    words = [
        "reward=multitask", "reward.measures=[aesthetic,compressibility]", f"reward.mlp={tmp_path}/mlp.pth",
        f"reward.clip={write_clip(tmp_path / 'clip')}",
    ]  # fmt: skip
    words += settings(tmp_path, tiny_path, f"[{ours},{size}]")
    assert "has 4 labels, the reward 2 x 2" in fails(capsys, *command, *words)
    assert main([*command, *words, "reward.joint=true"]) == 0
    _, policy, reward = restore(tmp_path / "theirs", {})
    assert_close(policy.label_embedding(torch.tensor([[2], [NO_LABEL]])), table[[2, 4]], atol=0)
    assert reward.split(torch.tensor([[2]])).tolist() == [[1, 0]]
    assert [attribute.name for attribute in reward.attributes] == ["aesthetic", "compressibility"]


class Malice:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "class_embedding.pth"])
def test_a_malicious_file_is_refused_and_not_run(tmp_path, tiny, tiny_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "c", tiny.unet)
    torch.save({"weight": Malice()}, tmp_path / "c" / name)
    line = fails(capsys, "import-ctrl", "c", *settings(tmp_path, tiny_path, "none.pth"))
    assert name in line
    assert "nothing in it was run" in line
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "theirs").exists()


def test_what_is_no_such_checkpoint_is_named(tmp_path, tiny, tiny_path, classifier, capsys):
    words = settings(tmp_path, tiny_path, classifier)
    folder = tmp_path / "c"

    def line(*words):
        return fails(capsys, "import-ctrl", str(folder), *words)

    assert "pytorch_lora_weights.bin: no such file" in line(*words)
    _, table = checkpoint(folder, tiny.unet)
    assert "reward.classifier=null: give the one it was trained with" in line(*words[:-1])
    assert "no such setting" in line(*words, "gama=1")
    torch.save({"weight": table[1:]}, folder / "class_embedding.pth")
    assert "class_embedding.pth: has 3 labels, the reward 4" in line(*words)
    torch.save({"weight": table + 1}, folder / "class_embedding.pth")
    assert "its last row, of the null label, is not zero" in line(*words)
    torch.save({"rows": table}, folder / "class_embedding.pth")
    assert "no label embedding" in line(*words)
    torch.save({"to_q.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.bin")
    assert "'to_q.lora_A.weight' is no LoRA of diffusers 0.17" in line(*words)
    checkpoint(folder, tiny.unet)
    (tmp_path / "theirs").mkdir()
    assert "the run directory exists" in line(*words)
