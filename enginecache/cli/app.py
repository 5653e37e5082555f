"""The application: its commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from enginecache import __version__
from enginecache.cli import database, inspection, keeping, serving
from enginecache.cli.output import print_line, say, warn
from enginecache.config import unknown_variables
from enginecache.errors import EngineCacheError


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns the errors that are raised on purpose into lines on standard error and their exit code."""
    try:
        yield
    except EngineCacheError as error:
        what, *rest = str(error).splitlines()
        say(f"error: {what}", *(f"  {line}" for line in rest))
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as interrupt:
        say("interrupted")
        raise typer.Exit(130) from interrupt


class _Commands(TyperGroup):
    """The commands, with one way for all their errors."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        for text in unknown_variables():
            warn(text)
        with _told():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """In the order of their first use, not of the alphabet."""
        return list(self.commands)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    help=(
        "A cache of TensorRT engines: `enginecache get model.onnx` prints the path of an engine that is right for this "
        "model, these shapes and options, this TensorRT and this GPU, and builds it where there is none.\n\n"
        "Exit codes: 0 ok, 1 unexpected failure, 2 usage or bad input, 3 not in the cache, 4 integrity findings, "
        "5 timed out waiting for another builder, 6 registry unavailable, 7 TensorRT refused or failed the build, "
        "8 no usable TensorRT or GPU, 130 interrupted.\n\n"
        "\b\nExamples:\n  enginecache get model.onnx --dim batch=1:32:64\n  enginecache doctor"
    ),
)


def _print_version(value: bool) -> None:
    if value:
        print_line(f"enginecache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Holds the options of no command."""


serving.register(app)
inspection.register(app)
keeping.register(app)
database.register(app)
