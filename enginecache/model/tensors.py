"""The content of tensors, in one form wherever and however they are stored.

Content is what ``raw_data`` holds or would hold: the elements in little-endian order, those of less than eight bits
packed from the low bits up. A tensor of strings has no raw form; its content is each string with its length. In the
digest::

    weights  := "enginecache/weights/v1" LF content*      in the order of the walk through the structure
    content  := size_bytes(u64) byte*                     any type but STRING
              | count(u64) (size_bytes(u64) byte*)*       STRING

A signaling NaN in ``float_data`` counts as the quiet one: Python's floats cannot tell them apart.

Source: onnx.proto, the comments at ``TensorProto``; onnx-tensorrt 10.1, WeightsContext.cpp, for what TensorRT reads.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginecache.digests import StreamDigest
from enginecache.errors import ModelError
from enginecache.model.external import MAX_BYTES, Extent, ExternalData

WEIGHTS_DOMAIN = b"enginecache/weights/v1\n"

STORAGE_FIELDS = frozenset(
    {"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"}
)
"""The fields of ``TensorProto`` that hold elements; exactly one of them may."""

CONTENT_FIELDS = STORAGE_FIELDS | {"external_data", "data_location"}
"""The fields of ``TensorProto`` that say what its elements are, or where."""

SLICE_ELEMENTS = 1 << 16
"""Typed elements become Python objects on their way out of protobuf: 40 bytes each, so a slice at a time.

A multiple of four, so that slices of six-bit elements end on whole bytes.
"""


@dataclass(frozen=True)
class ElementType:
    """How one ONNX element type is stored.

    Attributes:
        name: As in ``TensorProto.DataType``.
        bits: Size of one element in raw form; 0 for strings.
        field: The typed storage that may hold it.
    """

    name: str
    bits: int
    field: str

    @property
    def entry_bits(self) -> int:
        """Bits of the raw form that one entry of the typed storage stands for.

        Packed pairs and quads of elements share an entry; a complex element has two.
        """
        if self.name.startswith("COMPLEX"):
            return self.bits // 2
        return 8 if self.bits in {2, 4} else self.bits

    def size_bytes(self, dims: Sequence[int], label: str) -> int:
        """Size of the raw form of a tensor of this shape.

        Raises:
            ModelError: A dimension is negative, or the size is more than any file can have.
        """
        count = 0 if 0 in dims else 1
        for dim in dims if count else ():
            # Dimensions come out of the file: the product is never let grow.
            count = count * dim if dim > 0 and count < 1 << 63 else -1
            if count < 0:
                break
        size_bytes = (count * self.bits + 7) // 8
        if not 0 <= size_bytes <= MAX_BYTES:
            raise ModelError(f"{label} has a shape that no tensor can have", "Export the model again.")
        return size_bytes


ELEMENT_TYPES: Mapping[int, ElementType] = {
    1: ElementType("FLOAT", 32, "float_data"),
    2: ElementType("UINT8", 8, "int32_data"),
    3: ElementType("INT8", 8, "int32_data"),
    4: ElementType("UINT16", 16, "int32_data"),
    5: ElementType("INT16", 16, "int32_data"),
    6: ElementType("INT32", 32, "int32_data"),
    7: ElementType("INT64", 64, "int64_data"),
    8: ElementType("STRING", 0, "string_data"),
    9: ElementType("BOOL", 8, "int32_data"),
    10: ElementType("FLOAT16", 16, "int32_data"),
    11: ElementType("DOUBLE", 64, "double_data"),
    12: ElementType("UINT32", 32, "uint64_data"),
    13: ElementType("UINT64", 64, "uint64_data"),
    14: ElementType("COMPLEX64", 64, "float_data"),
    15: ElementType("COMPLEX128", 128, "double_data"),
    16: ElementType("BFLOAT16", 16, "int32_data"),
    17: ElementType("FLOAT8E4M3FN", 8, "int32_data"),
    18: ElementType("FLOAT8E4M3FNUZ", 8, "int32_data"),
    19: ElementType("FLOAT8E5M2", 8, "int32_data"),
    20: ElementType("FLOAT8E5M2FNUZ", 8, "int32_data"),
    21: ElementType("UINT4", 4, "int32_data"),
    22: ElementType("INT4", 4, "int32_data"),
    23: ElementType("FLOAT4E2M1", 4, "int32_data"),
    24: ElementType("FLOAT8E8M0", 8, "int32_data"),
    25: ElementType("UINT2", 2, "int32_data"),
    26: ElementType("INT2", 2, "int32_data"),
    27: ElementType("FLOAT6E2M3", 6, "int32_data"),
    28: ElementType("FLOAT6E3M2", 6, "int32_data"),
}
"""Every element type up to onnx 1.23, by its number. One that is not here is refused: its raw form is not known."""


class WeightsWriter:
    """Hashes the content of one tensor after the other."""

    def __init__(self, digest: StreamDigest, external: ExternalData) -> None:
        self._digest = digest
        self._external = external

    def write(self, tensor: Any, content: Mapping[str, Any]) -> None:
        """Hash the content of a tensor.

        Args:
            tensor: The ``TensorProto``.
            content: Its present fields out of ``CONTENT_FIELDS``; taken from it once, because ``raw_data`` is copied
                each time that it is asked for.

        Raises:
            ModelError: The content cannot be read, is not there once, or does not fit the element type.
        """
        label = f"tensor {tensor.name!r}"
        element = ELEMENT_TYPES.get(tensor.data_type)
        if element is None:
            message = f"{label} has the element type {tensor.data_type}, which is not known here"
            raise ModelError(message, "Export the model again, or upgrade enginecache.")
        storage = _only_storage(content, element, label)
        if content.get("data_location") == tensor.EXTERNAL:
            if storage or element.name == "STRING":
                message = f"{label} is external data, and must not be: it is of strings, or has data of its own too"
                raise ModelError(message, "Save the model and its external data again.")
            self._write_external(tensor, element, label)
        elif element.name == "STRING":
            self._write_strings(content.get(storage, ()))
        elif storage == "raw_data":
            self._write_sized(len(content[storage]), [content[storage]])
        else:
            values = content.get(storage, ())
            size_bytes = (len(values) * element.entry_bits + 7) // 8
            self._write_sized(size_bytes, _raw_slices(values, element, label))

    def _write_sized(self, size_bytes: int, pieces: Iterable[bytes]) -> None:
        self._digest.write(struct.pack("<Q", size_bytes))
        for piece in pieces:
            self._digest.write(piece)

    def _write_strings(self, strings: Sequence[bytes]) -> None:
        self._digest.write(struct.pack("<Q", len(strings)))
        for string in strings:
            self._write_sized(len(string), [string])

    def _write_external(self, tensor: Any, element: ElementType, label: str) -> None:
        extent = Extent.of_entries(tensor.external_data, label)
        size_bytes = element.size_bytes(tensor.dims, label)
        self._digest.write(struct.pack("<Q", size_bytes))
        self._external.write_to(self._digest, extent, size_bytes, label)


def _only_storage(content: Mapping[str, Any], element: ElementType, label: str) -> str:
    """The storage field that holds the elements; empty where there are none.

    Readers differ in which one they prefer, so more than one is refused.
    """
    stored = [name for name in content if name in STORAGE_FIELDS and len(content[name])]
    allowed = {element.field} if element.name == "STRING" else {element.field, "raw_data"}
    if len(stored) > 1 or not allowed.issuperset(stored):
        message = f"{label} is of type {element.name}, and has its data in {' and '.join(sorted(stored))}"
        raise ModelError(message, f"Export the model again; the data belongs in {' or '.join(sorted(allowed))}.")
    return stored[0] if stored else ""


def _raw_slices(values: Sequence[Any], element: ElementType, label: str) -> Iterator[bytes]:
    """The raw form of the entries of a typed storage field, a slice at a time."""
    pack = {"float_data": _raw_floats, "double_data": _raw_doubles}.get(element.field)
    for start in range(0, len(values), SLICE_ELEMENTS):
        entries = values[start : start + SLICE_ELEMENTS]
        yield _raw_integers(entries, element, label) if pack is None else pack(entries)


def _raw_floats(entries: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(entries)}f", *entries)


def _raw_doubles(entries: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(entries)}d", *entries)


def _raw_integers(entries: Sequence[int], element: ElementType, label: str) -> bytes:
    import numpy as np

    numbers = np.array(entries, "<u8" if element.field == "uint64_data" else "<i8")
    # A negative number stands for its bits, as some exporters write floats; but not in an unsigned type, where
    # TensorRT takes the number itself.
    bits = element.entry_bits
    low = 0 if element.name.startswith("U") or bits == 6 else -(1 << bits - 1)
    if not low <= int(numbers.min()) <= int(numbers.max()) < 1 << bits:
        message = f"{label} has numbers in {element.field} that its type {element.name} cannot hold"
        raise ModelError(message, "Export the model again.")
    if bits == 6:
        planes = np.unpackbits(numbers.astype("u1")[:, None], axis=1, bitorder="little")[:, :6]
        return np.packbits(planes, bitorder="little").tobytes()
    return numbers.astype(f"<u{bits // 8}").tobytes()
