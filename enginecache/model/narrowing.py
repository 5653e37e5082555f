"""Refuse numbers that TensorRT's parser silently cuts to 32 bits, which would build another model.

A static size of 2**32 + 4 becomes 4, one of 2**33 becomes 0, an ``axis`` of 2**32 becomes 0, and a ``Shape`` whose
``end`` is the largest integer loses its last size. Except for that ``end``, no valid graph needs such a number: no
dimension is that large.

Source: networks that TensorRT-RTX 1.7.1 parsed, 2026-11-30, for numbers from 2**31 - 1 to 2**63 - 1. ``Slice`` and
``Constant`` keep 64 bits there. Operators of other domains are left to their plugins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from enginecache.errors import ModelError

LARGEST = 2**31 - 1
SMALLEST = -(2**31)

_PARAMETERS: Mapping[str, int] = {"CumSum": 1, "OneHot": 1, "Resize": 3, "Split": 1}
"""Inputs with sizes and axes that are cut if they are constants; the parser itself refuses the others."""

_INT64 = 7
_MAX_VALUES = 64
"""Largest constant that is examined, in elements: it has one for each dimension or output."""

_WIDE_OPERATORS = frozenset({"Constant", "Slice"})
_FIX = (
    "TensorRT reads it as a 32-bit integer, and would build another model. Export the model with the size that it has."
)


def _is_wide(number: int) -> bool:
    """Return whether a number is cut."""
    return not SMALLEST <= number <= LARGEST


def refuse_wide_dims(label: str, dims: Iterable[object]) -> None:
    """Refuse static sizes that are cut.

    Raises:
        ModelError: One of ``dims`` is; the message begins with ``label``.
    """
    for dim in dims:
        if isinstance(dim, int) and dim > LARGEST:
            raise ModelError(f"{label} has a static size of {dim}: TensorRT has none above {LARGEST}", _FIX)


def refuse_wide_attributes(node: Any) -> None:
    """Refuse a node of ONNX's own operators with an attribute that is cut.

    Raises:
        ModelError: It has one; the message names both.
    """
    if node.domain not in {"", "ai.onnx"} or node.op_type in _WIDE_OPERATORS:
        return
    for attribute in node.attribute:
        found = next(filter(_is_wide, (attribute.i, *attribute.ints)), None)
        if found is not None:
            raise ModelError(f"{_label(node)} has {attribute.name} {found}, beyond 32 bits", _FIX)


class WideParameterFinder:
    """Finder of parameters that are cut. Give it every node and every tensor of a model once, in any order.

    It distinguishes tensors by name alone.
    """

    def __init__(self) -> None:
        self._wide: dict[str, int] = {}
        self._parameters: dict[str, str] = {}

    def see_tensor(self, tensor: Any, content: Mapping[str, Any]) -> None:
        """Note a ``TensorProto`` whose content has a number that is cut, under its name."""
        refuse_wide_dims(f"tensor {tensor.name!r}", tensor.dims)
        if tensor.data_type == _INT64:
            self._note(tensor.name, content)

    def see_node(self, node: Any) -> None:
        """Note the parameters of a ``NodeProto``, and the values of a constant."""
        index = _PARAMETERS.get(node.op_type)
        if index is not None and len(node.input) > index:
            self._parameters[node.input[index]] = _label(node)
        elif node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                numbers = [attribute.i] if attribute.name == "value_int" else attribute.ints
                self._note(node.output[0], {"int64_data": numbers})
                if attribute.t.data_type == _INT64:
                    content = {"int64_data": attribute.t.int64_data}
                    if len(attribute.t.dims) <= 1 and sum(attribute.t.dims) <= _MAX_VALUES:
                        content["raw_data"] = attribute.t.raw_data
                    self._note(node.output[0], content)

    def refuse(self) -> None:
        """Raise for the first parameter that is cut.

        Raises:
            ModelError: There is one; the message names the node.
        """
        for name, label in self._parameters.items():
            if name in self._wide:
                raise ModelError(f"{label} takes {self._wide[name]} from {name!r}, beyond 32 bits", _FIX)

    def _note(self, name: str, content: Mapping[str, Any]) -> None:
        found = next(filter(_is_wide, _numbers(content)), None)
        if found is not None:
            self._wide[name] = found


def _numbers(content: Mapping[str, Any]) -> Sequence[int]:
    data = content.get("raw_data", b"")
    if data and len(data) % 8 == 0 and len(data) <= _MAX_VALUES * 8:
        return struct.unpack(f"<{len(data) // 8}q", data)
    typed = content.get("int64_data", ())
    return tuple(typed) if len(typed) <= _MAX_VALUES else ()


def _label(node: Any) -> str:
    return f"{node.op_type} node {node.name!r}" if node.name else f"{node.op_type} node of {', '.join(node.output)}"
