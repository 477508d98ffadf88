"""Quoting of every value in a job script: shell words and ``#SBATCH`` lines follow different rules."""

from __future__ import annotations

import re
import shlex

from alignkd.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@=,+%-]+")


def shell_word(value: str) -> str:
    """One word of a shell command. Control characters are refused: no path or name needs them."""
    return shlex.quote(_refuse_control(value))


def sbatch_word(value: str) -> str:
    """One word of an ``#SBATCH`` line, where a backslash escapes even in quotes and # starts a comment."""
    _refuse_control(value)
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _refuse_control(value: str) -> str:
    if _CONTROL.search(value):
        raise UserError(f"{value!r}: job scripts cannot hold control characters such as newlines")
    return value
