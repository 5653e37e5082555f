"""The structure of a model as bytes: every field that is set, in one order, each value so that it can be read back.

Own encoding, not protobuf's: protobuf promises no canonical form, and its bytes change with where tensors are stored::

    structure := "enginecache/structure/v1" LF message
    message   := field* 00000000               fields in the order of their numbers, only those that are set
    field     := number(u32) value             singular
               | number(u32) count(u64) value* repeated
    value     := integer or enum(i64) | uint64(u64) | float(f32) | double(f64) | size_bytes(u64) byte* | message

All numbers are little-endian. Whether a field is repeated, and the type of its value, follow from its number by
onnx.proto. So two models have the same encoding only if they have the same fields with the same values (but a
signaling NaN in a float attribute counts as the quiet one).

Left out: ``doc_string`` of every message, the entries ``NOISE_KEYS`` of ``metadata_props``, and what tells a
tensor's content, wherever the tensor stands; that goes to the weights digest, in the order of the walk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import blake3

from enginecache.model.tensors import CONTENT_FIELDS

STRUCTURE_DOMAIN = b"enginecache/structure/v1\n"

NOISE_KEYS = frozenset(
    {
        "pkg.onnxscript.class_hierarchy",
        "pkg.onnxscript.name_scopes",
        "pkg.onnxscript.optimizer.folded_from",
        "pkg.onnxscript.rewriter.rule_name",
        "pkg.torch.export.ExportedProgram.graph_signature",
        "pkg.torch.export.ExportedProgram.range_constraints",
        "pkg.torch.onnx.class_hierarchy",
        "pkg.torch.onnx.fx_node",
        "pkg.torch.onnx.input_names",
        "pkg.torch.onnx.name_scopes",
        "pkg.torch.onnx.original_node_name",
        "pkg.torch.onnx.stack_trace",
    }
)
"""Keys of ``metadata_props`` under which exporters leave text about their own source, for people who debug them.

``namespace`` is written by the same exporters, but carries nobody's prefix: it stays in. So does
``pkg.torch.export.graph_signature.InputSpec.kind``, which is a fact about the input.
Source: torch.onnx (``_core._set_node_metadata``, ``_fx_passes``, ``_ir_passes``) and onnxscript (``rewriter``,
``optimizer``), as of 2026-11.
"""

SLICE_VALUES = 1 << 16
FLUSH_BYTES = 1 << 20

_END = bytes(4)
_count = struct.Struct("<Q").pack

OnTensor = Callable[[Any, Mapping[str, Any]], None]
"""Called with a ``TensorProto`` and its fields out of ``CONTENT_FIELDS``, when its structure has been written."""

OnNode = Callable[[Any], None]
"""Called with each ``NodeProto``, those of subgraphs and functions too, before its structure is written."""

_Step = Callable[[Any], None]


def _ignore(_value: Any) -> None:
    pass


class StructureWriter:
    """Hashes messages in canonical form, and takes the content out of their tensors.

    Args:
        on_tensor: Takes each tensor's content, after which it is cleared from the message.
        on_node: Sees each node. It decides nothing about the digest.
    """

    def __init__(self, on_tensor: OnTensor, on_node: OnNode = _ignore) -> None:
        self._hasher = blake3.blake3(STRUCTURE_DOMAIN)
        self._on_tensor = on_tensor
        self._on_node = on_node
        # Appending to this at a million places is what the walk's speed hangs on.
        self._out = bytearray()
        # One step for each field of each message, made when it is first met.
        self._steps: dict[Any, _Step] = {}

    def write(self, message: Any) -> None:
        """Write a message and all below it."""
        self._message(message)
        self._flush()

    def hexdigest(self) -> str:
        """Digest of what was written, 64 hex characters."""
        return self._hasher.hexdigest()

    def _message(self, message: Any) -> None:
        steps = self._steps
        for field, value in message.ListFields():
            step = steps.get(field) or self._step_for(field, value)
            step(value)
        self._out += _END
        if len(self._out) > FLUSH_BYTES:
            self._flush()

    def _node(self, node: Any) -> None:
        self._on_node(node)
        self._message(node)

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
        if field.name == "doc_string":
            step: _Step = _ignore
        elif field.name == "metadata_props":
            step = self._metadata(head)
        elif field.cpp_type == field.CPPTYPE_MESSAGE:
            write = {"TensorProto": self._tensor, "NodeProto": self._node}.get(field.message_type.name, self._message)
            step = self._messages(head, write) if is_repeated else self._single(head, write)
        elif field.cpp_type == field.CPPTYPE_STRING:
            step = self._strings(head) if is_repeated else self._string(head)
        else:
            forms = {field.CPPTYPE_FLOAT: "f", field.CPPTYPE_DOUBLE: "d", field.CPPTYPE_UINT64: "Q"}
            form = forms.get(field.cpp_type, "q")
            step = self._numbers(head, form) if is_repeated else self._number(head, form)
        self._steps[field] = step
        return step

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
            # Protobuf hands out bytes for text that is not UTF-8, so no two values come to the same bytes here.
            data = value if isinstance(value, bytes) else value.encode()
            self._out += head + _count(len(data)) + data

        return step

    def _strings(self, head: bytes) -> _Step:
        def step(values: Sequence[str | bytes]) -> None:
            self._out += head + _count(len(values))
            for value in values:
                data = value if isinstance(value, bytes) else value.encode()
                self._out += _count(len(data)) + data

        return step

    def _number(self, head: bytes, form: str) -> _Step:
        pack = struct.Struct("<" + form).pack

        def step(value: float) -> None:
            self._out += head + pack(value)

        return step

    def _numbers(self, head: bytes, form: str) -> _Step:
        def step(values: Sequence[float]) -> None:
            self._out += head + _count(len(values))
            for start in range(0, len(values), SLICE_VALUES):
                part = values[start : start + SLICE_VALUES]
                self._out += struct.pack(f"<{len(part)}{form}", *part)

        return step

    def _metadata(self, head: bytes) -> _Step:
        write = self._messages(head, self._message)

        def step(entries: Sequence[Any]) -> None:
            kept = [entry for entry in entries if entry.key not in NOISE_KEYS]
            if kept:
                write(kept)

        return step
