"""What was measured, as lines in the terminal."""

from typing import Any

from rich.table import Table

from diffrl.evaluate import label_name
from diffrl.log import console
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.types import Reward, every_label


def show(measures: dict[str, Any], reward: Reward) -> None:
    """Print what `evaluate` measured with `reward`."""
    said = [f"reward {measures['reward_mean']:.3f} +- {measures['reward_std']:.3f}"]
    if isinstance(reward, LogLikelihood):
        console.print(_control_table(measures, reward))
        said = [f"accuracy {measures['accuracy']:.3f}, macro F1 {measures['macro_f1']:.3f}"]
        for attribute in reward.attributes if len(reward.attributes) > 1 else ():
            accuracy, f1 = (measures[f"{attribute.name}/{name}"] for name in ("accuracy", "macro_f1"))
            console.print(f"{attribute.measure.title} alone: accuracy {accuracy:.3f}, macro F1 {f1:.3f}")
        said += [f"log p {measures['mean_logp']:.2f}"]
    if measures["kl_nats"] is not None:
        said += [f"KL {measures['kl_nats']:.1f} nats"]
    if "prompt_fidelity" in measures:
        said += [f"prompt fidelity {measures['prompt_fidelity']:.3f}"]
    for name in ("diversity", "brisque", "clip_score"):
        if isinstance(measures[name], float):
            said += [f"{name} {measures[name]:.3g}"]
    console.print(", ".join(said))
    statistics = ("edge_density", "saturation", "brightness", "colour_entropy")
    console.print(", ".join(f"{name.replace('_', ' ')} {measures[name]:.3g}" for name in statistics))
    asked = measures["reward_calls_per_image"]
    calls = f"{measures['nfe_per_image']:.0f} network calls" + (
        f", {asked:.0f} reward calls" if asked else ""
    )
    console.print(f"{measures['n']} pictures, {calls} and {measures['seconds_per_image']:.3f} s a picture")


def control_rows(measures: dict[str, Any], reward: LogLikelihood) -> list[list[str]]:
    """Return headings and a row a label: what it asks for, how often it is obeyed, objective in nats."""
    titles = [attribute.measure.title for attribute in reward.attributes]
    rows = [["label", *titles, "accuracy", "J", "log Z", "its ESS", "gap (nats)"]]
    bounds = [attribute.measure.bounds(attribute.edges) for attribute in reward.attributes]
    for number, label in enumerate(every_label(reward.num_classes)):
        classes = reward.split(label[None])[0].tolist()
        asked = [words[y] for words, y in zip(bounds, classes, strict=True)]
        formats = {"objective": ".2f", "log_z": ".2f", "log_z_ess": ".0f", "gap": ".2f"}
        known = []
        for key, form in formats.items():
            value = measures[key][number] if measures.get(key) else None
            known.append("-" if value is None else f"{value:{form}}")
        rows.append([label_name(label), *asked, f"{measures['per_class'][number]:.3f}", *known])
    return rows


def _control_table(measures: dict[str, Any], reward: LogLikelihood) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    headings, *rows = control_rows(measures, reward)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
