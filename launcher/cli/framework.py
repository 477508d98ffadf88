"""What is made of typer here: plain help texts, and one form for every error, also as JSON."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from alignkd.errors import AlignkdError, UserError, raise_if_passing, report_error

F = TypeVar("F", bound=Callable[..., Any])

# The order in which a user comes to need the commands.
ORDER = (
    *(
        "init",
        "plan",
        "cache",
        "launch",
        "status",
        "wait",
        "logs",
        "stop",
        "resume",
        "cancel",
        "list",
        "ckpt",
    ),
    *("export", "eval", "report", "chat", "probe", "sample-data", "drill", "explain"),
)


class Command(TyperCommand):
    def get_help(self, ctx: Any) -> str:
        """``RUN`` instead of typer's ``{RUN}`` and ``RUN <path>``; columns stay aligned."""
        text = re.sub(r"\{([A-Z]+)\}", r"\1", super().get_help(ctx))
        return re.sub(r"^(  [A-Z]+)( <[a-z ]+>)", lambda m: m[1] + " " * len(m[2]), text, flags=re.MULTILINE)


class Commands(typer.Typer):
    """Commands of one module; `app` puts them together."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        return super().command(name, **{"cls": Command, **settings})


class Root(TyperGroup):
    """The command ``alignkd``: errors are one message and an exit code, never a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def main(self, args: Sequence[str] | None = None, *_: Any, **settings: Any) -> NoReturn:
        words = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(words, **{**settings, "prog_name": "alignkd", "standalone_mode": False})
        except Exception as error:
            code = _report(error, as_json="--json" in words)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, as_json: bool) -> int:
    """Show an error of the user, and return the exit code. Anything else is a bug, and is raised again."""
    shown = _as_user_error(error)
    if shown is None:
        raise error
    code = report_error(shown) if str(shown) else shown.exit_code
    if as_json:
        print(json.dumps({"error": str(shown), "code": code}))
    return code


def _as_user_error(error: Exception) -> AlignkdError | None:
    if isinstance(error, AlignkdError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return _file_error(error)
    if not hasattr(error, "format_message"):  # of typer's own errors, which come from a copy of click
        return None
    ctx: Any = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(ctx.get_help(), file=sys.stderr)
        return UserError("")
    option = getattr(error, "option_name", None)
    unknown = type(error).__name__ == "NoSuchOption" and option is not None
    message = (
        f"{option}: no such option{_meant(str(option), ctx)}" if unknown else str(error.format_message())
    )
    path = ctx.command_path if ctx is not None else "alignkd"
    return UserError(f"{message.rstrip('.')}\nsee: {path} --help")


def _meant(option: str, ctx: Any) -> str:
    """Options that begin with what was typed come first: --gpu means --gpus-per-node, not --cpu."""
    known = [name for parameter in ctx.command.params for name in parameter.opts if name.startswith("--")]
    close = [name for name in known if name.startswith(option)] or difflib.get_close_matches(option, known)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _file_error(error: OSError) -> AlignkdError:
    """For file errors that no command explained better: a forbidden folder, a full disk, a dead server."""
    try:
        raise_if_passing(error, error.filename)
    except AlignkdError as passing:
        return passing
    return UserError(f"{error.filename}: {error.strerror}")
