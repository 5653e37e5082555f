"""Frozen dataclasses as plain JSON values, and back: for requests and results that cross a pipe.

JSON and not pickle: neither side may run what a line says. Paths that are not UTF-8 pass as lone surrogates, which JSON
keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_plain(value: object) -> Any:
    """Return a value as plain JSON values: a dataclass as an object, a tuple (also a named one) as an array.

    Raises:
        TypeError: There is something in it that :func:`from_plain` could not make again, such as bytes.
    """
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def from_plain(kind: type[T], value: Any) -> T:
    """Return the value of type ``kind`` that :func:`to_plain` was given; names that it does not have are ignored.

    Raises:
        KeyError: A field is missing.
        TypeError: ``kind`` has a field of a type that has no form in JSON, and not None in it.
    """
    made: T = _of(kind, value)
    return made


def _of(kind: Any, value: Any) -> Any:
    arguments = get_args(kind)
    if get_origin(kind) in {Union, types.UnionType}:
        kinds = [one for one in arguments if one is not type(None)]
        # Of several kinds there are only JSON's own.
        return value if value is None or len(kinds) > 1 else _of(kinds[0], value)
    if get_origin(kind) is tuple:
        each = (arguments[0],) * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_of(one, item) for one, item in zip(each, value, strict=True))
    if hasattr(kind, "__dataclass_fields__"):
        hints = _hints(kind)
        return kind(**{name: _of(hints[name], value[name]) for name in kind.__dataclass_fields__})
    if isinstance(kind, type) and issubclass(kind, tuple):
        return kind(*(_of(one, item) for one, item in zip(_hints(kind).values(), value, strict=True)))
    if kind is bytes:
        raise TypeError("bytes have no form in JSON")
    return Path(value) if kind is Path else value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
