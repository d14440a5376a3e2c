"""The settings as people read them: name, value, and the comment beside the field as its line of help.

The dataclasses are the one place for all three: `diffrl train --help`, shell completion and the pages of
the documentation are made of what is returned here.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from diffrl import config, settings_file
from diffrl.config import GROUPS, Config, LoRA
from diffrl.log import console, print_wide

_WIDEST_WORD = 40  # characters in a terminal; a longer word, such as a path, is cut


class Setting(NamedTuple):
    """A word of the command line, `key=value`, and what it means."""

    key: str
    value: str
    help: str


class Section(NamedTuple):
    """The settings of one component."""

    title: str
    summary: str
    others: list[str]  # that could be chosen in its place
    settings: list[Setting]


def show(words: list[str]) -> None:
    """Print every setting of what `words` choose, with its value, component by component."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, max_width=_WIDEST_WORD if console.is_terminal else None)
    table.add_column()
    for title, line, others, found in sections(words):
        choice = f" Or {', '.join(others)}." if others else ""
        table.add_row()
        table.add_row(Text(title, "bold"), Text(line) + Text(choice, "dim"))
        for key, value, said in found:
            word = Text.assemble("  ", (key, "cyan"), "=", (value, "green"))
            table.add_row(word, Text(said))
    (console.print if console.is_terminal else print_wide)(table)


def sections(words: list[str]) -> Iterator[Section]:
    """Yield what is chosen of each group, then the adapters, then what belongs to the run itself."""
    chosen = config.composed(words)
    for group, known in GROUPS.items():
        kind = _kind(chosen[group])
        name = config.name_of(group, kind)
        others = [other for other in known if other != name]
        yield Section(f"{group}={name}", summary(kind), others, settings(chosen[group], f"{group}."))
    yield Section("policy", summary(LoRA), [], settings(chosen.policy, "policy."))
    own = [one for one in settings(chosen) if one.key.partition(".")[0] not in (*GROUPS, "policy")]
    yield Section("the run", summary(Config), [], own)


def settings(tree: DictConfig, prefix: str = "") -> list[Setting]:
    """Return the settings of a component, those of components within it at their place."""
    found, lines = [], comments(_kind(tree))
    for key in map(str, tree):
        if isinstance(tree[key], DictConfig):
            found += settings(tree[key], f"{prefix}{key}.")
        elif key != "defaults":  # Hydra's list of them
            found.append(Setting(prefix + key, _typed(tree[key]), lines.get(key, "")))
    return found


def summary(kind: type) -> str:
    """Return the first line of a component's docstring."""
    return (kind.__doc__ or "").partition("\n")[0]


def comments(kind: type) -> dict[str, str]:
    """Return the comment beside or above each field of a dataclass; its base's where it has none itself."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # made while the program runs: its bases have the source
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        said = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        alone = {line for line, token in said.items() if token.line.lstrip().startswith("#")}
        (node,) = ast.parse(source).body
        assert isinstance(node, ast.ClassDef)
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                first = part.lineno
                while first - 1 in alone:
                    first -= 1
                lines = range(first, (part.end_lineno or part.lineno) + 1)
                words = [said[line].string.lstrip("# ") for line in lines if line in said]
                found |= {part.target.id: " ".join(words)} if words else {}
    return found


def _kind(tree: DictConfig) -> type:
    kind = OmegaConf.get_type(tree)
    assert kind is not None
    return kind


def _typed(value: object) -> str:
    """Return a value as it is typed on the command line, without blanks between the items of a list."""
    values = settings_file.plain(OmegaConf.to_container(OmegaConf.create([value])))
    return yaml.safe_dump(values, default_flow_style=True, width=float("inf"))[1:-2].replace(", ", ",")
