"""A suite's numbers as charts: against what was spent, a setting, or one another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from diffrl import plot
from diffrl.benchmarks.suites import Suite
from diffrl.benchmarks.summary import SPENT, first_of, interval, over_seeds, several, spread
from diffrl.plot import Line

_PRICES = {
    "seconds a picture": "eval/seconds_per_image",
    "KL to the pretrained model (nats)": "eval/kl_nats",
    "prompt fidelity": "eval/prompt_fidelity",
}
_GAINS = ("prompt fidelity",)  # the price is what is lost of it


@dataclass(frozen=True)
class Chart:
    """What is drawn, and what is said of it."""

    title: str
    caption: str
    figure: Callable[..., Figure]
    data: tuple[Any, ...]  # the figure's arguments

    def picture(self) -> Image.Image:
        """Return it as a picture."""
        return plot.picture(self.figure, *self.data)

    def svg(self) -> str:
        """Return it as an SVG element."""
        return plot.svg(self.figure, *self.data)


def charts(suite: Suite, records: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Chart]:
    """Return what the numbers of a suite are enough for, the one that it is about first."""
    found = []
    for heading in suite.against:
        if panels := over_setting(suite, rows):
            said = "Mean over seeds at the end of training, with its 95% interval."
            found.append(Chart(f"Against {heading}", said, plot.sweep, (panels, heading)))
    if suite.curve and not suite.against and (panels := curves(suite, records)):
        (measure,) = suite.curve
        said = "Mean over seeds against what was spent on training, with its 95% interval."
        found.append(Chart("Learning", said, plot.learning, (panels, measure)))
    if len(records) == 1 and (measured := over_training(records[0].get("points", [{}]), suite.columns)):
        said = "What the run's evaluations measured."
        found.append(Chart("Training", said, plot.training, (measured, "pictures drawn", 3)))
    if panels := prices(rows):
        said = (
            "Up and left is better; mean over seeds with its 95% interval. A method whose steps have no "
            "density has no KL."
        )
        found.append(Chart("Control against its price", said, plot.frontier, (panels, "accuracy", _GAINS)))
    return found


def curves(suite: Suite, records: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Return the suite's measure against what was spent, one panel a currency, one line a row."""
    ((_, measures),) = suite.curve.items()
    panels: dict[str, list[Line]] = {}
    for heading, currency in SPENT.items():
        for row in suite.rows:
            mine = [r["points"] for r in records if r["row"] == row and "points" in r]
            runs = [[spread(point) for point in points] for points in mine]
            every = [point for points in runs for point in points]
            known = [m for m in several(measures) if all(isinstance(p.get(m), int | float) for p in every)]
            if not every or not known:
                continue
            measure = known[0]
            # one that stopped early (`patience`) has no say after it
            at = [{point["update"]: point for point in points} for points in runs]
            steps = [[points[u] for points in at] for u in sorted(set.intersection(*map(set, at)))]
            middle, half = zip(*(interval([p[measure] for p in step]) for step in steps), strict=True)
            name = f"spent/{currency}"
            spent = [over_seeds(name, [point[name] for point in step])[0] for step in steps]
            band = [h or 0.0 for h in half]
            panels.setdefault(heading, []).append(Line(row, spent, list(middle), band))
    return panels


def over_setting(suite: Suite, rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Return the suite's measures against the setting that its rows differ in, one panel a measure."""
    by_name = {row["method"]: row for row in rows}
    panels: dict[str, list[Line]] = {}
    for title, measures in suite.curve.items():
        for line, values in suite.lines().items():
            points = []
            for name, x in values.items():
                row = by_name.get(name, {})
                measure = first_of(measures, row)
                if measure in row:
                    points.append((x, row[measure], row[f"{measure}_ci95"] or 0.0))
            if points:
                panels.setdefault(title, []).append(Line(line, *zip(*sorted(points), strict=True)))
    return panels


def over_training(
    points: list[dict[str, Any]], columns: Mapping[str, str | list[str]]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return each of a run's measures against the pictures drawn, where two evaluations or more have it."""
    panels = {}
    for title, measures in columns.items():
        key = first_of(measures, points[-1])
        known = [point for point in points if isinstance(point.get(key), int | float)]
        if len(known) > 1:
            panels[title] = ([point["spent/pictures"] for point in known], [point[key] for point in known])
    return panels


def prices(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Return the accuracy of each row, with its interval, against what it costs, one panel a price."""
    panels: dict[str, list[Line]] = {}
    for title, price in _PRICES.items():
        points = [
            Line(row["method"], [row[price]], [row["eval/accuracy"]], [row["eval/accuracy_ci95"] or 0.0])
            for row in rows
            if price in row and "eval/accuracy" in row
        ]
        if len({line.x[0] for line in points}) > 1:  # or all pay the same, if not one alone
            panels[title] = points
    return panels
