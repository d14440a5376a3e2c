"""What the pages take from elsewhere, so that nothing is told twice; MkDocs calls it while it builds.

A page asks for it in a comment of its own line:

    <!-- readme: HEADING -->        that section of the README; what is before them all without HEADING
    <!-- settings: algo=ddpo -->    of the first word's component, with the defaults of all words
    <!-- settings: policy -->       those of the adapters, or of 'run'
    <!-- choices: presets -->       what can be chosen
    <!-- commands: all -->          the usage of each
"""

import argparse
import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from diffrl import config, help
from diffrl.cli import commands, parser

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)]+)(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add what the README, and a page it links to, show or offer for download."""
    pages = [README]
    for page in pages:
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            name = _site_path(target) if page == README else path.relative_to(ROOT).as_posix()
            if path.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
                pages += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put in what the comments ask for."""
    makers = {"readme": _readme, "settings": _settings, "choices": _choices, "commands": _commands}

    def put(match: re.Match[str]) -> str:
        return makers[match[1]](match[2].strip(), page.file.src_uri)

    return re.sub(rf"^<!-- ({'|'.join(makers)}):(.*?)-->$", put, markdown, flags=re.MULTILINE)


def _readme(heading: str, page: str) -> str:
    """Return a section's text; its links lead from the page to where `on_files` puts their files."""
    parts = re.split(r"^## (.*)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    if heading not in sections:
        raise PluginError(f"{page}: the README has no section {heading!r}; it has {', '.join(sections)}")
    body = sections[heading].removeprefix("# diffrl\n")

    def lead(match: re.Match[str]) -> str:
        target = "benchmarks.md" if (ROOT / match[1]).is_dir() else _site_path(match[1])
        return relpath(target, Path(page).parent.as_posix())

    return _LINK.sub(lead, body).strip()


def _settings(text: str, page: str) -> str:
    """Return a table of names, defaults and lines of help."""
    words = text.split()
    wanted = {"policy": "policy", "run": "the run"}.get(words[0], words[0])
    chosen = [] if wanted != words[0] or wanted == "policy" else words
    (section,) = (one for one in help.sections(chosen) if one.title == wanted)
    rows = [
        f"| `{key}` | `{value.replace(f'{ROOT}/', '')}` | {_cell(said)} |"
        for key, value, said in section.settings
    ]
    if not rows:
        return "No settings."
    return "\n".join(["| setting | default | |", "| --- | --- | --- |", *rows])


def _choices(group: str, page: str) -> str:
    """Return what can be chosen, a line each."""
    if group == "presets":
        known = {f"+experiment={name}": line for name, line in config.experiments().items()}
    else:
        known = {f"{group}={name}": help.summary(kind) for name, kind in config.GROUPS[group].items()}
    rows = [f"| `{word}` | {_cell(line)} |" for word, line in known.items()]
    return "\n".join(["| choice | |", "| --- | --- |", *rows])


def _commands(_: str, page: str) -> str:
    """Return a section with the usage of each command."""
    sections = []
    for name, command in commands(parser()).items():
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=84)
        usage = command.format_help().replace(f"{command.description}\n\n", "").strip()
        sections.append(f"## diffrl {name}\n\n{command.description}\n\n```text\n{usage}\n```")
    return "\n\n".join(sections)


def _site_path(target: str) -> str:
    """Return where on the site what the README links to lies."""
    return target.removeprefix("docs/")


def _cell(text: str) -> str:
    return re.sub(r"([|<*_])", r"\\\1", text)
