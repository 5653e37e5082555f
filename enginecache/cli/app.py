"""The application: its commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from enginecache import __version__
from enginecache.cli import check, database, exchange, get, inspect, manage
from enginecache.cli.error_report import report_error, report_usage
from enginecache.cli.main import report_unwritten
from enginecache.cli.output import print_line, warn
from enginecache.cli.streams import UnwrittenError
from enginecache.config import unknown_variables

LIKE = 0.6
"""Least likeness of an option to what was typed for it to be suggested: 1 is equal, 0 has nothing in common."""


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turns every exception into its report and its exit code; the parser shows its own errors."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError, SystemExit, GeneratorExit):
        raise
    except UnwrittenError as error:  # of what the parser prints itself, such as the help
        raise typer.Exit(report_unwritten(error, is_answer=False)) from error
    except BaseException as error:  # a panic of BLAKE3's is no Exception
        if hasattr(error, "format_message"):  # an error of the parser, whichever class of it
            _correct_hint(error)
            report_usage(error.format_message(), sys.argv[1:])
            raise
        raise typer.Exit(report_error(error, sys.argv[1:])) from error


def _correct_hint(error: Any) -> None:
    """Keep only suggestions that a typing error explains: the parser's take the dashes for a likeness.

    And only the words of a message that say something: Pydantic's begin with "Value error".
    """
    error.message = error.message.replace("Value error, ", "")
    possibilities, name = getattr(error, "possibilities", None), getattr(error, "option_name", "")
    if possibilities:
        word = name.lstrip("-")
        likeness = {option: SequenceMatcher(None, word, option.lstrip("-")).ratio() for option in possibilities}
        error.possibilities = [option for option in possibilities if likeness[option] >= LIKE]


class _Commands(TyperGroup):
    """The commands, with one way for all their errors."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        for text in unknown_variables():
            warn(text)
        with _reported():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """List the commands in the order of their first use, not of the alphabet."""
        return list(self.commands)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    help=(
        "A cache of TensorRT engines: `enginecache get model.onnx` prints the path of an engine that is right for this "
        "model, these shapes and options, this TensorRT and this GPU, and builds it if none is stored.\n\n"
        "Exit codes: 0 ok, 1 unexpected failure, 2 usage or bad input, 3 not in the cache, 4 integrity findings, "
        "5 timed out waiting for another builder, 6 registry unavailable, 7 TensorRT refused or failed the build, "
        "8 no usable TensorRT or GPU, 9 the engine failed its check, 130 interrupted.\n\n"
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


get.register(app)
check.register(app)
inspect.register(app)
manage.register(app)
exchange.register(app)
database.register(app)
