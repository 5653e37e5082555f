"""EPContext nodes of ONNX files: what an execution provider of ONNX Runtime compiled, or the name of the file with it.

The file is walked as protobuf wire format, and what is long is skipped: neither onnx nor memory for the file is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from enginecache.exchange.headers import Bytes

MAX_FIELDS = 2_000_000
"""Fields that are walked of one file; a model has some ten for each node."""

_SHORT_BYTES = 1 << 16
_CONTEXT = b"EPContext"
_MODEL_IR, _MODEL_GRAPH, _MODEL_METADATA = 1, 7, 14
_GRAPH_NODE = 1
_NODE_OP, _NODE_ATTRIBUTE = 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_STRING = 1, 3, 4
_METADATA_KEY, _METADATA_VALUE = 1, 2
"""Numbers of fields. Source: onnx.proto of ONNX 1.23."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_IR_VERSION = 1000
"""ONNX is at 13: more is no ONNX file."""


@dataclass(frozen=True)
class Context:
    """One EPContext node.

    Attributes:
        attributes: Its short attributes: numbers and strings by name.
        content: Where ``ep_cache_context`` is in the file, as offset and size; None without one.
    """

    attributes: dict[str, int | str]
    content: tuple[int, int] | None

    @property
    def is_embedded(self) -> bool:
        """True if the compiled bytes are in the file; else ``ep_cache_context`` is a path."""
        return self.attributes.get("embed_mode", 1) != 0


@dataclass(frozen=True)
class OnnxFile:
    """Content of an ONNX file, as far as it matters here.

    Attributes:
        contexts: Its EPContext nodes.
        metadata: Its short metadata, by name.
        is_complete: Whether its last field ends where the file does.
        is_whole: Whether all of it was walked; else it has more fields than :data:`MAX_FIELDS`.
    """

    contexts: tuple[Context, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    is_complete: bool = True
    is_whole: bool = True


class _Cut(Exception):  # noqa: N818  a signal between functions here
    """The bytes end inside a field."""


class _Damaged(Exception):  # noqa: N818
    """The bytes are no protobuf."""


class _TooMany(Exception):  # noqa: N818
    """There are more fields than are walked."""


def read_onnx(data: Bytes) -> OnnxFile | None:
    """Walk a file that may be an ONNX model; None where it is none. Never raises.

    An ONNX model has an IR version first, as every exporter writes it, and a graph.
    """
    if bytes(data[0:1]) != b"\x08":
        return None
    return _Walk(data).read()


class _Walk:
    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._left = MAX_FIELDS
        self._contexts: list[Context] = []
        self._metadata: dict[str, str] = {}
        self._has_graph = False

    def read(self) -> OnnxFile | None:
        is_complete = is_whole = True
        try:
            self._model()
        except _Cut:
            is_complete = False
        except _TooMany:
            is_whole = False
        except _Damaged:
            return None
        if not self._has_graph:
            return None
        return OnnxFile(tuple(self._contexts), self._metadata, is_complete, is_whole)

    def _model(self) -> None:
        for index, (number, kind, start, end) in enumerate(self._fields(0, len(self._data))):
            if index == 0 and not (number == _MODEL_IR and kind == _VARINT and 0 < start <= _MAX_IR_VERSION):
                raise _Damaged
            if kind == _LENGTH and number == _MODEL_GRAPH:
                self._has_graph = True
                self._graph(start, end)
            elif kind == _LENGTH and number == _MODEL_METADATA:
                self._property(start, end)

    def _graph(self, start: int, end: int) -> None:
        for number, kind, first, last in self._fields(start, end):
            if number == _GRAPH_NODE and kind == _LENGTH:
                self._node(first, last)

    def _node(self, start: int, end: int) -> None:
        attributes: list[tuple[int, int]] = []
        operation = b""
        for number, kind, first, last in self._fields(start, end):
            if number == _NODE_OP and kind == _LENGTH:
                operation = self._short(first, last)
            elif number == _NODE_ATTRIBUTE and kind == _LENGTH:
                attributes.append((first, last))
        if operation == _CONTEXT:
            self._context(attributes)

    def _context(self, spans: list[tuple[int, int]]) -> None:
        attributes: dict[str, int | str] = {}
        content = None
        for start, end in spans:
            name = ""
            value: int | tuple[int, int] | None = None
            for number, kind, first, last in self._fields(start, end):
                if number == _ATTRIBUTE_NAME and kind == _LENGTH:
                    name = _text(self._short(first, last))
                elif number == _ATTRIBUTE_INT and kind == _VARINT:
                    value = first
                elif number == _ATTRIBUTE_STRING and kind == _LENGTH:
                    value = (first, last)
            if name == "ep_cache_context" and isinstance(value, tuple):
                content = (value[0], value[1] - value[0])
            elif isinstance(value, tuple):
                attributes[name] = _text(self._short(*value))
            elif value is not None:
                attributes[name] = value
        self._contexts.append(Context(attributes, content))

    def _property(self, start: int, end: int) -> None:
        found = {number: self._short(a, b) for number, kind, a, b in self._fields(start, end) if kind == _LENGTH}
        self._metadata[_text(found.get(_METADATA_KEY, b""))] = _text(found.get(_METADATA_VALUE, b""))

    def _short(self, start: int, end: int) -> bytes:
        return bytes(self._data[start : min(end, start + _SHORT_BYTES)])

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, kind, and the span of a field's bytes; for a number, its value and 0."""
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise _TooMany
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if not number or kind not in {_VARINT, _FIXED64, _LENGTH, _FIXED32}:
                raise _Damaged
            if kind == _VARINT:
                value, at = self._varint(at, end)
                yield number, kind, value, 0
                continue
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
            if kind == _LENGTH:
                size, at = self._varint(at, end)
            if at + size > end:
                if end < len(self._data):
                    raise _Damaged  # longer than the message that it is in
                if kind == _LENGTH:
                    yield number, kind, at, end  # what there is of it
                raise _Cut
            yield number, kind, at, at + size
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        piece = bytes(self._data[at : min(at + 10, end)])
        for index, byte in enumerate(piece):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, at + index + 1
        raise _Damaged if len(piece) == 10 or end < len(self._data) else _Cut


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
