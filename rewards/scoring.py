"""Asking a reward, whoever wrote it: what it must return, and who is at fault where it does not.

Shapes: N pictures.
"""

import traceback

from torch import Tensor

from diffrl.errors import DiffRLError
from diffrl.memory import is_exhausted
from diffrl.rewards.timeout import NoAnswerError, within
from diffrl.types import Context, Reward


def score(reward: Reward, images: Tensor, context: Context, timeout: float | None = None) -> Tensor:
    """Return the reward `[N]` of `images` `[N, 3, H, W]`, with its graph if it has one.

    Args:
        reward: is asked.
        images: to be scored.
        context: their prompts and labels.
        timeout: seconds that a black box may take; None: for ever.

    Raises:
        DiffRLError: it fails, does not answer, or returns anything but one finite float a picture.
    """
    name = type(reward).__name__
    try:
        if timeout is None or reward.differentiable:
            scores = reward(images, context)
        else:
            scores = within(timeout, lambda: reward(images, context))
    except NoAnswerError:
        raise DiffRLError(
            f"reward {name} has not answered for {timeout:g} s on {len(images)} pictures, the first of "
            f"{context.prompts[0]!r}. If it is slow and does not hang, give it longer by "
            "reward_timeout=SECONDS."
        ) from None
    except DiffRLError:
        raise
    except Exception as error:  # of whatever the reward is made of
        if is_exhausted(error):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise DiffRLError(
            f"reward {name} failed at {at.filename}:{at.lineno} on {len(images)} pictures, the first "
            f"of {context.prompts[0]!r}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = str(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
        raise DiffRLError(f"reward {name} returned {kind}; it must be a tensor of floats, one a picture.")
    if tuple(scores.shape) != (len(images),):
        raise DiffRLError(
            f"reward {name} returned shape {list(scores.shape)} for {len(images)} pictures; it must be "
            f"[{len(images)}]."
        )
    if scores.device != images.device:
        raise DiffRLError(
            f"reward {name} returned a tensor on {scores.device} for pictures on {images.device}; it must "
            "be there too, .to(images.device)."
        )
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0, 0])
        raise DiffRLError(
            f"reward {name} returned {float(scores[i])} for picture {i} ({context.prompts[i]!r}, label "
            f"{context.label[i].tolist()}); rewards must be finite."
        )
    return scores
