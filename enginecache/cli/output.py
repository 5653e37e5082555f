"""The one sink for results: standard output is data, standard error is everything else."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enginecache.entry import time_json
from enginecache.options import format_size


@dataclass(frozen=True)
class Column:
    """One column of a listing.

    Attributes:
        name: Heading, and name in the JSON record.
        kind: How a terminal shows it.
    """

    name: str
    kind: str = "text"


def print_json(value: Any) -> None:
    """One JSON value: raw numbers, RFC 3339 times."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def print_rows(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; on a pipe a line each with full, tab-separated values and no heading."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(_plain(value) for value in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.name.upper(), justify="right" if column.kind in {"size", "seconds"} else "left")
    for row in rows:
        # Text, not str: a model's name may look like markup.
        table.add_row(*(Text(_shown(column, value)) for column, value in zip(columns, row, strict=True)))
    Console(soft_wrap=False).print(table)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dt.datetime):
        return time_json(value) or ""
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("\t", " ").replace("\n", " ")


def _shown(column: Column, value: Any) -> str:
    if value is None:
        return ""
    if column.kind == "key":
        return str(value)[:12]
    if column.kind == "size":
        return format_size(value)
    if column.kind == "seconds":
        return f"{value:.1f} s"
    if column.kind == "age":
        return format_age(value)
    return _plain(value)


def format_age(time: dt.datetime) -> str:
    """How long ago, for people."""
    seconds = (dt.datetime.now(dt.timezone.utc) - time).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def say(text: str) -> None:
    """Talk, on standard error."""
    print(text, file=sys.stderr)


def warn(text: str) -> None:
    """A warning, on standard error."""
    print(f"warning: {text}", file=sys.stderr)
