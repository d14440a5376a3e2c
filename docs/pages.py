"""What the pages take from elsewhere, so that nothing is told twice; MkDocs calls it while it builds.

A page asks for it in a comment of its own line:

    <!-- readme: HEADING -->        that section of the README; the whole README without HEADING
    <!-- settings: algo=ddpo -->    of the first word's component, with the defaults of all words
    <!-- settings: policy -->       those of the adapters, or of 'run'
    <!-- choices: presets -->       what can be chosen
    <!-- commands: all -->          the usage of each

Links are those of the repository, where the pages can be read too; on the site a file of the project lies
at its path from the root, beside the pages.
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

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
README = ROOT / "README.md"
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages, and the files they link to, show or offer for download."""
    pages = [README, *DOCS.rglob("*.md")]
    for page in pages:
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            if not path.is_relative_to(DOCS) and files.get_file_from_path(_site_path(path)) is None:
                if not path.is_file():
                    raise PluginError(f"{page}: {target} is no file.")
                files.append(File.generated(config, _site_path(path), abs_src_path=str(path)))
                pages += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put in what the comments ask for, and lead the page's own links to where the site has their files."""
    makers = {"readme": _readme, "settings": _settings, "choices": _choices, "commands": _commands}

    def put(match: re.Match[str]) -> str:
        return makers[match[1]](match[2].strip(), page.file.src_uri)

    own = _led(markdown, Path(page.file.abs_src_path), page.file.src_uri)
    return re.sub(rf"^<!-- ({'|'.join(makers)}):(.*?)-->$", put, own, flags=re.MULTILINE)


def _readme(heading: str, page: str) -> str:
    """Return the README, or a section's text, with its links as from the page."""
    text = README.read_text(encoding="utf-8")
    if heading:
        parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
        sections = dict(zip(parts[1::2], parts[2::2], strict=True))
        if heading not in sections:
            raise PluginError(
                f"{page}: the README has no section {heading!r}; it has {', '.join(sections)}"
            )
        text = sections[heading]
    return _led(text, README, page).strip()


def _led(text: str, source: Path, page: str) -> str:
    """Return a file's text with its links as from a page of the site."""
    folder = Path(page).parent.as_posix()
    return _LINK.sub(lambda match: relpath(_site_path((source.parent / match[1]).resolve()), folder), text)


def _settings(text: str, page: str) -> str:
    """Return a table of names, defaults and lines of help."""
    words = text.split()
    wanted = {"policy": "policy", "run": "the run"}.get(words[0], words[0])
    chosen = [] if wanted != words[0] or wanted == "policy" else words
    titles = (wanted, f"{wanted.partition('=')[0]}=custom")  # what is made of others is named so
    (section,) = (one for one in help.sections(chosen) if one.title in titles)
    rows = [
        f"| `{key}` | `{value.replace(f'{ROOT}/', '')}` | {_cell(said)} |"
        for key, value, said in section.settings
        if not key.endswith(".chosen_by")  # nobody sets it
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


def _site_path(path: Path) -> str:
    """Return where on the site a file of the project lies."""
    if path == README:
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def _cell(text: str) -> str:
    return re.sub(r"([|<*_])", r"\\\1", text)
