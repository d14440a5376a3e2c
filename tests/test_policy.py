import pytest
import torch
from conftest import assert_close
from torch.distributions import Normal, kl_divergence

from diffrl.errors import DiffRLError
from diffrl.policy import LabelEmbedding, LoRA, Policy, Pretrained
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule
from diffrl.types import NO_LABEL


def make_policy(
    backbone, *, guidance_scale=2.0, num_steps=4, num_classes=(3,), double=False, lora=None
) -> Policy:
    schedule = DDIMSchedule(backbone.scheduler, num_steps, 1.0)
    null = backbone.encode_prompts([""])
    policy = Policy(
        backbone.unet, schedule, null, guidance_scale=guidance_scale, num_classes=num_classes, lora=lora
    )
    return policy.double() if double else policy


def observe(policy, n=4, label=None, step=0):
    generator = torch.Generator().manual_seed(1)
    shape = (n, 4, 8, 8)
    dtype = policy.null_embeds.dtype
    return {
        "latents": torch.randn(shape, generator=generator, dtype=dtype),
        "timestep": policy.schedule.timesteps[step].repeat(n),
        "prompt_embeds": torch.randn(n, 16, 16, generator=generator, dtype=dtype),
        "label": torch.arange(n)[:, None] % 3 if label is None else torch.full((n, 1), label),
    }


def learn_a_little(policy, seed=0):
    """Move every trainable weight by hand, the null row excepted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*policy.lora_parameters(), *policy.label_embedding.parameters()]:
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for table in policy.label_embedding.tables:
            table.weight[-1] = 0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_kl_is_exactly_zero_before_the_first_update(tiny, guidance_scale):
    policy = make_policy(tiny, guidance_scale=guidance_scale)
    for step in range(4):
        obs = observe(policy, step=step)
        assert kl_divergence(policy(obs), policy.reference(obs)).tolist() == [0.0] * 4


def test_reference_does_not_move_when_the_policy_learns(tiny):
    policy = make_policy(tiny)
    obs = observe(policy)
    before = policy.reference(obs).mean.detach().clone()
    learn_a_little(policy)
    assert_close(policy.reference(obs).mean, before, atol=0)
    assert float(kl_divergence(policy(obs), policy.reference(obs)).detach().min()) > 0


def test_log_prob_sums_normal_densities_over_latent_dims(tiny):
    policy = make_policy(tiny)
    obs = observe(policy)
    law = policy(obs)
    x = torch.randn(4, 4, 8, 8)
    expected = Normal(law.mean, policy.schedule.sigma[0]).log_prob(x).sum((1, 2, 3))
    assert_close(law.log_prob(x), expected, atol=1e-3, rtol=1e-6)


def test_guidance_equals_two_separate_network_calls(tiny):
    policy = make_policy(tiny, guidance_scale=3.0)
    learn_a_little(policy)
    obs = observe(policy)
    with torch.no_grad():
        null = policy.null_embeds.expand(4, -1, -1)
        no_label = torch.full((4, 1), NO_LABEL)
        u = policy.eps({**obs, "prompt_embeds": null, "label": no_label})
        c = policy.eps(obs)
        expected = policy.schedule.step(obs["latents"], u + 3 * (c - u), obs["timestep"]).mean
        assert_close(policy(obs).mean, expected, atol=1e-5)


def test_every_trainable_tensor_gets_a_gradient_and_nothing_else(tiny):
    policy = make_policy(tiny)
    learn_a_little(policy)
    policy(observe(policy)).mean.square().sum().backward()
    trainable = {id(p) for p in [*policy.lora_parameters(), *policy.label_embedding.parameters()]}
    assert len(trainable) == 2 * 4 * 2 * 4 + 1  # A and B of 4 projections, 2 attentions, 4 blocks; labels
    for name, p in policy.named_parameters():
        assert p.requires_grad == (id(p) in trainable), name
        assert (p.grad is not None and bool(p.grad.any())) == (id(p) in trainable), name


def test_null_row_never_learns_even_with_weight_decay(tiny):
    policy = make_policy(tiny)
    learn_a_little(policy)
    optimizer = torch.optim.AdamW(policy.label_embedding.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        obs = observe(policy)
        obs["label"][0] = NO_LABEL
        policy(obs).mean.square().sum().backward()
        optimizer.step()
    table = policy.label_embedding.tables[0].weight
    assert not table[-1].any()
    assert table[:-1].any()


def test_no_label_leaves_the_time_embedding_alone():
    embedding = LabelEmbedding((3, 2), 5)
    with torch.no_grad():
        for table in embedding.tables:
            table.weight[:-1] = torch.randn(table.weight[:-1].shape)
    assert not embedding(torch.tensor([[NO_LABEL, NO_LABEL]])).any()
    expected = embedding.tables[0].weight[2] + embedding.tables[1].weight[1]
    assert_close(embedding(torch.tensor([[2, 1]]))[0].detach(), expected.detach(), atol=0)


def test_control_scale_interpolates_between_reference_and_policy(tiny):
    policy = make_policy(tiny)
    learn_a_little(policy)
    obs = observe(policy)
    with torch.no_grad():
        trained, reference = policy(obs).mean, policy.reference(obs).mean
        for scale in (0.0, 0.5, 1.5):
            policy.control_scale = scale
            # the mean is affine in eps at fixed x_t, so it interpolates as eps does
            assert_close(policy(obs).mean, reference + scale * (trained - reference), atol=1e-4)


def test_permuting_the_batch_permutes_the_law(tiny):
    policy = make_policy(tiny)
    learn_a_little(policy)
    obs = observe(policy)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {key: value[order] for key, value in obs.items()}
    with torch.no_grad():
        assert_close(policy(shuffled).mean, policy(obs).mean[order], atol=1e-5)


def test_same_seed_gives_the_same_adapters(tiny_path):
    from diffrl.backbones.stable_diffusion import StableDiffusion

    first, second = (make_policy(StableDiffusion.load(str(tiny_path))) for _ in range(2))
    for a, b in zip(first.lora_parameters(), second.lora_parameters(), strict=True):
        assert_close(a.detach(), b.detach(), atol=0)


def test_rank_zero_is_refused():
    with pytest.raises(DiffRLError, match="rank=0"):
        LoRA(rank=0)


@pytest.mark.parametrize("lora", [None, LoRA(2, ["time_emb_proj", "conv1", "conv2"])], ids=str)
def test_an_untrained_policy_draws_what_the_pretrained_model_draws(tiny, lora):
    from diffrl.envs.denoising import DenoisingVectorEnv
    from diffrl.rewards.jpeg import Jpeg

    policy = make_policy(tiny, num_classes=(), lora=lora)
    env = DenoisingVectorEnv(tiny, policy.schedule, Jpeg(), ["cat"], num_envs=2)
    pictures = [
        rollout(env, actor, torch.Generator().manual_seed(0), seed=0).images
        for actor in (policy, Pretrained(policy))
    ]
    assert_close(pictures[0], pictures[1], atol=0)


def test_every_network_evaluation_is_counted_once_recomputing_aside(tiny):
    """4 samples: 8 with both halves of guidance, 4 for a raw or an unconditional prediction."""
    policy = make_policy(tiny)
    obs = observe(policy)
    policy(obs, in_chain=True).mean.sum().backward()  # checkpointed: it runs again, for the same evaluation
    assert policy.num_calls == 8
    policy.eps(obs)
    assert policy.num_calls == 12
    policy.unconditional(obs)
    assert policy.num_calls == 16


class TestPrecision:
    @pytest.fixture(params=["fp32", "bf16", "fp16"])
    def backbone(self, tiny_path, request):
        from diffrl.backbones.stable_diffusion import StableDiffusion

        return StableDiffusion.load(str(tiny_path), precision=request.param)

    def test_before_the_first_update_the_kl_is_exactly_zero_and_ratios_are_exactly_one(self, backbone):
        from diffrl.envs.denoising import DenoisingVectorEnv
        from diffrl.rewards.jpeg import Jpeg

        policy = make_policy(backbone)
        env = DenoisingVectorEnv(backbone, policy.schedule, Jpeg(), ["cat", "bee"], num_envs=3)
        episodes = rollout(
            env, policy, torch.Generator().manual_seed(0), reference=policy.reference, seed=0
        )
        assert episodes.kl.tolist() == [[0.0] * 3] * 4
        assert episodes.log_ratio.tolist() == [[0.0] * 3] * 4
        for step in range(4):
            obs, action = episodes.decision(torch.arange(3), torch.full((3,), step))
            assert torch.equal(policy(obs).log_prob(action), episodes.log_prob[step])

    def test_only_the_frozen_denoiser_is_in_it(self, backbone):
        from diffrl.backbones.stable_diffusion import PRECISIONS

        frozen = {p.dtype for p in backbone.unet.parameters()}
        policy = make_policy(backbone)
        assert frozen == {backbone.unet.conv_in.weight.dtype}
        assert frozen <= set(PRECISIONS.values())
        trained = policy.lora_parameters() + policy.embedding_parameters()
        assert {p.dtype for p in trained} == {torch.float32}
        others = [*backbone.vae.parameters(), *backbone.text_encoder.parameters()]
        assert {p.dtype for p in others} == {torch.float32}
        law = policy(observe(policy))
        assert {law.mean.dtype, law.log_prob(law.mean).dtype} == {torch.float32}
        assert backbone.decode(law.mean.detach()).dtype == torch.float32

    def test_a_half_predicts_what_fp32_does_to_its_rounding(self, backbone, tiny):
        exact, rounded = make_policy(tiny), make_policy(backbone)
        for policy in (exact, rounded):
            learn_a_little(policy)
        obs = observe(exact)
        with torch.no_grad():
            error = (rounded.guided_eps(obs) - exact.guided_eps(obs)).square().mean().sqrt()
            size = exact.guided_eps(obs).square().mean().sqrt()
        dtype = backbone.unet.conv_in.weight.dtype
        assert error <= 10 * torch.finfo(dtype).eps * size
        assert (error > 0) == (dtype != torch.float32)

    def test_gradients_of_bf16_are_those_of_fp32_to_its_rounding(self, tiny_path, tiny):
        from diffrl.backbones.stable_diffusion import StableDiffusion

        gradients = []
        for backbone in (tiny, StableDiffusion.load(str(tiny_path), precision="bf16")):
            policy = make_policy(backbone)
            learn_a_little(policy)
            (policy.guided_eps(observe(policy)) * torch.linspace(-1, 1, 64).view(8, 8)).sum().backward()
            parts = [p.grad.flatten() for p in policy.lora_parameters() + policy.embedding_parameters()]
            assert {part.dtype for part in parts} == {torch.float32}
            gradients.append(torch.cat(parts))
        assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.995


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_v_model_is_guided_by_the_noise_that_its_v_means(tiny_path, guidance_scale):
    """The same network as eps and as v: mixed before or after the conversion, eps is the same."""
    from diffrl.backbones.stable_diffusion import StableDiffusion
    from diffrl.schedule import make_scheduler

    as_eps = make_policy(StableDiffusion.load(str(tiny_path)), guidance_scale=guidance_scale)
    backbone = StableDiffusion.load(str(tiny_path))
    backbone.scheduler = make_scheduler({"prediction_type": "v_prediction"})
    as_v = make_policy(backbone, guidance_scale=guidance_scale)
    for policy in (as_eps, as_v):
        learn_a_little(policy)
    obs = observe(as_eps, step=1)
    with torch.no_grad():
        mixed = as_eps.guided_eps(obs)  # the network's two outputs, mixed
        a = as_v.schedule.alpha_bar[1]
        assert_close(as_v.guided_eps(obs), a.sqrt() * mixed + (1 - a).sqrt() * obs["latents"], atol=1e-5)
        raw = as_eps.eps(obs)
        assert_close(as_v.eps(obs), a.sqrt() * raw + (1 - a).sqrt() * obs["latents"], atol=1e-5)
        assert kl_divergence(as_v(obs), as_v.reference(obs)).min() > 0
