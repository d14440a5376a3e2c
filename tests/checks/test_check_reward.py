"""Every fault of a reward is found in one that has it, and the project's own have none."""

import pytest
import torch
from tiny_clip import write_clip

import diffrl
from diffrl.components import GROUPS
from diffrl.errors import DiffRLError
from diffrl.rewards.clip_score import ClipScore
from diffrl.rewards.compressibility import Compressibility
from diffrl.rewards.custom import reward
from diffrl.rewards.multitask import Multitask

LOADED = {"aesthetic", "clip_score", "vlm"}  # stand on weights or a server: in tests of their own
FITTED = {"compressibility", "multitask"}


@pytest.mark.parametrize("name", sorted(set(GROUPS["reward"]) - LOADED - FITTED))
def test_ours_have_no_fault(name):
    diffrl.check_reward(GROUPS["reward"][name]())


@pytest.mark.parametrize("settings", [Compressibility(num_classes=3), Multitask()])
def test_a_fitted_one_has_no_fault_and_its_settings_are_no_reward(settings):
    generator = torch.Generator().manual_seed(0)
    strength = torch.linspace(0, 0.3, 60).view(-1, 1, 1, 1)[torch.randperm(60, generator=generator)]
    images = 0.5 + strength * torch.randn(60, 3, 32, 32, generator=generator)
    fitted = settings.fit(images.clamp(0, 1), 0, from_pretrained=True)
    diffrl.check_reward(fitted, image_size=32)
    with pytest.raises(DiffRLError, match="fitted first"):
        diffrl.check_reward(settings)


def test_those_on_clip_have_no_fault_on_a_small_one(tmp_path):
    diffrl.check_reward(ClipScore(write_clip(tmp_path)))


def mean(images):
    return images.mean((1, 2, 3))


def raises(images, context):
    raise RuntimeError("no such tensor")


def per_pixel(images, context):
    return images.mean(1)


def numbers(images, context):
    return [float(x) for x in mean(images)]


def one_too_few(images, context):
    return mean(images)[1:]


def double(images, context):
    return mean(images).double()


def elsewhere(images, context):
    return mean(images).to("meta")


def of_bytes(images, context):
    return (255 * images).byte().sum((1, 2, 3))


def infinite_at_black(images, context):
    return mean(images).log()


def in_place(images, context):
    images[:, 1:] = 0
    return mean(images)


def noisy(images, context):
    return mean(images) + torch.rand(len(images))


def seeds(images, context):
    torch.manual_seed(0)
    return mean(images)


class Batch:
    """Batch statistics, as of a network that was left in training mode."""

    differentiable, num_classes = False, ()

    def __call__(self, images, context):
        values = mean(images)
        return values - values.mean()


def first_is_special(images, context):
    """Alone each scores its own mean; in company it depends on who stands first."""
    return mean(images) + (len(images) > 1 and context.prompts[0] != "cat")


def constant(images, context):
    return 0 * mean(images)


@reward(differentiable=True)
def detached(images, context):
    return mean(images.detach())


@reward(differentiable=True)
def rounded(images, context):
    return mean((255 * images).round())


@reward(differentiable=True)
def root_of_nothing(images, context):
    return images.var((1, 2, 3)).sqrt()


@reward(differentiable=True)
def downhill(images, context):
    return 2 * mean(images.detach()) - mean(images)


@reward(differentiable=True)
def leaking(images, context):
    return mean(images) + (images.mean() - images.mean().detach())


@reward(differentiable=True)
def hardly_any_slope(images, context):
    return (1 - 1e-4) * mean(images.detach()) + 1e-4 * mean(images)


def leaves_double_behind(images, context):
    torch.set_default_dtype(torch.float64)
    return mean(images).float()


def leaves_gradients_off(images, context):
    torch.set_grad_enabled(False)
    return mean(images)


def squeezed(images, context):
    return mean(images).squeeze()


@reward(differentiable=True)
def label_ignored(images, context):
    return mean(images)


label_ignored.num_classes = (3,)


def label_needed(images, context):
    if (context.label < 0).any():
        raise ValueError("label must be 0 to 2")
    return mean(images) * context.label[:, 0]


label_needed.num_classes = (3,)


def classes_by_number(images, context):
    return mean(images)


classes_by_number.num_classes = 3


@pytest.mark.parametrize(
    ("broken", "fault", "mend"),
    [
        (raises, r"failed at .*test_check_reward\.py", "RuntimeError: no such tensor"),
        (per_pixel, r"returned shape \[8, 64, 64\] for 8 pictures", r"must be \[8\]"),
        (numbers, "returned list", "must be a tensor of floats"),
        (one_too_few, r"returned shape \[7\]", r"must be \[8\]"),
        (double, "returns torch.float64", r"Return \.float\(\)"),
        (elsewhere, "returned a tensor on meta", r"\.to\(images\.device\)"),
        (of_bytes, "returned torch.int64", "must be a tensor of floats"),
        (infinite_at_black, "returned -inf for picture 5", "must be finite"),
        (in_place, "changes the pictures", r"images\.clone\(\)"),
        (noisy, "score .* and then", "Seed what it draws"),
        (seeds, "global generator", "a torch.Generator of its own"),
        (Batch, "among 8 and .* alone", r"no mean, deviation or norm over the batch"),
        (first_is_special, "another number at another place of the batch", "its own prompt"),
        (constant, "all 8 pictures score 0", "teaches nothing"),
        (detached, "no gradient reaches the pictures", r"no \.item\(\)"),
        (rounded, "gradient is 0 at every picture", "smooth"),
        (root_of_nothing, "gradient at picture 5, which is black, is not finite", "under the root"),
        (downhill, "the score falls at every picture", "Its sign is wrong"),
        (leaking, "the score of picture 0 has a gradient at picture 1", "over the batch"),
        (hardly_any_slope, r"changes 1e\+04 times as much", "the same expression"),
        (leaves_double_behind, r"dtype\(\) at torch.float64; it was torch.float32", "with-block"),
        (leaves_gradients_off, r"is_grad_enabled\(\) at False; it was True", "with-block"),
        (squeezed, r"alone, picture 0: .*returned shape \[\] for 1 pictures", r"no \.squeeze\(\)"),
        (label_ignored, "no score depends on attribute 0", r"Read context\.label\[:, 0\]"),
        (label_needed, "without a label", "Return 0 there"),
        (classes_by_number, "num_classes=3: it must be a tuple", r"Say \(\) if"),
    ],
)  # fmt: skip
def test_a_fault_is_found_and_its_mending_said(broken, fault, mend):
    with pytest.raises(DiffRLError, match=rf"(?s){broken.__name__}: .*({fault}).*{mend}"):
        diffrl.check_reward(broken)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "own",
    [
        lambda images, context: (images + 1e-4).log().mean((1, 2, 3)),
        lambda images, context: (images + 1e-6).sqrt().mean((1, 2, 3)),
        lambda images, context: images.flatten(1).median(1).values,
        lambda images, context: images.flatten(1).quantile(0.95, 1) - images.flatten(1).quantile(0.05, 1),
        lambda images, context: (1 - 4 * images).clamp(min=0).mean((1, 2, 3)),
        lambda images, context: mean(images + (images.round() - images).detach()),  # straight through
        lambda images, context: (4000 * (mean(images) - 0.6)).sigmoid() + 1e-3 * mean(images),
    ],
)
def test_a_gradient_that_is_sound_in_pictures_is_none(own):
    diffrl.check_reward(reward(differentiable=True)(own))


def test_every_fault_has_a_line():
    def both(images, context):
        return mean(images).double() + torch.rand(len(images))

    with pytest.raises(DiffRLError) as caught:
        diffrl.check_reward(both)
    first, *faults = str(caught.value).splitlines()
    assert first == "both: 3 faults"
    assert [line[:2] for line in faults] == ["- "] * 3


def test_a_black_box_needs_no_gradient_and_one_that_has_it_may_be_called_so():
    diffrl.check_reward(lambda images, context: mean(images))
    diffrl.check_reward(lambda images, context: mean(images).detach())
