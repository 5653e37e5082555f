"""Files that have a plan inside: which program wrote them, and where the plan is.

No loader of TensorRT reads such a file. Nothing is ever unpickled: of a pickle the opcodes are listed.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from enginecache.exchange.headers import OLD_MAGIC, RTX_MAGIC, TRT_MAGIC, Bytes, read_plan_header

MAX_JSON_BYTES = 1 << 20
"""Longest JSON header that is read."""

SCAN_BYTES = 1 << 20
"""Bytes of a file in which a plan is looked for that no known program has put there."""

_TENSORACLE, _BUNDLE, _PICKLE = b"TENSORACLE\x01", b"BUNDLE\x01", b"\x80"
_PICKLE_PROTOCOLS = range(2, 6)
_MAX_OPCODES = 16
_LARGE_READ = 1 << 20
_NAMES = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_CONTENTS = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")


@dataclass(frozen=True)
class Wrapper:
    """Bytes around a plan.

    Attributes:
        name: Stable, for programs: ``ultralytics``, ``tensoracle``, ``model_connect``, ``torch_tensorrt``, ``pickle``,
            or ``unknown``.
        program: For readers.
        offset: Where the plan begins, in bytes; None where that is not known.
        size_bytes: Size of the plan; None for the rest of the file.
        facts: What the wrapper says of the plan; nobody has compared it with the plan.
    """

    name: str
    program: str
    offset: int | None = None
    size_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def find_wrapper(data: Bytes) -> Wrapper | None:
    """Find out what is around the plan in a file; None where nothing known is, and no plan. Never raises.

    Reads the header, or of a file of no known program its first :data:`SCAN_BYTES`.
    """
    for find in (_ultralytics, _tensoracle, _model_connect, _pickle, _unknown):
        found = find(data)
        if found is not None:
            return found
    return None


def _json_at(data: Bytes, start: int, size: int) -> dict[str, Any] | None:
    if not 2 <= size <= MAX_JSON_BYTES or start + size > len(data):
        return None
    try:
        found = json.loads(bytes(data[start : start + size]))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _plain(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named facts that are short plain values: whatever else is there is nobody's business here."""
    return {
        name: value
        for name in names
        if isinstance(value := found.get(name), str | int | float | list) and len(json.dumps(value)) <= 200
    }


def _ultralytics(data: Bytes) -> Wrapper | None:
    head = bytes(data[0:5])
    if len(head) < 5 or head[4:] != b"{":
        return None
    size = struct.unpack_from("<i", head)[0]
    found = _json_at(data, 4, size)
    if found is None:
        return None
    facts = _plain(found, ("description", "author", "version", "date", "task", "batch", "imgsz", "stride"))
    return Wrapper("ultralytics", "Ultralytics (a JSON header before the plan)", 4 + size, None, facts)


def _tensoracle(data: Bytes) -> Wrapper | None:
    head = bytes(data[0 : len(_TENSORACLE) + 8])
    if not head.startswith(_TENSORACLE) or len(head) < len(_TENSORACLE) + 8:
        return None
    size = struct.unpack_from(">Q", head, len(_TENSORACLE))[0]
    found = _json_at(data, len(head), size)
    if found is None:
        return None
    return Wrapper("tensoracle", "tensoracle", len(head) + size, None, _plain(found, ("plan_sha256",)))


def _model_connect(data: Bytes) -> Wrapper | None:
    if bytes(data[0 : len(_BUNDLE)]) != _BUNDLE:
        return None
    head = bytes(data[len(_BUNDLE) : MAX_JSON_BYTES])
    facts: dict[str, Any] = {}
    start = head[:16].find(b"{")
    if start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(head[start:].decode("utf-8", "replace"))
            facts = _plain(found, ("trt_version", "gpu_name"))
        except (ValueError, RecursionError):
            pass
    return Wrapper("model_connect", "TensorRT-Model-Connect (a bundle of sections)", None, None, facts)


class _Large(Exception):  # noqa: N818  a signal between two functions here
    """A read that is not made: the argument of an opcode that is too long to look at, or cut off."""


class _Opcodes(io.RawIOBase):
    """A file for :func:`pickletools.genops` that gives it no long arguments.

    Args:
        data: The pickle.
    """

    def __init__(self, data: Bytes) -> None:
        super().__init__()
        self._data = data
        self.at = 0

    def read(self, size: int = -1, /) -> bytes:
        if size > _LARGE_READ or self.at + size > len(self._data):
            raise _Large
        found = bytes(self._data[self.at : self.at + max(size, 0)])
        self.at += len(found)
        return found

    def readline(self, size: int | None = -1, /) -> bytes:
        end = self.at + min(_LARGE_READ, size if size is not None and size >= 0 else _LARGE_READ)
        line, newline, _ = bytes(self._data[self.at : end]).partition(b"\n")
        self.at += len(line) + len(newline)
        return line + newline

    def tell(self) -> int:
        return self.at


def _pickle(data: Bytes) -> Wrapper | None:
    head = bytes(data[0:2])
    if len(head) < 2 or head[:1] != _PICKLE or head[1] not in _PICKLE_PROTOCOLS:
        return None
    plan = _plan_in_pickle(data)
    if plan is None:
        return Wrapper("pickle", "a Python pickle: to load it is to run what it says")
    return Wrapper("torch_tensorrt", "Torch-TensorRT's engine cache (a Python pickle)", *plan)


def _plan_in_pickle(data: Bytes) -> tuple[int, int] | None:
    """Return where ``serialized_engine`` begins in a pickle, and its size. Unpickles nothing."""
    stream = _Opcodes(data)
    name: object = None
    opcodes: Iterator[tuple[Any, Any, int | None]] = pickletools.genops(stream)  # type: ignore[arg-type]
    try:
        for count, (opcode, argument, _) in enumerate(opcodes):
            if count > _MAX_OPCODES:
                return None
            if opcode.name in _NAMES:
                name = argument
            elif opcode.name in _CONTENTS and name == "serialized_engine":
                return stream.at - len(argument), len(argument)
    except _Large:
        # The length has been read: its argument would begin here.
        return None if name != "serialized_engine" else _large_argument(data, stream.at)
    except Exception:  # noqa: BLE001  anybody's bytes: not a pickle, or cut off
        return None
    return None


def _large_argument(data: Bytes, at: int) -> tuple[int, int] | None:
    """Return the argument of BINBYTES8 or BINBYTES that begins at ``at``."""
    for opcode, length in ((b"\x8e", 8), (b"B", 4)):
        if bytes(data[at - length - 1 : at - length]) == opcode:
            return at, int.from_bytes(bytes(data[at - length : at]), "little")
    return None


_PLAUSIBLE: tuple[tuple[bytes, Callable[[bytes], bool]], ...] = (
    (RTX_MAGIC, lambda head: head[8:16] == b"\x02" + bytes(7) and head[28:32] == RTX_MAGIC),
    (TRT_MAGIC, lambda head: head[4:16] == b"\0\0\0\0\x01\0\0\0\0\0\0\0" and head[56:60] in (OLD_MAGIC, b"")),
)


def _unknown(data: Bytes) -> Wrapper | None:
    """Return a plan that does not begin the file: only one whose header ends it exactly."""
    head = bytes(data[0:SCAN_BYTES])
    for magic, is_plausible in _PLAUSIBLE:
        at = head.find(magic, 1)
        while at > 0:
            found = read_plan_header(bytes(data[at : at + 4096]))
            size = None if found is None else found.declared_size_bytes
            if size == len(data) - at and is_plausible(bytes(data[at : at + 64])):
                return Wrapper("unknown", f"{at} bytes that no known program writes, before the plan", at)
            at = head.find(magic, at + 1)
    return None
