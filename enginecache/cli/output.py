"""The one sink for results: standard output is data, standard error is everything else."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enginecache.cli.streams import UnwrittenError, write_all
from enginecache.errors import EngineCacheError, printable
from enginecache.files.os_errors import describe_os_error
from enginecache.files.units import format_size, time_json

Kind = Literal["text", "number", "word", "key", "size", "seconds", "age"]
"""Ways in which a terminal shows a value; only ``text`` may be folded."""

WIDE = 120
"""Width in characters from which a terminal shows the columns that are marked as wide."""
READABLE = 20
"""Width in characters below which no text is folded to make room for another column."""
_GAP = 2


@dataclass(frozen=True)
class Column:
    """One column of a listing.

    Attributes:
        name: Heading.
        kind: How a terminal shows its values; a pipe gets them in full.
        is_wide: Whether only a wide terminal shows it.
        rank: Of the columns that do not fit on a terminal, that of the highest rank is left out first; None is always
            shown.
    """

    name: str
    kind: Kind = "text"
    is_wide: bool = False
    rank: int | None = None


def put(text: str, *, is_answer: bool = False) -> None:
    """Write to standard output, and make sure that it arrives.

    Characters that the encoding lacks are written as escapes; undecodable bytes of a path stay as they are. A reader
    that closes the pipe has read enough: that changes neither what a command does nor its exit code.

    Args:
        text: What to write.
        is_answer: Whether this is the one line that the command was asked for: then a closed pipe is an error.

    Raises:
        EngineCacheError: It cannot be written.
    """
    try:
        sys.stdout.flush()
        try:
            descriptor = sys.stdout.fileno()
        except (OSError, ValueError):  # no file, as where this runs inside another program
            sys.stdout.buffer.write(encoded(text))
        else:
            write_all(descriptor, encoded(text))
    except UnwrittenError as error:
        failure = unwritten(error, is_answer=is_answer)
        if failure is not None:
            raise failure from error


def unwritten(error: UnwrittenError, *, is_answer: bool) -> EngineCacheError | None:
    """Give up standard output, and return the error to raise for data that was not written; None for none.

    Args:
        error: Why it was not written.
        is_answer: As for :func:`put`.
    """
    # What is printed from now on goes nowhere, and so does what is left in a buffer, which the interpreter would write
    # at its end, and fail aloud.
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if not isinstance(error.cause, BrokenPipeError):
        what, _ = describe_os_error(error.cause, "standard output cannot be written")
        return EngineCacheError(what, "Redirect it to a file or pipe that can be written and has space.")
    if not is_answer:
        return None
    message = "standard output was closed before the answer was written to it"
    return EngineCacheError(message, "Let the program that reads it run until then.")


def encoded(text: str) -> bytes:
    """Return the bytes of ``text`` in the encoding of standard output."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        return text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace")


def print_line(text: object) -> None:
    """Print one line of text."""
    put(f"{printable(text)}\n")


def print_path(path: Path) -> None:
    """Print one path, unchanged, so that it names the file; escaped on a terminal, which only people read."""
    put(path_line(path), is_answer=True)


def path_line(path: Path) -> str:
    """Return a path as it is printed."""
    return f"{printable(path) if sys.stdout.isatty() else path}\n"


def print_json(value: Any) -> None:
    """Print one JSON value: raw numbers, RFC 3339 times, ASCII in every locale."""
    put(json_line(value))


def json_line(value: Any) -> str:
    """Return a JSON value as it is printed."""
    return json.dumps(value, indent=2 if sys.stdout.isatty() else None) + "\n"


def print_rows(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on a terminal; on a pipe one line a row, with full, tab-separated values and no heading."""
    if not sys.stdout.isatty():
        put("".join("\t".join(map(_plain, row)) + "\n" for row in rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[_shown(column.kind, value) for column, value in zip(columns, row, strict=True)] for row in rows]
    shown = _fitting(columns, cells, Console().width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (columns[index] for index in shown):
        justify: Literal["left", "right"] = "right" if column.kind in {"size", "seconds"} else "left"
        # A long name is folded, never cut: it may be what tells two models apart.
        table.add_column(column.name.upper(), justify=justify, no_wrap=column.kind != "text", overflow="fold")
    for row in cells:
        # Text, not str: a model's name may look like markup.
        table.add_row(*(Text(row[index]) for index in shown))
    console = Console()
    with console.capture() as captured:
        console.print(table)
    put(captured.get())


def _fitting(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the indexes of the columns that a terminal of ``width`` characters shows, none of them cut."""
    from rich.cells import cell_len

    def least(index: int) -> int:
        longest = max((cell_len(row[index]) for row in cells), default=0)
        return max(len(columns[index].name), min(longest, READABLE) if columns[index].kind == "text" else longest)

    shown = [index for index, column in enumerate(columns) if width >= WIDE or not column.is_wide]
    while sum(map(least, shown)) + _GAP * (len(shown) - 1) > width:
        ranked = [(rank, index) for index in shown if (rank := columns[index].rank) is not None]
        if not ranked or len(shown) == 1:
            break
        shown.remove(max(ranked)[1])
    return shown


def key_facts(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return a key's fields as :func:`flat_facts` does, compute capabilities as ``8.9``."""
    target = fields.get("target") or {}
    capabilities = target.get("compute_capabilities")
    if isinstance(capabilities, list):
        texts = [".".join(map(str, one)) if isinstance(one, list) else str(one) for one in capabilities]
        fields = {**fields, "target": {**target, "compute_capabilities": texts}}
    return flat_facts(fields)


def print_facts(facts: Sequence[tuple[str, Any]]) -> None:
    """Print names and values in two columns on a terminal; on a pipe tab-separated, with raw values."""
    if sys.stdout.isatty():
        width = max(len(name) for name, _ in facts)
        lines = [f"{printable(name):<{width}}  {_shown(_kind(name), value)}" for name, value in facts]
    else:
        lines = [f"{printable(name)}\t{_plain(value)}" for name, value in facts]
    put("".join(f"{line}\n" for line in lines))


def flat_facts(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return a JSON value as pairs of a dotted name and a value; a list of plain values is one value."""
    if isinstance(value, dict) and value:
        return [fact for key, item in value.items() for fact in flat_facts(item, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [fact for index, item in enumerate(value) for fact in flat_facts(item, f"{name}[{index}]")]
    return [(name, value)]


def _kind(name: str) -> Kind:
    """Read the kind from the unit in the name."""
    return "size" if name.endswith("size_bytes") else "seconds" if name.endswith("_seconds") else "text"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dt.datetime):
        return time_json(value) or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(printable(item) if isinstance(item, str | int) else json.dumps(item) for item in value)
    return printable(value)


def _shown(kind: Kind, value: Any) -> str:
    if value is None:
        return ""
    if kind == "number":
        return f"{value:.3g}" if isinstance(value, float) else _plain(value)
    show = _SHOWN.get(kind)
    return _plain(value) if show is None else show(value)


def format_age(time: dt.datetime) -> str:
    """Return how long ago a time is, for display."""
    seconds = (dt.datetime.now(dt.timezone.utc) - time).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "just now"


_SHOWN: dict[Kind, Callable[[Any], str]] = {
    "key": lambda value: printable(value)[:12],
    "size": format_size,
    "seconds": "{:.1f} s".format,
    "age": format_age,
}


def count(number: int, what: str) -> str:
    """Return ``1 engine``, ``2 engines``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def say(*lines: str) -> None:
    """Print lines to standard error, with control characters escaped; ignore errors of writing."""
    with contextlib.suppress(OSError):
        print("\n".join(map(printable, lines)), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    say(f"warning: {text}")
