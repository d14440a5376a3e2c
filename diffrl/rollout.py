"""One episode of N envs, and the place that decides where gradients flow along it.

Shapes: N envs, T steps, C,H,W latent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.types import Actor, Observation, Trajectory


def rollout(
    env: DenoisingVectorEnv,
    actor: Actor,
    generator: torch.Generator,
    *,
    reference: Callable[[Observation], Independent] | None = None,
    grad_steps: int | Sequence[float] = 0,
    kl_weights: Sequence[float] | None = None,
    posterior_mean: Callable[[Observation], Tensor] | None = None,
    log_probs: bool = True,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
) -> Trajectory:
    """Return N whole episodes.

    Args:
        env: is reset with `seed` and `options`, then stepped to the end.
        actor: chooses every action.
        generator: of the actor's noise.
        reference: the law to measure each step's KL against, usually `policy.reference`.
        grad_steps: how many of the last steps keep the gradient of the network's output: 0 is black
            box, T all. Or a number for each step: where 0, the noise prediction counts as a constant
            (AlignProp's and CTRL's truncation); elsewhere 1, or along `posterior_mean` a factor on the
            reward's gradient there.
        kl_weights: a factor on each step's KL, 0 to leave it unmeasured. A measured step has its KL's
            gradient whatever `grad_steps` says. By default every step is measured, at weight 1, with
            its gradient where `grad_steps` keeps it (CTRL's code).
        posterior_mean: E[x_0|x_t] of an observation. If given, the reward's gradient reaches each kept
            step's x_{t-1} at once, by the Jacobian of E[x_0|x_{t-1}], and never from step to step; a KL has
            its gradient at a constant x_t. For the reward that is exact at eta = 1 near the reference,
            where x_0 given x_{t-1} is Gaussian of a constant covariance; elsewhere it is an estimate whose
            bias has no bound. By default gradients go back through the chain, by the true derivative where
            a step is kept, by the derivative at a constant noise prediction where it is not.
        log_probs: whether to measure the actions' log-probabilities, which a pathwise gradient has no use
            for.

    Examples:
        >>> from diffrl import config
        >>> from diffrl.build import Setup
        >>> setup = Setup(config.load(["algo=ddpo", "reward=jpeg", "env.num_steps=2"]))
        >>> policy, env = setup.make_policy(()), setup.make_env(setup.config.reward, 4)
        >>> episodes = rollout(env, policy, setup.generator(0), reference=policy.reference, seed=0)
        >>> episodes.latents.shape, episodes.log_prob.shape, episodes.reward.shape
        (torch.Size([3, 4, 4, 16, 16]), torch.Size([2, 4]), torch.Size([4]))
        >>> float(episodes.kl.abs().max())  # nothing is learnt yet
        0.0
    """
    steps = env.schedule.num_steps
    if isinstance(grad_steps, int):
        grad_steps = [i >= steps - grad_steps for i in range(steps)]
    wanted = any(grad_steps)
    obs, _ = env.reset(seed=seed, options=options)
    actor.begin(obs)
    latents, densities, kls, log_ratios = [obs["latents"].detach()], [], [], []
    reward = info = None
    shortcuts: list[Tensor] = []  # from kept actions to x_0
    for i, factor in enumerate(grad_steps):
        keep = factor > 0
        x_t = obs["latents"]
        seen: Observation = obs if posterior_mean is None else {**obs, "latents": x_t.detach()}
        weight = 1.0 if kl_weights is None else kl_weights[i]
        measured = reference is not None and weight > 0
        with torch.set_grad_enabled(keep or (measured and kl_weights is not None)):
            step = actor.act(seen, generator)
            if reference is not None and measured and step.distribution is not None:
                # frozen: at a constant x_t it is a constant
                with torch.set_grad_enabled(torch.is_grad_enabled() and seen["latents"].requires_grad):
                    other = reference(seen)
                kls.append(weight * kl_divergence(step.distribution, other))
        prev_sample = step.prev_sample if keep else step.prev_sample.detach()
        if posterior_mean is not None and i == steps - 1:
            shortcuts.append(_gradient_alone(factor, prev_sample))
            prev_sample = sum(shortcuts, prev_sample.detach())
        elif posterior_mean is None and x_t.requires_grad and not keep:
            prev_sample = prev_sample + _gradient_alone(env.schedule.x_gain[i], x_t)
        if log_probs and step.distribution is not None:
            with torch.no_grad():
                densities.append(step.distribution.log_prob(step.prev_sample))
                if measured:
                    log_ratios.append(densities[-1] - other.log_prob(step.prev_sample))
        with torch.set_grad_enabled(wanted):
            obs, reward, _, _, info = env.step(prev_sample)
            if posterior_mean is not None and keep and i < steps - 1:
                shortcuts.append(_gradient_alone(factor, posterior_mean(obs)))
        latents.append(obs["latents"].detach())
    assert reward is not None
    assert info is not None
    return Trajectory(
        latents=torch.stack(latents),
        timesteps=env.schedule.timesteps.tolist(),
        log_prob=torch.stack(densities) if densities else None,
        kl=torch.stack(kls) if kls else None,
        log_ratio=torch.stack(log_ratios) if log_ratios else None,
        reward=reward,
        images=info["images"].detach(),
        context=env.context,
    )


def _gradient_alone(factor: Tensor | float, x: Tensor) -> Tensor:
    """Return zero, whose gradient is `factor` times that of x."""
    return factor * (x - x.detach())
