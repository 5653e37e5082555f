"""Parse and write shapes in trtexec's syntax, and dimensions as ``NAME=MIN:OPT:MAX`` or ``NAME=SIZE``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from enginecache.errors import ProfileError, printable

Bounds = tuple[int, int, int]
Corners = tuple[tuple[int, ...], ...]
"""Minimum, optimum and maximum of one input."""
Size = int | str
"""A size, or the placeholder that stands for one in a message."""
Triple = tuple[Size, Size, Size]

_FILL_IN = "MIN, OPT and MAX stand for sizes: put numbers in their place."
_PLACEHOLDER = re.compile("MIN|OPT|MAX")
_SHAPE = re.compile(r"-?\d{1,19}(?:x-?\d{1,19})*|", re.ASCII)
_DIM = re.compile(
    r"(?P<name>.+)=(?P<first>\d{1,19})(?::(?P<second>\d{1,19}):(?P<third>\d{1,19}))?", re.ASCII | re.DOTALL
)


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Read ``x:1x3x32x32,y:1x10`` in trtexec's syntax.

    The name ends at the last colon, and may be quoted with ``'`` or ``"`` if it contains a comma. An empty shape
    (``x:``) means a scalar.

    Raises:
        ProfileError: The text has another form, or names an input twice.
    """
    result: dict[str, tuple[int, ...]] = {}
    for item in _split_outside_quotes(text):
        name, colon, shape = item.rpartition(":")
        name, shape = _unquote(name.strip()), shape.strip()
        if not colon or not name or _SHAPE.fullmatch(shape) is None:
            message = f"{item.strip()!r} is not NAME:SHAPE"
            if _PLACEHOLDER.search(shape):
                raise ProfileError(message, _FILL_IN)
            raise ProfileError(message, "Write shapes as in trtexec: input:1x3x224x224,mask:1x128.")
        if name in result:
            raise ProfileError(f"input {name!r} is given twice in {text!r}", "Name each input once in a flag.")
        result[name] = tuple(int(size) for size in shape.split("x")) if shape else ()
    return result


def _split_outside_quotes(text: str) -> list[str]:
    items, current, quote = [], "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == ",":
            items.append(current)
            current = ""
            continue
        current += character
    if quote:
        raise ProfileError(f"a quote in {text!r} is not closed", f"Close it with {quote}.")
    return [*items, current]


def _unquote(name: str) -> str:
    return name[1:-1] if len(name) >= 2 and name[0] == name[-1] and name[0] in "'\"" else name


def parse_dim(text: str) -> tuple[str, Bounds]:
    """Read ``batch=1:32:64``, or ``batch=8`` for a fixed size.

    Raises:
        ProfileError: The text has another form.
    """
    match = _DIM.fullmatch(text)
    if match is None:
        message = f"--dim {text!r} is not NAME=MIN:OPT:MAX or NAME=SIZE"
        if _PLACEHOLDER.search(text.rpartition("=")[2]):
            raise ProfileError(message, _FILL_IN)
        raise ProfileError(message, "Write, for instance, --dim batch=1:32:64, or --dim height=320 for one size.")
    first = int(match["first"])
    if match["second"] is None:
        return match["name"], (first, first, first)
    return match["name"], (first, int(match["second"]), int(match["third"]))


def dim_flag(name: str, sizes: Triple) -> str:
    """Return ``--dim batch=1:8:32``, quoted for a shell; one size where the three are equal."""
    text = str(sizes[0]) if sizes[0] == sizes[1] == sizes[2] else ":".join(map(str, sizes))
    return f"--dim {shlex.quote(f'{name}={text}')}"


def is_writable_dim(name: str) -> bool:
    """Return whether a user can copy ``--dim`` with this name from a message, and it is read back as the same."""
    return name != "" and printable(name) == name


def is_writable_input(name: str) -> bool:
    """Return whether a user can copy a shape flag with this name from a message, and it is read back as the same."""
    return name != "" and printable(name) == name and not ("'" in name and '"' in name)


def quote_shape(name: str, shape: tuple[Size, ...]) -> str:
    """Return one item of a shape flag: ``x:1x3x32x32``, the name quoted where it must be."""
    quote = "'" if '"' in name else '"'
    quoted = f"{quote}{name}{quote}" if set(name) & set(",'\"") or name != name.strip() else name
    return f"{quoted}:{'x'.join(str(size) for size in shape)}"


def shape_flags(shapes: Mapping[str, tuple[tuple[Size, ...], ...]]) -> str:
    """Return the three flags for a mapping from input name to (minimum, optimum, maximum), quoted for a shell."""
    flags = []
    for index, flag in enumerate(("--min-shapes", "--opt-shapes", "--max-shapes")):
        items = ",".join(quote_shape(name, corners[index]) for name, corners in shapes.items())
        flags.append(f"{flag} {shlex.quote(items)}")
    return " ".join(flags)
