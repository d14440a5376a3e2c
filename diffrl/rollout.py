"""One episode of N envs, and the only place that decides where gradients flow.

Shapes: N envs, T steps, C,H,W latent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributions import Independent, kl_divergence

from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.types import Actor, Observation, Trajectory


def rollout(
    env: DenoisingVectorEnv,
    actor: Actor,
    generator: torch.Generator,
    *,
    reference: Callable[[Observation], Independent] | None = None,
    grad_steps: int | Sequence[bool] = 0,
    kl_steps: Sequence[bool] | None = None,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
) -> Trajectory:
    """Return N whole episodes.

    Args:
        env: is reset with `seed` and `options`, then stepped to the end.
        actor: chooses every action.
        generator: of the actor's noise.
        reference: the law to measure each step's KL against, usually `policy.reference`.
        grad_steps: how many of the last steps keep the gradient of the network: 0 is black box, T is
            full back-propagation. Or a bool for each step: where False, the noise prediction counts
            as a constant, while the latents stay on the path (AlignProp's and CTRL's truncation).
        kl_steps: where the KL is measured, with its gradient whatever `grad_steps` says. By default at
            every step, with its gradient where `grad_steps` keeps it (CTRL's code).
    """
    steps = env.schedule.num_steps
    if isinstance(grad_steps, int):
        grad_steps = [i >= steps - grad_steps for i in range(steps)]
    wanted = any(grad_steps)
    obs, _ = env.reset(seed=seed, options=options)
    actor.begin(obs)
    latents, log_probs, kls = [obs["latents"].detach()], [], []
    reward = info = None
    for i, keep in enumerate(grad_steps):
        x_t = obs["latents"]
        measured = reference is not None and (kl_steps is None or kl_steps[i])
        with torch.set_grad_enabled(keep or (measured and kl_steps is not None)):
            step = actor.act(obs, generator)
            if reference is not None and measured and step.distribution is not None:
                kls.append(kl_divergence(step.distribution, reference(obs)))
        prev_sample = step.prev_sample
        if not keep:
            # The noise prediction is a constant here, but x_{t-1} still depends on x_t linearly.
            prev_sample = prev_sample.detach()
            if x_t.requires_grad:
                prev_sample = prev_sample + env.schedule.x_gain[i] * (x_t - x_t.detach())
        if step.distribution is not None:
            with torch.no_grad():
                log_probs.append(step.distribution.log_prob(step.prev_sample))
        with torch.set_grad_enabled(wanted):
            obs, reward, _, _, info = env.step(prev_sample)
        latents.append(obs["latents"].detach())
    assert reward is not None
    assert info is not None
    return Trajectory(
        latents=latents,
        timesteps=env.schedule.timesteps.tolist(),
        log_prob=torch.stack(log_probs) if log_probs else None,
        kl=torch.stack(kls) if kls else None,
        reward=reward,
        images=info["images"].detach(),
        context=env.context,
    )
