"""What is known about the solvable model, in numbers: `python -m diffrl.benchmarks.exact [key=value ...]`.

For each label, of the trained network's own chain and of the mixture's optimal denoiser: log Z, the best
objective E[V_T], the best that steps of our Gaussian shape allow, and the target law. The words are
settings of `diffrl train`, such as `algo.gamma=10 env.num_steps=50`. How far a trained policy is from
these is what `diffrl eval RUN` says.
"""

import argparse
import json
from typing import Any

from diffrl import config
from diffrl.backbones.gaussian_mixture import GaussianMixtureModel
from diffrl.build import Setup
from diffrl.errors import DiffRLError
from diffrl.exact import ExactSolver, Law, moments, total_variation
from diffrl.schedule import DDIMSchedule
from diffrl.types import Observation


def closed_form(model: GaussianMixtureModel, schedule: DDIMSchedule) -> Law:
    """Return the reference law with the mixture's optimal denoiser in the network's place."""
    alpha_bar = model.scheduler.alphas_cumprod

    def law(obs: Observation) -> Any:
        eps = model.mixture.eps(obs["latents"], alpha_bar.to(obs["latents"])[obs["timestep"]])
        return schedule.step(obs["latents"], eps, obs["timestep"])

    return law


def describe(solver: ExactSolver) -> list[dict[str, float]]:
    """Return the solver's answers, a dict a label, in nats where they have a unit."""
    mean, deviation = moments(solver.target, solver.points)
    right = solver.target[:, solver.points > 0].sum(1) + solver.target[:, solver.points == 0].sum(1) / 2
    kl = solver.gamma * (solver.attainable * solver.log_prob).sum(1) - solver.best
    columns = {
        "log_z": solver.log_z,
        "best": solver.best,
        "best_gaussian": solver.best_gaussian,
        "kl": kl,  # of the soft-optimal policy
        "target_mean": mean,
        "target_deviation": deviation,
        "target_above_0": right,
        "target_p": (solver.target * solver.log_prob.exp()).sum(1),  # E p(y|x_0)
        "tv_attainable": total_variation(solver.attainable, solver.target),
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def solve(words: list[str]) -> dict[str, list[dict[str, float]]]:
    """Return `describe` for the trained network and for the optimal denoiser."""
    setup = Setup(config.load(["env=gaussian_mixture", *words]))
    reward, model = setup.config.reward, setup.backbone
    if reward.num_dims != 1:
        raise DiffRLError(f"env.means={setup.config.env.means}: only one dimension is solved exactly.")
    assert isinstance(model, GaussianMixtureModel)
    policy = setup.make_policy(reward.num_classes)
    laws = {"network": policy.reference, "closed form": closed_form(model, setup.schedule)}
    gamma = setup.target_gamma
    reach = setup.config.env.reach
    return {
        name: describe(
            ExactSolver(
                setup.schedule,
                law,
                reward.log_prob,
                gamma,
                prompt_embeds=policy.null_embeds,
                bound=reach,
            )
        )
        for name, law in laws.items()
    }


def main() -> None:
    """Read the command line and print the answers as JSON."""
    parser = argparse.ArgumentParser(prog="diffrl.benchmarks.exact", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, such as algo.gamma=10")
    print(json.dumps(solve(parser.parse_args().words), indent=2))


if __name__ == "__main__":
    main()
