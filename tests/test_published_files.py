"""Checkpoints as others have published them: names, averages and links that ours do not have."""

import hashlib
import shutil

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file
from test_loading import assert_same, write_original

from diffrl import config
from diffrl.backbones.loading import fingerprint
from diffrl.backbones.stable_diffusion import StableDiffusion
from diffrl.errors import DiffRLError

DENOISER = "model.diffusion_model."
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def one(tiny_path, tmp_path):
    """The tiny checkpoint as one file, with its configs and tokenizer beside it."""
    return write_original(tiny_path, tmp_path / "model" / "one.safetensors")


def test_the_attention_of_v1_5_s_autoencoder_is_read_by_its_old_names(tiny_path, tmp_path, tiny):
    copy = shutil.copytree(tiny_path, tmp_path / "model")
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, old in OLD_ATTENTION.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[name] = tensor
    assert sum(f".{old}." in name for old in OLD_ATTENTION.values() for name in renamed) == 16
    save_file(renamed, path, metadata={"format": "pt"})
    old = StableDiffusion.load(str(copy))
    assert_same(old, tiny)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = tiny.encode(images)
    assert latents.std() > 0.01
    assert_close(old.encode(images), latents, atol=0)
    assert_close(old.decode(latents), tiny.decode(latents), atol=0)


class TestAverages:
    """Of v1-5-pruned, which has the denoiser's last weights, and their average as `model_ema.*`."""

    @pytest.fixture
    def both(self, one):
        tensors = load_file(one)
        names = [name for name in tensors if name.startswith(DENOISER)]
        # the original code leaves the dots out of the names within its `model`
        averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): tensors[n] for n in names}
        counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        return tensors | averages | counts | {name: tensors[name] + 1 for name in names}

    def test_they_are_taken(self, one, both, tiny):
        save_file(both, one)
        assert_same(StableDiffusion.load(str(one)), tiny)

    def test_what_pruning_leaves_of_them_is_not_taken_for_them(self, one, both, tiny):
        save_file({n: t for n, t in both.items() if not n.startswith("model_ema.diffusion")}, one)
        weight = StableDiffusion.load(str(one)).unet.conv_in.weight
        assert_close(weight, tiny.unet.conv_in.weight + 1, atol=0)

    def test_where_one_is_missing_its_weight_is_named(self, one, both):
        del both["model_ema.diffusion_modeltime_embed0weight"]
        save_file(both, one)
        with pytest.raises(
            DiffRLError, match=r"averages .* none of 'model\.diffusion_model\.time_embed\.0\."
        ):
            StableDiffusion.load(str(one))


def test_a_denoiser_with_weights_to_spare_is_refused(one):
    """2.1's unCLIP has the shapes of 2.1, and an embedding of pictures besides."""
    spare = {DENOISER + "label_emb.0.0.weight": torch.zeros(4, 4)}
    save_file(load_file(one) | spare, one)
    with pytest.raises(
        DiffRLError, match=r"no place for '.*label_emb\.0\.0\.weight': another architecture"
    ):
        StableDiffusion.load(str(one))


class TestFingerprint:
    def test_of_a_file_by_itself_it_is_of_its_name_and_content(self, tmp_path):
        (tmp_path / "one.ckpt").write_bytes(b"weights")
        expected = hashlib.sha256(b"one.ckpt" + b"weights").hexdigest()
        assert fingerprint(str(tmp_path / "one.ckpt")) == expected

    def test_what_is_read_beside_a_file_is_in_it_and_nothing_else(self, tmp_path):
        (tmp_path / "one.ckpt").write_bytes(b"weights")
        seen = {fingerprint(str(tmp_path / "one.ckpt"))}
        names = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
        names += ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            for text in ("{}", "{ }"):
                path.write_text(text)
                seen.add(fingerprint(str(tmp_path / "one.ckpt")))
        assert len(seen) == 1 + 2 * len(names)
        for name in ("unet/diffusion_pytorch_model.safetensors", "other.ckpt", "unet/notes.txt"):
            (tmp_path / name).write_bytes(b"x")
        assert fingerprint(str(tmp_path / "one.ckpt")) in seen


def test_a_file_in_the_hub_s_cache_keeps_its_name_and_what_lies_beside_it(one, tiny):
    blob = one.parent.parent / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    one.rename(blob)
    one.symlink_to(blob)
    model = config.load(["algo=ddpo", "env=sd15", f"env.model={one}"]).env.model
    assert_same(StableDiffusion.load(model), tiny)
