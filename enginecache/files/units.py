"""Parse and format sizes, durations and times."""

from __future__ import annotations

import datetime as dt
import re

from enginecache.errors import OptionError

MIB = 1 << 20
DAY_S = 86400.0
LONGEST_S = 36525 * DAY_S
"""Longest duration, a hundred years: longer ones overflow dates and time-outs."""

WRONG_CLOCK_S = 60.0
"""A failure dated further in the future than this was written by a wrong clock.

A smaller difference is a clock that was adjusted, or another container's: the failure still counts. A failure from the
far future would count for as long as the clock was wrong; ignoring it costs one build at most.
"""

_SIZE = re.compile(r"(?P<number>\d{1,19}(?:\.\d{1,9})?)\s*(?P<unit>[kmgt]i?b?|b)?", re.IGNORECASE | re.ASCII)
_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MAX_BYTES = 1 << 62
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d|)", re.ASCII | re.IGNORECASE)
_DURATION_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}


def parse_size(text: str, bare_unit: str = "b") -> int:
    """Read a size in bytes: ``1GiB``, ``512M``, ``65536``. All units are powers of 1024.

    Args:
        text: The size.
        bare_unit: Unit of a number without one: ``b`` or ``m``.

    Raises:
        OptionError: The text is not a size, or one of bits (``1Gb``), or more than 4 EiB.
    """
    match = _SIZE.fullmatch(text.strip())
    advice = f"Write it as 1GiB, 512MiB or a number of {'MiB' if bare_unit == 'm' else 'bytes'}."
    if match is None:
        raise OptionError(f"{shortened(text)} is not a size", advice)
    unit = match["unit"] or bare_unit
    if len(unit) > 1 and unit.endswith("b") and unit[0].isupper():
        meant = f"{match['number']}{unit[0]}iB"
        raise OptionError(
            f"{shortened(text)} is not a size in bytes: {unit} is a unit of bits", f"Write it as {meant}."
        )
    factor = _SIZE_UNITS[unit.lower()[:1]]
    size = int(float(match["number"]) * factor) if "." in match["number"] else int(match["number"]) * factor
    if size > MAX_BYTES:
        raise OptionError(f"{shortened(text)} is not a size: it is more than 4 EiB", advice)
    return size


def parse_workspace(text: str) -> int:
    """Read a workspace limit in bytes. A number without a unit counts MiB, as trtexec's ``--memPoolSize`` does.

    Raises:
        OptionError: The text is not a size.
    """
    return parse_size(text, bare_unit="m")


def parse_limit(text: str) -> int:
    """Read the size limit of a cache. A small number without a unit is refused: its unit was probably forgotten.

    Raises:
        OptionError: The text is not a size, or has no unit.
    """
    size_bytes = parse_size(text)
    if 0 < size_bytes < MIB and text.strip().isdigit():
        raise OptionError(
            f"{text!r} is a number of bytes, less than any engine has", f"Add the unit: {text.strip()}GiB."
        )
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Format a size for display: ``1.0 GiB``, ``512 KiB``. Not for ``--json``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_duration_s(text: str) -> float:
    """Read ``30m``, ``45s``, ``2h``, ``30d`` or a number of seconds.

    Raises:
        OptionError: The text is not a duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        message = f"{shortened(text)} is not a duration"
        raise OptionError(message, "Write it as 30m, 45s, 2h, 30d or a number of seconds.")
    seconds = float(match["number"]) * _DURATION_UNITS[match["unit"].lower()]
    if seconds > LONGEST_S:
        raise OptionError(f"{shortened(text)} is a duration of more than a hundred years", "Write a shorter one.")
    return seconds


def format_duration(seconds: float) -> str:
    """Format a duration for display, in the largest unit of which there are two: ``48 min``. Not for ``--json``."""
    for unit_s, unit in ((DAY_S, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def utc_now() -> dt.datetime:
    """Return the time, aware, in UTC."""
    return dt.datetime.now(dt.timezone.utc)


def time_json(time: dt.datetime | None) -> str | None:
    """Return a time as RFC 3339 in UTC, for JSON."""
    return None if time is None else time.astimezone(dt.timezone.utc).isoformat().replace("+00:00", "Z")


def shortened(text: str) -> str:
    """Return ``text`` in quotes, cut if it is long."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
