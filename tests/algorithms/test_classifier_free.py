import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from PIL import Image
from test_guidance import attach, law_of, state
from test_policy import learn_a_little, make_policy, observe
from toy import Recorder, ToyEnv, ToyPolicy

from diffrl.algorithms.classifier_free import ClassifierFree
from diffrl.algorithms.guidance.base import Unguided
from diffrl.algorithms.guidance.classifier_free import ClassifierFreeGuidance
from diffrl.cli import main
from diffrl.datasets import PictureFiles, read
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.closed_form import Softmax
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.schedule import DDIMSchedule
from diffrl.types import NO_LABEL

REPORT = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())


class Sign:
    """The true label of a point is whether it is positive; as a reward it is what is asked for."""

    def draw_label(self, images, generator):
        return (images.flatten(1)[:, :1] > 0).long()

    def __call__(self, images, context):
        return context.label[:, 0].double()


class SignEnv(ToyEnv):
    dataset = None
    reward = Sign()


class NullPromptPolicy(ToyPolicy):
    null_embeds = torch.full((1, 1, 1), 7.0)


def collected(count=64, num_dims=1):
    policy = NullPromptPolicy(num_dims=num_dims)
    policy.theta.data += 5.0  # what the pretrained model draws does not depend on it
    env = SignEnv(policy.schedule, count, num_dims=num_dims)
    return policy, ClassifierFree().collect(env, policy, torch.Generator().manual_seed(0))


def test_pictures_are_the_pretrained_models_and_labels_their_own():
    _, batch = collected()
    assert batch.latents[-1].mean().abs() < 0.5
    assert torch.equal(batch.context.label, (batch.images.flatten(1)[:, :1] > 0).long())
    assert torch.equal(batch.reward, batch.context.label[:, 0].double())  # under the label that is learnt


def test_what_is_kept_of_an_episode_holds_nothing_else():
    _, batch = collected()
    kept = batch.result()
    assert torch.equal(kept.latents[-1], batch.latents[-1])
    assert kept.latents.untyped_storage().nbytes() == kept.latents.nbytes < batch.latents.nbytes
    assert kept.images.untyped_storage().nbytes() == 0


def test_labels_and_prompts_are_left_out_in_their_shares_independently():
    torch.manual_seed(0)
    no_prompt, no_label = ClassifierFree(drop_label=0.3, drop_prompt=0.1).draw_left_out(4000).T
    assert_close(no_label.float().mean(), 0.3, atol=0.03)
    assert_close(no_prompt.float().mean(), 0.1, atol=0.02)
    assert_close((no_label & no_prompt).float().mean(), 0.03, atol=0.01)
    assert not ClassifierFree(drop_label=0.0, drop_prompt=0.0).draw_left_out(4000).any()


def test_what_is_left_out_is_the_null_label_and_the_null_prompt(monkeypatch):
    policy, batch = collected(3)
    algorithm = ClassifierFree(epochs=1, batch_size=3, fit_batch_size=3, micro_batch_size=3)
    left_out = torch.tensor([[True, False], [False, True], [False, False]])
    monkeypatch.setattr(algorithm, "draw_left_out", lambda count: left_out)
    seen = []
    eps = policy.eps
    policy.eps = lambda obs: seen.append((obs["prompt_embeds"], obs["label"])) or eps(obs)
    torch.manual_seed(3)
    algorithm.update([batch], policy, Recorder(policy))
    own = batch.context.label
    ((embeds, label),) = seen
    assert embeds.flatten().tolist() == [7.0, 0.0, 0.0]
    assert label.flatten().tolist() == [int(own[0]), NO_LABEL, int(own[2])]


def test_the_gradient_is_that_of_the_denoising_error_of_each_label():
    """eps_theta = theta_y, so d/dtheta_y E[(theta_y - noise)^2] = 2 E[(theta_y - noise) 1_y]."""
    policy, batch = collected(6)
    algorithm = ClassifierFree(
        epochs=1, batch_size=6, fit_batch_size=6, micro_batch_size=6, max_grad_norm=1e9,
        drop_label=0.0, drop_prompt=0.0,
    )  # fmt: skip
    recorder = Recorder(policy)
    torch.manual_seed(3)
    algorithm.update([batch], policy, recorder)
    torch.manual_seed(3)
    by_hand = torch.zeros(2, dtype=torch.float64)
    torch.rand(6, 1)  # deals them into one minibatch
    torch.randint(1000, (6,))
    noise = torch.randn(6, 1, 1, 1).double().flatten()
    for y, n in zip(batch.context.label[:, 0].tolist(), noise, strict=True):
        by_hand[y] += 2 * (policy.theta.detach()[y] - n) / 6
    assert_close(recorder.gradients[0], by_hand, atol=1e-6)


def test_labels_of_points_are_drawn_from_the_classifier():
    points = torch.full((20_000, 1, 1, 1), 0.4)  # p(y=1|x) = sigmoid(0.6)
    label = Softmax().draw_label(points, torch.Generator().manual_seed(0))
    assert label.shape == (20_000, 1)
    assert_close(label.float().mean(), torch.sigmoid(torch.tensor(0.6)), atol=0.01)


def test_it_comes_close_to_the_posterior_of_the_solvable_model(tmp_path):
    words = ["algo=classifier_free", "env=gaussian_mixture", "algo.updates=4", "algo.epochs=5"]
    words += ["env.num_steps=50", "algo.batch_size=2048", "algo.micro_batch_size=2048", f"root={tmp_path}"]
    assert main(["train", "name=one", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    tv = [line["exact/tv"] for line in lines if "exact/tv" in line]
    assert tv[-1] < 0.2 < 0.4 < tv[0]


class TestDataset:
    """24 pictures of red 0, 10, 20, ..., prompts and labels that follow from their number."""

    def folder(self, path):
        path.mkdir()
        rows = ["file_name,text,label"]
        for number in range(24):
            Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(path / f"{number}.png")
            rows.append(f"{number}.png,{('cat', '', 'bee')[number % 3]},{number % 2}")
        (path / "metadata.csv").write_text("\n".join(rows))
        return path

    def test_pictures_prompts_and_labels_of_the_data_set_stay_together(self, tiny, tmp_path):
        entries, _ = read(self.folder(tmp_path / "d"), ["compressibility"], [2])
        attribute = Attribute("compressibility", Classifier(2), torch.tensor([1.0]), REPORT)
        schedule = DDIMSchedule(tiny.scheduler, 2, 1.0)
        env = DenoisingVectorEnv(
            tiny,
            schedule,
            LogLikelihood([attribute]),
            ["dog"],
            num_envs=40,
            dataset=PictureFiles(entries, 16),
        )
        algorithm, policy = ClassifierFree(), SimpleNamespace()
        batch = algorithm.collect(env, policy, torch.Generator().manual_seed(0))
        number = (25.5 * batch.images[:, 0, 0, 0]).round().long()
        assert len(number) == 40
        assert len(number.unique()) > 12  # 24 (1 - exp(-40 / 24)) = 19.5 are expected
        assert batch.context.label[:, 0].tolist() == (number % 2).tolist()
        assert batch.context.prompts == [("cat", "", "bee")[n % 3] for n in number.tolist()]
        embeds = tiny.encode_prompts(["cat", "", "bee"])[number % 3]
        assert_close(batch.context.prompt_embeds, embeds, atol=1e-5)
        law = tiny.vae.encode(2 * batch.images - 1).latent_dist
        drawn = (batch.latents[-1] / tiny.vae.config.scaling_factor - law.mean) / law.std
        assert_close(drawn.std(), 1.0, atol=0.03)
        assert_close(batch.reward, env.reward(batch.images, batch.context), atol=1e-6)
        again = algorithm.collect(env, policy, torch.Generator().manual_seed(0))
        assert torch.equal(again.latents, batch.latents)

    def test_a_run_learns_from_it_and_draws_nothing_to_learn_from(self, tiny_path, tmp_path, monkeypatch):
        monkeypatch.setattr("diffrl.algorithms.classifier_free.rollout", None)
        words = ["algo=classifier_free", f"env.model={tiny_path}", "env.num_steps=2", f"root={tmp_path}"]
        words += [f"dataset={self.folder(tmp_path / 'd')}", "reward.num_classes=2", "algo.updates=1"]
        words += ["algo.batch_size=8", "algo.micro_batch_size=4", "algo.epochs=1", "eval_pictures=2"]
        assert main(["train", "name=one", *words]) == 0
        lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
        assert len([line for line in lines if "train/loss" in line]) == 1

    def test_pictures_that_cannot_be_read_are_told_with_a_classifier_from_the_cache_too(
        self, tiny_path, tmp_path, capsys
    ):
        folder = self.folder(tmp_path / "d")
        words = ["algo=classifier_free", f"env.model={tiny_path}", "env.num_steps=2", f"root={tmp_path}"]
        words += [f"dataset={folder}", "reward.num_classes=2", "algo.updates=1", "algo.batch_size=96"]
        words += ["algo.micro_batch_size=32", "algo.epochs=1", "eval_pictures=2"]
        next(iter(sorted(folder.glob("*.png")))).write_bytes(b"cut")
        for name in ("one", "two"):
            assert main(["train", f"name={name}", *words]) == 0
            said = capsys.readouterr().out
            assert ("classifier: from the cache" in said) == (name == "two")
            assert "1 of 24 pictures cannot be read" in " ".join(said.split())


class TestGuidance:
    def test_scale_one_is_the_policy_to_the_bit_at_no_extra_call(self):
        observation = state()
        one, plain = (attach(g, 5)[0] for g in (ClassifierFreeGuidance(scale=1.0), Unguided()))
        assert torch.equal(law_of(one, observation).mean, law_of(plain, observation).mean)
        assert one.policy.num_calls == 5

    def test_the_label_is_weighed_against_its_absence(self):
        """A policy whose eps is its label (-1 without one): e(0) + s (e(y) - e(0)) = -1 + 3 (1 + 1)."""
        observation = state()
        observation["label"][:] = 1
        actor, _ = attach(ClassifierFreeGuidance(scale=3.0), 5)
        actor.policy.guided_eps = lambda obs: obs["label"].double().view(-1, 1, 1, 1)
        expected = actor.schedule.step(
            observation["latents"], torch.full((5, 1, 1, 1), 5.0).double(), observation["timestep"]
        )
        assert_close(law_of(actor, observation).mean, expected.mean, atol=1e-9)

    def test_three_ways_are_three_calls_and_what_the_policy_s_own_guidance_makes(self, tiny):
        policy = make_policy(tiny, guidance_scale=3.0, double=True)
        learn_a_little(policy)
        observation = observe(policy, label=1)
        actor = ClassifierFreeGuidance(scale=2.5).attach(policy, None)
        policy.num_calls = 0
        with torch.no_grad():
            law = actor.act(observation, torch.Generator()).distribution
            assert policy.num_calls == 3 * 4
            empty, no_label = policy.null_embeds, {**observation, "label": torch.full((4, 1), NO_LABEL)}
            neither = policy.eps({**no_label, "prompt_embeds": empty.expand(4, -1, -1)})
            prompt, both = policy.eps(no_label), policy.eps(observation)
            by_hand = neither + 3.0 * (prompt - neither) + 3.0 * 2.5 * (both - prompt)
            twice = policy.guided_eps(no_label)
            twice = twice + 2.5 * (policy.guided_eps(observation) - twice)
        for eps in (by_hand, twice):
            expected = policy.schedule.step(observation["latents"], eps, observation["timestep"])
            assert_close(law.mean, expected.mean, atol=1e-9)

    def test_the_published_one_gives_the_label_to_both_halves(self):
        """eps = 10 y + c, the empty prompt's c is 7: 10 y + 7 + 3 (1 - 7), the label at weight 1."""
        observation = state()
        observation["label"][:] = 1
        observation["prompt_embeds"][:] = 1
        actor, _ = attach(ClassifierFreeGuidance(scale=1.0, published=True), 5)
        actor.policy.guidance_scale, actor.policy.null_embeds = 3.0, torch.full((1, 1, 1), 7.0)
        actor.policy.eps = lambda obs: (
            10.0 * obs["label"].double().view(-1, 1, 1, 1) + obs["prompt_embeds"][..., None]
        )
        expected = actor.schedule.step(
            observation["latents"], torch.full((5, 1, 1, 1), -1.0).double(), observation["timestep"]
        )
        assert_close(law_of(actor, observation).mean, expected.mean, atol=1e-9)

    def test_the_published_one_has_no_scale_of_the_label_s(self):
        with pytest.raises(DiffRLError, match=r"guidance.published=true guidance.scale=2.0"):
            ClassifierFreeGuidance(published=True)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"drop_label": 1.0}, {"drop_prompt": -0.1}])
def test_bad_settings_are_named(settings):
    with pytest.raises(DiffRLError, match=next(iter(settings))):
        ClassifierFree(**settings)
