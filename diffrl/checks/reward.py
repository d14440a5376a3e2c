"""What a reward must be. Shapes: N = 8 pictures `[N, 3, S, S]` in [0, 1], or points `[N, d, 1, 1]`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffrl.checks import alike, global_generators, instance, raise_faults
from diffrl.conflicts import is_learned
from diffrl.errors import DiffRLError
from diffrl.rewards.scoring import score
from diffrl.types import NO_LABEL, Context, Reward

_FLAT = {5: "black", 6: "white", 7: "grey"}  # pictures at which logarithms and roots break
_STEPS = (1e-4, 1e-3, 1e-2)  # change of a pixel
_ROUNDING = 1e-6  # of float32, some ulps
_FACTOR = 100.0  # a step of finite size, or a straight-through gradient, is not exact
_DTYPE, _GRAD = "torch.get_default_dtype()", "torch.is_grad_enabled()"
_PROMPTS = ("cat", "dog", "a red bird", "two horses")


def check_reward(reward: Any, *, image_size: int = 64, device: str = "cpu") -> None:
    """Raise DiffRLError with a line for every fault of a reward; some 100 pictures are scored.

    Looked at: what it returns (one finite float32 a picture, on the pictures' device, at black and white
    ones too), that it is the same every time and whatever other pictures are scored beside it, that it
    leaves the pictures, the global generators and PyTorch's modes alone, that it reads the labels it has
    classes for, and if it says `differentiable=True`, that there is a finite gradient that is not 0, of
    each picture's score to that picture alone, which leads uphill at about the slope it promises.

    Args:
        reward: a reward, or the class or function of one.
        image_size: S.
        device: where the pictures are.
    """
    reward = instance("reward", reward)
    name = type(reward).__name__
    if is_learned(reward):
        raise DiffRLError(f"{name}: settings of a reward that is fitted first; check what its fit returns.")
    raise_faults(name, _faults(reward, image_size, torch.device(device)))


def _faults(reward: Reward, image_size: int, device: torch.device) -> Iterator[str]:
    claims = list(_claims(reward))
    yield from claims
    if claims:
        return
    images = _pictures(getattr(reward, "num_dims", None), image_size).to(device)
    context = _context(reward, len(images), device)
    before, modes, kept = global_generators(), _modes(), images.clone()
    try:
        scores = score(reward, images, context).detach()
    except DiffRLError as error:
        yield str(error)
        return  # whatever else is asked would only say it again
    left = _modes()
    torch.set_default_dtype(modes[_DTYPE])
    torch.set_grad_enabled(modes[_GRAD])
    if changed := [what for what in modes if left[what] != modes[what]]:
        for what in changed:
            yield f"it leaves {what} at {left[what]}; it was {modes[what]}. Change it in a with-block."
        return  # the rest would be asked in other modes
    if global_generators() != before:
        yield (
            "it draws from, or seeds, a global generator, and so changes what the run draws. Give it a "
            "torch.Generator of its own with a fixed seed."
        )
    if not torch.equal(images, kept):
        yield "it changes the pictures it is given. Work on images.clone()."
        images = kept.clone()
    if scores.dtype != torch.float32:
        yield f"it returns {scores.dtype}. Return .float(), torch.float32."
    again = score(reward, images.clone(), context).detach()
    if not torch.equal(again, scores):
        yield (
            f"the same pictures score {float(scores[0]):.6g} and then {float(again[0]):.6g}. Seed what it "
            "draws, and put its networks in .eval() mode."
        )
    else:
        yield from _company(reward, images, context, scores)
    if scores.max() == scores.min():
        yield f"all {len(scores)} pictures score {float(scores[0]):.6g}. A constant teaches nothing."
    yield from _labels(reward, images, context, scores)
    if reward.differentiable:
        yield from _gradient(reward, images, context)


def _claims(reward: Reward) -> Iterator[str]:
    """Yield what is wrong with the reward's own attributes."""
    if not isinstance(getattr(reward, "differentiable", None), bool):
        yield "it has no `differentiable`. Say True or False: do gradients flow from score to pictures?"
    counts = getattr(reward, "num_classes", None)
    if not isinstance(counts, tuple) or any(not isinstance(k, int) or k < 2 for k in counts):
        yield (
            f"num_classes={counts}: it must be a tuple, of each attribute of the label the number of its "
            "classes, 2 or more. Say () if it reads no label."
        )


def _pictures(num_dims: int | None, size: int) -> Tensor:
    """Return noise of five strengths on five grounds, then the flat ones; or points around 0."""
    generator = torch.Generator().manual_seed(0)
    if num_dims is not None:
        return torch.randn(8, num_dims, 1, 1, generator=generator)
    grounds = torch.rand(5, 3, 1, 1, generator=generator)
    strengths = torch.linspace(0.05, 0.4, 5).view(5, 1, 1, 1)
    noisy = grounds + strengths * torch.randn(5, 3, size, size, generator=generator)
    flat = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, size, size)
    return torch.cat([noisy.clamp(0, 1), flat])


def _context(reward: Reward, count: int, device: torch.device) -> Context:
    numbers = torch.arange(count)
    columns = [numbers % classes for classes in reward.num_classes]
    label = torch.stack(columns, 1) if columns else torch.zeros(count, 0, dtype=torch.int64)
    prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(count)]
    return Context(prompts, torch.zeros(count, 1, 1, device=device), label.to(device))


def _company(reward: Reward, images: Tensor, context: Context, scores: Tensor) -> Iterator[str]:
    """A picture's score is its own: the same alone, and at another place of the batch."""
    singles = []
    for i in range(len(images)):
        try:
            singles.append(score(reward, images[i : i + 1], context.rows(torch.tensor([i]))))
        except DiffRLError as error:
            yield f"alone, picture {i}: {error} Take the mean over named dimensions, and no .squeeze()."
            return
    alone = torch.cat(singles).detach()
    if not (same := alike(scores, alone)).all():
        i = int((~same).nonzero()[0, 0])
        yield (
            f"picture {i} scores {float(scores[i]):.6g} among {len(scores)} and {float(alone[i]):.6g} "
            "alone. Use no mean, deviation or norm over the batch (algorithms standardise rewards "
            "themselves), and put its networks in .eval() mode."
        )
        return
    order = torch.arange(len(images)).roll(1)
    moved = score(reward, images[order], context.rows(order)).detach()
    if not (same := alike(scores[order], moved)).all():
        i = int(order[(~same).nonzero()[0, 0]])
        yield (
            f"picture {i} scores {float(scores[i]):.6g}, and another number at another place of the batch. "
            "Take each picture with its own row of context.label and its own prompt, by its place."
        )


def _labels(reward: Reward, images: Tensor, context: Context, scores: Tensor) -> Iterator[str]:
    """Each attribute of the label counts, and none of them need be given."""
    for number, classes in enumerate(reward.num_classes):
        label = context.label.clone()
        label[:, number] = (label[:, number] + 1) % classes
        other = score(reward, images, Context(context.prompts, context.prompt_embeds, label))
        if torch.equal(other.detach(), scores):
            yield (
                f"num_classes={reward.num_classes}, but no score depends on attribute {number} of the "
                f"label. Read context.label[:, {number}], or leave it out of num_classes."
            )
    if reward.num_classes:
        nothing = torch.full_like(context.label, NO_LABEL)
        try:
            score(reward, images, Context(context.prompts, context.prompt_embeds, nothing))
        except DiffRLError as error:
            yield f"without a label (NO_LABEL, {NO_LABEL}): {error} Return 0 there."


def _gradient(reward: Reward, images: Tensor, context: Context) -> Iterator[str]:
    images = images.clone().requires_grad_()
    scores = score(reward, images, context)
    slope = None
    if scores.requires_grad:
        (slope,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    if slope is None:
        yield (
            "differentiable=True, but no gradient reaches the pictures. Stay in tensor operations (no "
            ".item(), .numpy(), .detach(), no_grad, round), or say differentiable=False."
        )
        return
    if not (finite := slope.isfinite().flatten(1).all(1)).all():
        i = int((~finite).nonzero()[0, 0])
        where = (
            f"picture {i}, which is {_FLAT[i]}," if i in _FLAT and images[0].numel() > 8 else f"picture {i}"
        )
        yield (
            f"the gradient at {where} is not finite. Add a small number under the root or logarithm, and "
            "before a division."
        )
    elif not slope.any():
        yield (
            "differentiable=True, but the gradient is 0 at every picture. It rounds, counts, compares or "
            "saturates: use a smooth measure, or say differentiable=False."
        )
    else:
        yield from _slopes(reward, images, context, slope)


def _slopes(reward: Reward, images: Tensor, context: Context, slope: Tensor) -> Iterator[str]:
    """A gradient is of the picture's own score, and a step along it changes the score as it says."""
    noisy = torch.arange(len(images))
    if images[0].numel() > 8:
        noisy = noisy[: min(_FLAT)]  # where a picture is flat, a measure of it may have a kink
    scores = score(reward, images, context)
    for i in noisy.tolist():
        (own,) = torch.autograd.grad(scores[i], images, retain_graph=True)
        others = own.abs().flatten(1).amax(1)
        others[i] = 0
        if float(others.max()) > 1e-4 * float(slope.abs().max()):
            yield (
                f"the score of picture {i} has a gradient at picture {int(others.argmax())}. Use no mean, "
                "deviation or norm over the batch, also where it cancels out of the score."
            )
            return
    shares = torch.cat([*_shares(reward, images.detach()[noisy], context.rows(noisy), slope[noisy])])
    if not len(shares):
        return  # it is flat there
    if (shares <= 0).all() and (shares < 0).any():
        yield (
            "along its gradient the score falls at every picture. Its sign is wrong: return what is to be "
            "maximised, and the gradient of the same."
        )
    elif not ((shares > 1 / _FACTOR) & (shares < _FACTOR)).any():
        middle = float(shares.median())
        yield (
            f"along its gradient the score changes {middle:.2g} times as much as the gradient says. Let "
            "the score and its gradient come from the same expression."
        )


def _shares(reward: Reward, images: Tensor, context: Context, slope: Tensor) -> Iterator[Tensor]:
    """Yield the rise of the score along its gradient over what the gradient says, where it is no rounding.

    Of a step of each size, which is that of the pixel that changes most; 1 where the score is linear.
    """
    along = slope / slope.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    for size in _STEPS:
        up, down = images + size * along, images - size * along
        if images[0].numel() > 8:  # pictures, not points
            up, down = up.clamp(0, 1), down.clamp(0, 1)
        high, low = (score(reward, moved, context).detach() for moved in (up, down))
        said = (slope * (up - down)).flatten(1).sum(1)
        told = said > _ROUNDING * torch.maximum(high.abs(), low.abs())
        yield ((high - low) / said)[told]


def _modes() -> dict[str, Any]:
    """Return what of PyTorch's a reward must not leave changed."""
    return {_DTYPE: torch.get_default_dtype(), _GRAD: torch.is_grad_enabled()}
