"""How every command talks: results on stdout, notices on stderr, our errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autodecouple.errors import AutodecoupleError, InputError
from autodecouple.view.summary import Summary
from autodecouple.view.text import render

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]  # generic since click 8.4 only
else:
    _ParamType = click.ParamType


class ErrorGroup(click.Group):
    """Commands whose AutodecoupleError is a line on stderr and exit 1; errors of user code keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutodecoupleError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(130)


class Parsed(_ParamType):
    """A value read by `parse`, whose InputError becomes a usage error with the same words."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), param, ctx)


def options(*given: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, shown in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def show(summary: Summary) -> None:
    """On stdout, in colour where someone looks and NO_COLOR is not set."""
    click.echo(render(summary, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))


def say(line: str) -> None:
    """On stderr, unless --quiet."""
    if not _quiet():
        click.echo(line, err=True)


def write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(path), error.strerror or str(error)) from error
    say(f"wrote {path}")


@contextlib.contextmanager
def busy(message: str) -> Iterator[None]:
    """A spinner where someone watches; what user code prints goes to stderr, so that stdout holds the result only."""
    with contextlib.ExitStack() as stack:
        if sys.stderr.isatty() and not _quiet():
            from rich.console import Console

            stack.enter_context(Console(stderr=True).status(message))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _quiet() -> bool:
    return bool(click.get_current_context().find_root().params.get("quiet"))
