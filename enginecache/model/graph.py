"""Encode the structure of a model: every field that is set, in one order, without loss.

The encoding is not protobuf's: protobuf promises no canonical form, and its bytes depend on where tensors are stored::

    structure := "enginecache/structure/v2" LF message
    value_info := "enginecache/value_info/v1" LF (graph(u64) field)*   graph: how many the walk has entered before
    message   := field* 00000000               fields in the order of their numbers, only those that are set
    field     := number(u32) value             singular
               | number(u32) count(u64) value* repeated
    value     := integer or enum(i64) | uint64(u64) | float(f32) | double(f64) | size_bytes(u64) byte* | message

All numbers are little-endian. A field's number determines, by onnx.proto, whether it is repeated and the type of its
value. A node or function with a NaN among its attributes is followed by those attributes in protobuf's encoding,
because Python's floats cannot distinguish a signaling NaN from a quiet one. So two models have the same encoding only
if they have the same fields with the same values.

Left out:

- fields that TensorRT does not read, as far as builds and the parser's source show: ``doc_string`` of every message,
  ``_LEFT_OUT``, ``metadata_props`` except keys that name TensorRT, and the producer unless it is TensorRT itself;
- the content of tensors, wherever they are: it goes to the weights digest, in the order of the walk;
- ``value_info``, the types and shapes that an exporter inferred. TensorRT does not read them, but converters do: they
  have a separate digest, so that a miss can say that nothing else differs.

Source: TensorRT-RTX 1.7.1, the parsed networks and plans of real models exported anew, docs/identity.md; onnx-tensorrt
10.1, ``ModelImporter.cpp``: the other fields go to the log, and ``producer_name`` is compared with ``TensorRT``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import blake3

from enginecache.model.narrowing import LARGEST, SMALLEST
from enginecache.model.tensors import CONTENT_FIELDS

_STRUCTURE_DOMAIN = b"enginecache/structure/v2\n"
_VALUE_INFO_DOMAIN = b"enginecache/value_info/v1\n"

_LEFT_OUT = frozenset(
    {
        ("ModelProto", "domain"),
        ("ModelProto", "ir_version"),
        ("ModelProto", "model_version"),
        ("ModelProto", "producer_version"),
    }
)
"""Fields that name a model and its history. The reader also clears the name of the model's graph.

The name of a function stays, since nodes call it by name, and so does the name of a graph inside a node, which is
part of the names of TensorRT's layers.
"""

_READERS = re.compile(rb"trt|tensorrt", re.IGNORECASE)
"""Pattern of producers and metadata keys that TensorRT may read.

For the producer ``TensorRT`` the parser reads further attributes of nodes. No release is known to read any metadata
key, so keeping those is a precaution.
"""

_DEPTH_OF_CHECK = 10
"""Levels of nested graphs or types between two searches for unknown fields.

Protobuf's own search silently ends 64 messages below its start (upb, protobuf 7.36); a graph in a graph is three
messages below it.
"""

_SLICE_VALUES = 1 << 16
_FLUSH_BYTES = 1 << 20

_END = bytes(4)
_count = struct.Struct("<Q").pack

_OnTensor = Callable[[Any, Mapping[str, Any]], None]
"""Called with a ``TensorProto`` and its fields out of ``CONTENT_FIELDS``, when its structure has been written."""

_OnNode = Callable[[Any], None]
"""Called with each ``NodeProto``, those of subgraphs and functions too, before its structure is written."""

_Step = Callable[[Any], None]


def _ignore(_value: Any) -> None:
    pass


class StructureWriter:
    """Hasher of messages in canonical form; clears the content of their tensors.

    Args:
        on_tensor: Receives each tensor's content, which is then cleared from the message.
        on_node: Receives each node. It has no influence on the digest.
        on_wide: Receives each node with an integer attribute beyond 32 bits, after its structure has been written.
    """

    def __init__(self, on_tensor: _OnTensor, on_node: _OnNode = _ignore, on_wide: _OnNode = _ignore) -> None:
        self._hasher = blake3.blake3(_STRUCTURE_DOMAIN)
        self._value_info = blake3.blake3(_VALUE_INFO_DOMAIN)
        self._on_tensor = on_tensor
        self._on_node = on_node
        self._on_wide = on_wide
        # The speed of the walk depends on appending to this: it happens a million times.
        self._out = bytearray()
        # One step for each field of each message, made when it is first met.
        self._steps: dict[Any, _Step] = {}
        self._depth = 0
        self._graphs = 0
        self._has_nan = False
        self._is_wide = False
        self._has_value_info = False
        self.has_unknown_fields = False

    def write(self, message: Any) -> None:
        """Write a message and everything below it, and set ``has_unknown_fields`` if any has unknown fields.

        Unknown fields are removed from the message.
        """
        self._message(message)
        self._flush()
        self.has_unknown_fields |= _discard_unknown_fields(message)

    def hexdigest(self) -> str:
        """Return the digest of everything written except ``value_info``, 64 hex characters."""
        return self._hasher.hexdigest()

    def value_info_hexdigest(self) -> str:
        """Return the digest of every ``value_info``, 64 hex characters; empty if there is none."""
        return self._value_info.hexdigest() if self._has_value_info else ""

    def _message(self, message: Any) -> None:
        steps = self._steps
        for field, value in message.ListFields():
            step = steps.get(field) or self._step_for(field, value)
            step(value)
        self._out += _END
        if len(self._out) > _FLUSH_BYTES:
            self._flush()

    def _node(self, node: Any) -> None:
        self._on_node(node)
        outer, self._is_wide = self._is_wide, False
        self._message(node)
        if self._has_nan:
            self._exactly(node.attribute)
        if self._is_wide:
            self._on_wide(node)
        self._is_wide = outer

    def _function(self, function: Any) -> None:
        self._message(function)
        if self._has_nan:
            self._exactly(function.attribute_proto)

    def _exactly(self, attributes: Sequence[Any]) -> None:
        """Write the floats of attributes in protobuf's encoding, which preserves every bit."""
        for attribute in attributes:
            copy = type(attribute)()
            copy.CopyFrom(attribute)
            for field, _ in copy.ListFields():
                if field.name not in {"f", "floats"}:
                    copy.ClearField(field.name)
            copy.DiscardUnknownFields()
            data = copy.SerializeToString()
            self._out += _count(len(data)) + data
        self._has_nan = False

    def _nested(self, message: Any) -> None:
        """Write a graph or a type: the messages that may hold others of their kind, to any depth."""
        self._depth += 1
        self._message(message)
        if self._depth % _DEPTH_OF_CHECK == 0:
            self.has_unknown_fields |= _discard_unknown_fields(message)
        self._depth -= 1

    def _graph(self, graph: Any) -> None:
        self._graphs += 1
        self._nested(graph)

    def _tensor(self, tensor: Any) -> None:
        content = {}
        for field, value in tensor.ListFields():
            if field.name in CONTENT_FIELDS:
                content[field.name] = value
            else:
                step = self._steps.get(field) or self._step_for(field, value)
                step(value)
        self._out += _END
        self._on_tensor(tensor, content)
        for name in content:
            if name != "external_data":  # stays for the search for unknown fields
                tensor.ClearField(name)

    def _flush(self) -> None:
        self._hasher.update(self._out)
        self._out.clear()

    def _step_for(self, field: Any, value: Any) -> _Step:
        head = struct.pack("<I", field.number)
        is_repeated = not isinstance(value, int | float | str | bytes) and not hasattr(value, "ListFields")
        if field.name == "doc_string" or (field.containing_type.name, field.name) in _LEFT_OUT:
            step: _Step = _ignore
        elif field.name == "metadata_props":
            step = self._metadata(head)
        elif field.name == "producer_name":
            step = self._producer(head)
        elif field.name == "value_info":
            step = self._value_infos(head)
        elif field.cpp_type == field.CPPTYPE_MESSAGE:
            write = self._writer_of(field.message_type.name)
            step = self._messages(head, write) if is_repeated else self._single(head, write)
        elif field.cpp_type == field.CPPTYPE_STRING:
            step = self._strings(head) if is_repeated else self._string(head)
        else:
            forms = {field.CPPTYPE_FLOAT: "f", field.CPPTYPE_DOUBLE: "d", field.CPPTYPE_UINT64: "Q"}
            form = forms.get(field.cpp_type, "q")
            step = self._numbers(head, form) if is_repeated else self._number(head, form)
        self._steps[field] = step
        return step

    def _writer_of(self, message_type: str) -> _Step:
        writers: dict[str, _Step] = {
            "TensorProto": self._tensor,
            "NodeProto": self._node,
            "FunctionProto": self._function,
            "GraphProto": self._graph,
            "TypeProto": self._nested,
        }
        return writers.get(message_type, self._message)

    def _single(self, head: bytes, write: _Step) -> _Step:
        def step(value: Any) -> None:
            self._out += head
            write(value)

        return step

    def _messages(self, head: bytes, write: _Step) -> _Step:
        def step(values: Sequence[Any]) -> None:
            self._out += head + _count(len(values))
            for value in values:
                write(value)

        return step

    def _string(self, head: bytes) -> _Step:
        def step(value: str | bytes) -> None:
            # Protobuf returns bytes for strings that are not UTF-8, so no two values have the same bytes here.
            data = _as_bytes(value)
            self._out += head + _count(len(data)) + data

        return step

    def _strings(self, head: bytes) -> _Step:
        def step(values: Sequence[str | bytes]) -> None:
            self._out += head + _count(len(values))
            for value in values:
                data = _as_bytes(value)
                self._out += _count(len(data)) + data

        return step

    def _number(self, head: bytes, form: str) -> _Step:
        pack = struct.Struct("<" + form).pack

        def step(value: float) -> None:
            self._out += head + pack(value)
            if isnan(value):
                self._has_nan = True
            elif not SMALLEST <= value <= LARGEST:  # of a float too, which its node then explains
                self._is_wide = True

        return step

    def _numbers(self, head: bytes, form: str) -> _Step:
        def step(values: Sequence[float]) -> None:
            self._out += head + _count(len(values))
            for start in range(0, len(values), _SLICE_VALUES):
                part = values[start : start + _SLICE_VALUES]
                self._out += struct.pack(f"<{len(part)}{form}", *part)
                self._has_nan |= isnan(sum(part))  # as it is for opposite infinities: no harm
                self._is_wide |= not SMALLEST <= min(part) <= max(part) <= LARGEST

        return step

    def _metadata(self, head: bytes) -> _Step:
        write = self._messages(head, self._message)

        def step(entries: Sequence[Any]) -> None:
            kept = [entry for entry in entries if _READERS.search(_as_bytes(entry.key))]
            if kept:
                write(kept)

        return step

    def _producer(self, head: bytes) -> _Step:
        write = self._string(head)

        def step(value: str | bytes) -> None:
            if _READERS.search(_as_bytes(value)):
                write(value)

        return step

    def _value_infos(self, head: bytes) -> _Step:
        write = self._messages(head, self._message)

        def step(values: Sequence[Any]) -> None:
            self._has_value_info = True
            structure = self._hasher, self._out
            self._hasher, self._out = self._value_info, bytearray(_count(self._graphs))
            write(values)
            self._flush()
            self._hasher, self._out = structure

        return step


def _discard_unknown_fields(message: Any) -> bool:
    """Take out what the onnx package has no name for; says whether there was any, down to some depth.

    Cheap only when tensor content has been taken out: the size is found by serializing.
    """
    size_bytes = message.ByteSize()
    message.DiscardUnknownFields()
    return bool(message.ByteSize() != size_bytes)


def _as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
