"""How far is a policy from the best there is? Answered on the solvable model, where the best is known.

In one dimension a policy's measures are exact (`diffrl.exact`), as long as it stays on the grid: they are
null of one that has left it. In two they are sampled, with no bound beside them; so are those of guidance,
whose steps have no density, beside the exact target's.

Shapes: K labels, n grid points.
"""

from statistics import fmean
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from diffrl.algorithms.guidance.base import Guidance, Unguided
from diffrl.algorithms.untrained import Untrained
from diffrl.build import Setup
from diffrl.exact import ExactSolver, Measured, moments
from diffrl.log import RunLog, console
from diffrl.plot import Curve, densities
from diffrl.policy import Policy
from diffrl.rewards.closed_form import ClosedForm
from diffrl.rollout import rollout
from diffrl.types import EVALUATION_SEED

_GREY, _BLUE, _RED = "#8c8c8c", "#1f77b4", "#c82828"
_SAMPLES = 2048  # a label, where nothing is exact: standard error of a mean .02 standard deviations
_AT_ONCE = 16384  # points or particles; 131,072 took four times as long, as a CPU waits for its memory
_MOST_OFF_GRID = 0.05  # steps of an episode, over labels: fewer are held at the edge
_COLUMNS = {
    "log p": "log_prob",
    "KL": "kl_nats",
    "J": "objective",
    "E[V_T]": "best",
    "gap (nats)": "gap_nats",
    "Gaussian gap": "gap_gaussian_nats",  # to the best policy whose steps have our shape
    "TV": "tv",
}


class MixtureEvaluation:
    """The solved model of a run, and the run's policy held against it."""

    def __init__(self, setup: Setup, policy: Policy, reward: ClosedForm) -> None:
        self.setup, self.policy, self.reward = setup, policy, reward
        self.guided = not isinstance(setup.config.guidance, Unguided)
        self.gamma = setup.target_gamma
        self.solver: ExactSolver | None = None
        if reward.num_dims == 1:
            self.solver = ExactSolver(
                setup.schedule,
                policy.reference,
                reward.log_prob,
                self.gamma,
                prompt_embeds=policy.null_embeds,
                bound=setup.config.env.reach,
            )

    def report(self, update: int, log: RunLog) -> dict[str, Any]:
        """Print the measures and draw prior, target and learned law; return the measures."""
        if self.solver is None or self.guided:
            measures = self._sampled(EVALUATION_SEED + self.setup.config.seed)
        else:
            measured = self.solver.measure(self.policy)
            measures = self._exact(self.solver, measured)
            if measured.off_grid > _MOST_OFF_GRID:
                reach = self.setup.config.env.reach
                console.print(
                    f"update {update}: the policy leaves the grid, {reach:.3g} to either side of 0, in "
                    f"{measured.off_grid:.3g} of its steps over labels: nothing is exact there."
                )
                return measures
            path = log.picture(update, "laws", draw_laws(self.solver, measured))
            console.print(f"update {update}: {path}")
        console.print(table(measures))
        return measures

    def measure(self, seed: int = EVALUATION_SEED) -> dict[str, Any]:
        """Return the measures under the names of `metrics.jsonl`; `seed` is of what has to be sampled."""
        if self.solver is None or self.guided:
            return self._sampled(seed)
        return self._exact(self.solver, self.solver.measure(self.policy))

    def _exact(self, solver: ExactSolver, measured: Measured) -> dict[str, Any]:
        lists = {
            "log_prob": measured.log_prob,
            "kl_nats": measured.kl,
            "objective": measured.objective,
            "best": solver.best,
            "best_gaussian": solver.best_gaussian,
            "log_z": solver.log_z,
            "gap_nats": measured.gap,
            "gap_gaussian_nats": solver.best_gaussian - measured.objective,
            "tv": measured.tv,
        }
        found: dict[str, Any] = {  # of the worst label
            "exact/gap_nats": float(measured.gap.max()),
            "exact/gap_gaussian_nats": float((solver.best_gaussian - measured.objective).max()),
            "exact/tv": float(measured.tv.max()),
            "exact/log_prob": float(measured.log_prob.mean()),  # over the labels, as the next three
            "exact/target_log_prob": float((solver.target * solver.log_prob).sum(1).mean()),
            "exact/width": float(
                (moments(measured.law, solver.points)[1] / self._deviation(solver)).mean()
            ),
            "exact/kl_nats": float(measured.kl.mean()),
        } | {f"exact/{name}_per_label": values.tolist() for name, values in lists.items()}
        if measured.off_grid > _MOST_OFF_GRID:
            found = dict.fromkeys(found)
        return found | {"exact/off_grid": measured.off_grid}

    def _deviation(self, solver: ExactSolver) -> Tensor:
        """Return the standard deviation of each label's target, `[K]`."""
        return moments(solver.target, solver.points)[1]

    def _sampled(self, seed: int) -> dict[str, Any]:
        """Return what rollouts tell of each label, from noise of their own."""
        actor = self.setup.make_guided(self.policy, self.reward, _SAMPLES, _AT_ONCE)
        lists: dict[str, list[float]] = {"log_prob": [], "kl_nats": [], "objective": [], "deviation": []}
        z: list[float] = []
        for label in range(self.reward.num_classes[0]):
            drawn = self._drawn(actor, label, seed)
            log_prob = float(drawn["log_prob"].mean())
            lists["log_prob"].append(log_prob)
            lists["deviation"].append(float(drawn["x_0"].std()))
            if "kl" in drawn:
                kl = float(drawn["kl"].mean())
                lists["kl_nats"].append(kl)
                lists["objective"].append(self.gamma * log_prob - kl)
            if "z" in drawn:
                z.append(float(drawn["z"].mean()))
        measures: dict[str, Any] = {"sampled/log_prob": fmean(lists["log_prob"]), "sampled/n": _SAMPLES}
        if self.solver is not None:
            ratio = torch.tensor(lists["deviation"]) / self._deviation(self.solver)
            target = (self.solver.target * self.solver.log_prob).sum(1).mean()
            measures |= {"sampled/width": float(ratio.mean()), "sampled/target_log_prob": float(target)}
            if z:
                measures["sampled/z_ratio"] = float((torch.tensor(z) / self.solver.log_z.exp()).mean())
        return measures | {f"sampled/{name}_per_label": values for name, values in lists.items() if values}

    def _drawn(self, actor: Guidance, label: int, seed: int) -> dict[str, Tensor]:
        """Return what is known of `_SAMPLES` points of a label, as many at a time as `actor` draws."""
        generator = torch.Generator(self.setup.device).manual_seed(seed)
        options = {"label": torch.full((actor.env.num_envs, 1), label)}
        reference = self.policy.reference
        known: dict[str, list[Tensor]] = {}
        for start in range(0, _SAMPLES, actor.env.num_envs // actor.population):
            trajectory = rollout(
                actor.env,
                actor,
                generator,
                reference=reference,
                seed=None if start else seed,
                options=options,
            )
            kept = actor.chosen(generator)
            part = {"log_prob": trajectory.reward[kept], "x_0": trajectory.latents[-1][kept]}
            if trajectory.kl is not None:
                part["kl"] = trajectory.kl.sum(0)[kept]
            log_z = actor.log_z_hat
            if log_z is not None and isinstance(self.setup.config.algo, Untrained):
                part["z"] = log_z.exp()
            for name, values in part.items():
                known.setdefault(name, []).append(values)
        return {name: torch.cat(parts)[:_SAMPLES] for name, parts in known.items()}


def table(measures: dict[str, Any]) -> Table:
    """Return the per-label measures as a table for the terminal."""
    short = {
        key.split("/")[-1].removesuffix("_per_label"): v for key, v in measures.items() if "_per_" in key
    }
    columns = {heading: short[name] for heading, name in _COLUMNS.items() if name in short}
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("label", *columns):
        shown.add_column(heading, justify="right")
    for label, row in enumerate(zip(*columns.values(), strict=True)):
        shown.add_row(str(label), *(f"{value:.4f}" for value in row))
    return shown


def draw_laws(solver: ExactSolver, measured: Measured) -> Image.Image:
    """Return the laws of x_0 as densities, one panel a label: prior, target, learned."""
    spacing = float(solver.points[1] - solver.points[0])
    curves = [
        [
            Curve("prior", solver.prior / spacing, _GREY, fill=True),
            Curve("target", target / spacing, _BLUE, fill=True),
            Curve("learned", law / spacing, _RED, dashed=True),
        ]
        for target, law in zip(solver.target, measured.law, strict=True)
    ]
    titles = [
        f"label {label}: gap {gap:.4f} nats, total variation {tv:.4f}"
        for label, (gap, tv) in enumerate(zip(measured.gap.tolist(), measured.tv.tolist(), strict=True))
    ]
    return densities(solver.points, curves, titles)
