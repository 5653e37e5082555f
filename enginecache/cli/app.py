"""The application: its commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from enginecache import __version__
from enginecache.cli import database, inspection, keeping, serving
from enginecache.errors import EngineCacheError


class _Commands(TyperGroup):
    """Turns the errors that are raised on purpose into two lines on standard error and their exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EngineCacheError as error:
            what, _, rest = str(error).partition("\n")
            print(f"error: {what}", *rest.splitlines(), sep="\n  ", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from interrupt

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """In the order of their first use, not of the alphabet."""
        return list(self.commands)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "A cache of TensorRT engines: `enginecache get model.onnx` prints the path of an engine that is right for this "
        "model, these shapes and options, this TensorRT and this GPU, and builds it where there is none.\n\n"
        "Exit codes: 0 ok, 1 unexpected failure, 2 usage or bad input, 3 not in the cache, 4 integrity findings, "
        "5 timed out waiting for another builder, 6 registry unavailable, 7 TensorRT refused or failed the build, "
        "8 no usable TensorRT or GPU, 130 interrupted."
    ),
)


def _print_version(value: bool) -> None:
    if value:
        print(f"enginecache {__version__}")
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
