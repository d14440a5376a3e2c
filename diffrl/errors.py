"""Errors a user can cause, and the words they are told in."""

import difflib
from collections.abc import Collection


class DiffRLError(Exception):
    """A mistake in what the user asked for: shown as one line, exit code 2, without a traceback."""


def unknown(kind: str, name: object, known: Collection[str]) -> DiffRLError:
    """Return the error for `kind=name` when `name` is none of `known`, with the nearest one."""
    names = sorted(known)
    return DiffRLError(f"{kind}={name}: no such {kind}.{_nearest(name, names)} Known: {', '.join(names)}.")


def unknown_setting(key: str, known: Collection[str]) -> DiffRLError:
    """Return the error for a setting `key` that is none of `known`, with the nearest and its siblings."""
    parent = key.rpartition(".")[0]
    siblings = sorted(name for name in known if name.rpartition(".")[0] == parent)
    listed = f" Known: {', '.join(siblings)}." if siblings else ""
    return DiffRLError(f"{key}: no such setting.{_nearest(key, known)}{listed}")


def first_line(error: Exception) -> str:
    """Return the first line of what a library's error says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _nearest(name: object, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
