"""Find the types that a model's Q/DQ nodes quantize to, during the walk through its structure.

A ``QuantizeLinear`` names its type in one of two places: the zero point, or ``output_dtype`` (opset 21 and later).
Without either it is ``uint8``. A ``DequantizeLinear`` without a zero point has the type of its input.

Source: ONNX, operators QuantizeLinear and DequantizeLinear, opsets 10 to 25; onnx-tensorrt 10.16,
``onnxOpImporters.cpp``, for TensorRT's own ``TRT_`` operators.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_QUANTIZED_TYPES: Mapping[int, str] = {
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    17: "fp8",  # FLOAT8E4M3FN, the only one of the four that TensorRT takes
    21: "uint4",
    22: "int4",
    23: "fp4",
}
"""Numbers of ``TensorProto.DataType``. INT32 is not here: that is how a quantized layer's bias is stored."""

_DEFAULT_TYPE = 2
"""Type of a ``QuantizeLinear`` that names none."""

_OWN_OPERATOR = re.compile(r"TRT_(?:MX)?(?P<name>FP8|INT8|INT4|FP4)(?:Quantize|Dequantize|Dynamic)")


class QuantizationFinder:
    """Finder of quantized types. Give it every node and every tensor of a model once, in any order.

    It distinguishes tensors by name alone: an inner graph that reuses a name with another type could add a type that
    the model does not have. The builder would then refuse the model.
    """

    def __init__(self) -> None:
        self._types: dict[str, int] = {}
        self._asked: set[str] = set()
        self._found: set[int] = set()
        self._own: set[str] = set()

    def see_tensor(self, tensor: Any) -> None:
        """Note the type of a ``TensorProto``, under its name."""
        if tensor.data_type in _QUANTIZED_TYPES:
            self._types[tensor.name] = tensor.data_type

    def see_node(self, node: Any) -> None:
        """Note what a ``NodeProto`` quantizes to. Cheap for the nodes that do not."""
        operator = node.op_type  # protobuf returns bytes if it is not UTF-8
        if operator == "Constant":
            self._see_constant(node)
        elif operator == "QuantizeLinear":
            self._see_quantize(node)
        elif operator == "DequantizeLinear":
            self._asked.add(_input(node, 2) or _input(node, 0))
        elif isinstance(operator, str) and operator.startswith("TRT_"):
            match = _OWN_OPERATOR.match(operator)
            self._own.update(() if match is None else (match["name"].lower(),))

    def types(self) -> tuple[str, ...]:
        """Return the types found, sorted: ``int8``, ``fp8``, ..."""
        found = self._found | {self._types[name] for name in self._asked if name in self._types}
        return tuple(sorted({_QUANTIZED_TYPES[number] for number in found if number in _QUANTIZED_TYPES} | self._own))

    def _see_constant(self, node: Any) -> None:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type in _QUANTIZED_TYPES and node.output:
                self._types[node.output[0]] = attribute.t.data_type

    def _see_quantize(self, node: Any) -> None:
        zero_point = _input(node, 2)
        if zero_point:
            self._asked.add(zero_point)
            return
        named = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype"]
        self._found.add((named[0] if named else 0) or _DEFAULT_TYPE)  # 0: ONNX's own default, "not named"


def _input(node: Any, index: int) -> str:
    """Return the name of an input; empty if it is omitted."""
    return str(node.input[index]) if len(node.input) > index else ""
