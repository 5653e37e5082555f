"""Hash the content of tensors in one form, independent of where and how they are stored.

The content is that of ``raw_data``, whether the tensor uses it or not: the elements in little-endian order, those of
less than eight bits packed from the low bits up. A tensor of strings has no raw form; its content is each string with
its length. In the digest::

    weights  := "enginecache/weights/v2" LF content*      in the order of the walk through the structure
    content  := form(u8) size_bytes(u64) byte*            any type but STRING
              | form(u8) count(u64) (size_bytes(u64) byte*)*    STRING
    form     := 0                                         raw data, or what TensorRT reads as it
              | 1                                         a typed field that TensorRT is not known to read so

TensorRT and onnx would read other values from a tensor of form 1, so the builder receives it as raw data
(:func:`store_raw`). Its digest still differs, because other programs may read the file as it is.

Source: onnx.proto, the comments at ``TensorProto``; onnx-tensorrt 10.1, WeightsContext.cpp, and the networks that
TensorRT-RTX 1.7.1 parses, for what TensorRT reads: docs/identity.md has the table, and a test measures it again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from enginecache.errors import ModelError
from enginecache.files.digest import StreamDigest
from enginecache.model.external import MAX_BYTES, Extent, ExternalData

WEIGHTS_DOMAIN = b"enginecache/weights/v2\n"

_STORAGE_FIELDS = frozenset(
    {"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"}
)
"""The fields of ``TensorProto`` that hold elements; a tensor may use only one."""

_AS_RAW, _AS_TYPED = 0, 1
"""Forms of a tensor's content in the digest."""

CONTENT_FIELDS = _STORAGE_FIELDS | {"external_data", "data_location"}
"""The fields of ``TensorProto`` that contain its elements or their location."""

READ_AS_RAW = frozenset(
    {"FLOAT", "INT8", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "BFLOAT16", "INT4", "FLOAT4E2M1"}
)
"""Types whose typed field TensorRT reads like raw data.

For UINT8 and FLOAT8E4M3FN it takes the bytes of ``int32_data`` for the elements themselves: 10, 20, 30 becomes 10, 0,
0, 0, 20. It refuses the other types, today.
"""

READ_FROM_FILES = READ_AS_RAW | {"UINT8", "FLOAT8E4M3FN"}
"""Types whose external data TensorRT reads like raw data.

It takes external data of a type that it lacks (UINT16, INT16, UINT32, UINT64, complex numbers) for FLOAT, and reads
past the tensor's end; it refuses the same tensor in raw data.
"""

_SLICE_ELEMENTS = 1 << 16
"""Elements converted at a time: protobuf returns typed elements as Python objects of 40 bytes each.

A multiple of four, so that slices of six-bit elements end on whole bytes.
"""


@dataclass(frozen=True)
class _ElementType:
    """Storage of one ONNX element type.

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
        """Return the size in bytes of the raw form of a tensor of this shape.

        Raises:
            ModelError: A dimension is negative, or the size is more than any file can have.
        """
        size_bytes = (_element_count(dims, label) * self.bits + 7) // 8
        if size_bytes > MAX_BYTES:
            raise _impossible(label)
        return size_bytes


def _element_count(dims: Sequence[int], label: str) -> int:
    """Return the number of elements of a tensor of this shape.

    Raises:
        ModelError: A dimension is negative, or they are more than any file can hold.
    """
    count = 0 if 0 in dims else 1
    for dim in dims if count else ():
        # The dimensions come from the file: stop before the product grows huge.
        if dim < 0 or count > MAX_BYTES:
            raise _impossible(label)
        count *= dim
    return count


def _impossible(label: str) -> ModelError:
    return ModelError(f"{label} has a shape that no tensor can have", "Export the model again.")


ELEMENT_TYPES: Mapping[int, _ElementType] = {
    1: _ElementType("FLOAT", 32, "float_data"),
    2: _ElementType("UINT8", 8, "int32_data"),
    3: _ElementType("INT8", 8, "int32_data"),
    4: _ElementType("UINT16", 16, "int32_data"),
    5: _ElementType("INT16", 16, "int32_data"),
    6: _ElementType("INT32", 32, "int32_data"),
    7: _ElementType("INT64", 64, "int64_data"),
    8: _ElementType("STRING", 0, "string_data"),
    9: _ElementType("BOOL", 8, "int32_data"),
    10: _ElementType("FLOAT16", 16, "int32_data"),
    11: _ElementType("DOUBLE", 64, "double_data"),
    12: _ElementType("UINT32", 32, "uint64_data"),
    13: _ElementType("UINT64", 64, "uint64_data"),
    14: _ElementType("COMPLEX64", 64, "float_data"),
    15: _ElementType("COMPLEX128", 128, "double_data"),
    16: _ElementType("BFLOAT16", 16, "int32_data"),
    17: _ElementType("FLOAT8E4M3FN", 8, "int32_data"),
    18: _ElementType("FLOAT8E4M3FNUZ", 8, "int32_data"),
    19: _ElementType("FLOAT8E5M2", 8, "int32_data"),
    20: _ElementType("FLOAT8E5M2FNUZ", 8, "int32_data"),
    21: _ElementType("UINT4", 4, "int32_data"),
    22: _ElementType("INT4", 4, "int32_data"),
    23: _ElementType("FLOAT4E2M1", 4, "int32_data"),
    24: _ElementType("FLOAT8E8M0", 8, "int32_data"),
    25: _ElementType("UINT2", 2, "int32_data"),
    26: _ElementType("INT2", 2, "int32_data"),
    27: _ElementType("FLOAT6E2M3", 6, "int32_data"),
    28: _ElementType("FLOAT6E3M2", 6, "int32_data"),
}
"""Every element type up to onnx 1.23, by its number. Any other is refused: its raw form is unknown."""


class WeightsWriter:
    """Hasher of the content of one tensor after the other.

    Attributes:
        has_misread: Whether one was in a typed field that TensorRT is not known to read like raw data.
    """

    def __init__(self, digest: StreamDigest, external: ExternalData) -> None:
        self._digest = digest
        self._external = external
        self.has_misread = False

    def write(self, tensor: Any, content: Mapping[str, Any]) -> None:
        """Hash the content of a tensor.

        Args:
            tensor: The ``TensorProto``.
            content: Its present fields out of ``CONTENT_FIELDS``; taken from it once, because each access copies
                ``raw_data``.

        Raises:
            ModelError: The content cannot be read, is missing or duplicated, or does not fit the element type.
        """
        label = f"tensor {tensor.name!r}"
        element = ELEMENT_TYPES.get(tensor.data_type)
        if element is None:
            message = f"{label} has the element type {tensor.data_type}, which is not known here"
            raise ModelError(message, "Export the model again, or upgrade enginecache.")
        storage = _only_storage(content, element, label)
        if content.get("data_location") == tensor.EXTERNAL:
            if storage or element.name == "STRING":
                message = f"{label} is external data, which is not allowed: it contains strings, or has inline data too"
                raise ModelError(message, "Save the model and its external data again.")
            self._write_external(tensor, element, label)
        elif element.name == "STRING":
            self._write_strings(tensor, content.get(storage, ()), label)
        elif storage == "raw_data":
            data = content[storage]
            _require_size(tensor, element, len(data), label)
            self._digest.write(_head(_AS_RAW, len(data)))
            self._digest.write(data)
        else:
            self._write_typed(tensor, content.get(storage, ()), element, label)

    def _write_typed(self, tensor: Any, values: Sequence[Any], element: _ElementType, label: str) -> None:
        wanted = -(-_element_count(tensor.dims, label) * element.bits // element.entry_bits)
        if len(values) != wanted:
            raise _wrong_size(label, f"{len(values)} entries", str(wanted))
        size_bytes = element.size_bytes(tensor.dims, label)
        is_misread = bool(values) and element.name not in READ_AS_RAW
        self.has_misread |= is_misread
        self._digest.write(_head(_AS_TYPED if is_misread else _AS_RAW, size_bytes))
        for piece in _raw_slices(tensor, values, element, label):
            self._digest.write(piece)

    def _write_strings(self, tensor: Any, strings: Sequence[bytes], label: str) -> None:
        if _element_count(tensor.dims, label) != len(strings):
            raise _wrong_size(label, f"{len(strings)} strings", str(_element_count(tensor.dims, label)))
        self._digest.write(_head(_AS_TYPED, len(strings)))
        for string in strings:
            self._digest.write(struct.pack("<Q", len(string)))
            self._digest.write(string)

    def _write_external(self, tensor: Any, element: _ElementType, label: str) -> None:
        if element.name not in READ_FROM_FILES:
            message = f"{label} is external data of type {element.name}, which TensorRT does not have and may misread"
            raise ModelError(message, "Export the model with another type for it, such as INT32 or FLOAT.")
        extent = Extent.of_entries(tensor.external_data, label)
        size_bytes = element.size_bytes(tensor.dims, label)
        self._digest.write(_head(_AS_RAW, size_bytes))
        self._external.write_to(self._digest, extent, size_bytes, label)


def store_raw(message: Any) -> int:
    """Move the content that TensorRT would misread into ``raw_data``, in every tensor at and below a message.

    The message must have been identified: nothing is checked again.

    Returns:
        Number of tensors that were changed.
    """
    count = 0
    for field, value in message.ListFields():
        if field.message_type is not None:
            below = [value] if hasattr(value, "ListFields") else value
            count += sum(map(store_raw, below))
    if message.DESCRIPTOR.name == "TensorProto":
        element = ELEMENT_TYPES[message.data_type]
        values = getattr(message, element.field)
        if len(values) and element.name not in READ_AS_RAW | {"STRING"}:
            message.raw_data = b"".join(_raw_slices(message, values, element, f"tensor {message.name!r}"))
            message.ClearField(element.field)
            count += 1
    return count


def _head(form: int, size_bytes: int) -> bytes:
    return struct.pack("<BQ", form, size_bytes)


def _require_size(tensor: Any, element: _ElementType, size_bytes: int, label: str) -> None:
    wanted = element.size_bytes(tensor.dims, label)
    if size_bytes != wanted:
        raise _wrong_size(label, f"{size_bytes} bytes", str(wanted))


def _wrong_size(label: str, found: str, wanted: str) -> ModelError:
    message = f"{label} has {found} of content, and its shape and type ask for {wanted}"
    return ModelError(message, "Export or download the model again.")


def _only_storage(content: Mapping[str, Any], element: _ElementType, label: str) -> str:
    """Return the storage field that holds the elements; empty if there are none.

    Readers differ in the one that they prefer, so more than one is refused.
    """
    stored = [name for name in content if name in _STORAGE_FIELDS and len(content[name])]
    allowed = {element.field} if element.name == "STRING" else {element.field, "raw_data"}
    if len(stored) > 1 or not allowed.issuperset(stored):
        message = f"{label} is of type {element.name}, and has its data in {' and '.join(sorted(stored))}"
        raise ModelError(message, f"Export the model again; the data belongs in {' or '.join(sorted(allowed))}.")
    return stored[0] if stored else ""


def _raw_slices(tensor: Any, values: Sequence[Any], element: _ElementType, label: str) -> Iterator[bytes]:
    """Yield the raw form of the entries of a typed storage field, a slice at a time."""
    form = {"float_data": "f", "double_data": "d"}.get(element.field)
    for start in range(0, len(values), _SLICE_ELEMENTS):
        entries = values[start : start + _SLICE_ELEMENTS]
        if form is None:
            yield _raw_integers(entries, element, label)
        elif isnan(sum(entries)):  # also true for opposite infinities: no harm
            # Python's floats quiet a signaling NaN; TensorRT copies it as it is.
            yield _serialized(tensor, element.field)[start * element.entry_bits // 8 :]
            return
        else:
            yield struct.pack(f"<{len(entries)}{form}", *entries)


def _serialized(tensor: Any, field: str) -> bytes:
    """Return the entries of a field of floats in protobuf's encoding, bit by bit; needs twice their memory."""
    copy = type(tensor)()
    copy.CopyFrom(tensor)
    for other, _ in copy.ListFields():
        if other.name != field:
            copy.ClearField(other.name)
    copy.DiscardUnknownFields()
    size_bytes = len(getattr(copy, field)) * (4 if field == "float_data" else 8)
    return bytes(copy.SerializeToString()[-size_bytes:])


def _raw_integers(entries: Sequence[int], element: _ElementType, label: str) -> bytes:
    import numpy as np

    numbers = np.array(entries, "<u8" if element.field == "uint64_data" else "<i8")
    # A negative number stands for its bits, as some exporters write floats. Not in an unsigned type, where TensorRT
    # takes the number itself.
    bits = element.entry_bits
    low = 0 if element.name.startswith("U") or bits == 6 else -(1 << bits - 1)
    if not low <= int(numbers.min()) <= int(numbers.max()) < 1 << bits:
        message = f"{label} has numbers in {element.field} that its type {element.name} cannot hold"
        raise ModelError(message, "Export the model again.")
    if bits == 6:
        planes = np.unpackbits(numbers.astype("u1")[:, None], axis=1, bitorder="little")[:, :6]
        return np.packbits(planes, bitorder="little").tobytes()
    return numbers.astype(f"<u{bits // 8}").tobytes()
