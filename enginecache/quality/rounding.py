"""A graph of FP16 or BF16 as one of FP32 that rounds every intermediate, so that a CPU computes what the types say.

ONNX Runtime's CPU has few kernels for the two types. It computes such nodes in FP32, and leaves out the casts between
them: 1e5 in FP16 stays 1e5, and no overflow is seen. Here every value of the two types becomes FP32, and goes through
two casts, to its type and back, which ONNX Runtime keeps: they are the model's own.

Source: ONNX Runtime 1.23.2 and 1.32.0, at every optimization level, 2026-12; :func:`enginecache.quality.reference`
tries it anew in each process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
"""Numbers of ``TensorProto.DataType``."""

NARROW = (FLOAT16, BFLOAT16)

LARGE_BYTES = 1 << 16
"""Tensors above this size tell no shapes, and take no part in type inference."""

_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype"}
_SEQUENCE_OPERATORS = {"SplitToSequence", "SequenceConstruct", "SequenceInsert", "SequenceEmpty", "SequenceErase"}


def round_every_value(model: Any) -> Any:
    """Return the model with each value of FP16 or BF16 in FP32, rounded to its type. Changes the one that is given.

    Inputs of the two types become FP32 too; whoever feeds them rounds. Weights keep their type, and are cast.
    Accumulations inside a node are not rounded; TensorRT has them in FP32 or FP16, as its tactics want.

    Args:
        model: A ``ModelProto`` without functions, with or without its external data.
    """
    _rewrite(model.graph, _narrow_types(model))
    return model


def round_to(array: Any, element_type: int) -> Any:
    """Return an FP32 array rounded to FP16 or BF16, as FP32."""
    import numpy as np

    array = np.asarray(array, np.float32)
    if element_type == FLOAT16:
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    bits = array.view(np.uint32)
    # Round half to even: the bit that stays decides.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _narrow_types(model: Any) -> dict[str, int]:
    """Return the type of each value of FP16 or BF16, by name; names are unique over a graph and those inside it."""
    import onnx

    # A copy without its weights: inference takes no more than 2 GiB.
    light = onnx.ModelProto()
    weights = [(tensor, tensor.raw_data) for tensor in model.graph.initializer if len(tensor.raw_data) > LARGE_BYTES]
    for tensor, _ in weights:
        tensor.ClearField("raw_data")
    light.CopyFrom(model)
    for tensor, data in weights:
        tensor.raw_data = data
    types: dict[str, int] = {}
    for graph in _graphs(onnx.shape_inference.infer_shapes(light).graph):
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        types |= {value.name: _element_type(value.type) for value in (*graph.input, *graph.value_info, *graph.output)}
        # Loop and Scan keep no types of what is inside them.
        for node in graph.node:
            types |= {name: kind for name, kind in _output_types(node, types).items() if name not in types}
    return {name: kind for name, kind in types.items() if kind in NARROW}


def _element_type(kind: Any) -> int:
    which = kind.WhichOneof("value")
    if which == "tensor_type":
        return int(kind.tensor_type.elem_type)
    if which in {"sequence_type", "optional_type"}:
        return _element_type(getattr(kind, which).elem_type)
    return 0


def _output_types(node: Any, types: dict[str, int]) -> dict[str, int]:
    """Return the types of a node's outputs that its inputs and attributes tell."""
    named = next((a.i for a in node.attribute if a.name in _TYPE_ATTRIBUTES and a.i), None)
    if named is not None:
        return dict.fromkeys(node.output, int(named))
    tensor = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
    if tensor is not None:
        return dict.fromkeys(node.output, int(tensor.data_type))
    return _types_by_schema(node, types)


def _types_by_schema(node: Any, types: dict[str, int]) -> dict[str, int]:
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, domain=node.domain)
    except onnx.defs.SchemaError:
        return {}
    variables: dict[str, int] = {}
    for index, name in enumerate(node.input):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
        if formal is not None and name in types:
            variables.setdefault(formal.type_str, types[name])
    found = {}
    for index, name in enumerate(node.output):
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        if name and formal.type_str in variables:
            found[name] = variables[formal.type_str]
    return found


def _rewrite(graph: Any, types: dict[str, int]) -> None:
    """Rewrite a graph and those inside its nodes."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        _widen_type(value.type)
    nodes = []
    for tensor in graph.initializer:
        if tensor.data_type in NARROW:
            nodes.append(_cast(f"{tensor.name}__narrow", tensor.name, FLOAT))
            tensor.name = f"{tensor.name}__narrow"
    for node in graph.node:
        nodes += _rewritten(node, types)
    del graph.node[:]
    graph.node.extend(nodes)


def _rewritten(node: Any, types: dict[str, int]) -> list[Any]:
    """Return the node, and the casts that round what it makes."""
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            _rewrite(inner, types)
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in NARROW:
            attribute.i = FLOAT
        if attribute.HasField("t") and attribute.t.data_type in NARROW:
            _widen_tensor(attribute.t)
    casts = []
    for index, name in enumerate(node.output):
        if name in types and node.op_type not in _SEQUENCE_OPERATORS:
            node.output[index] = f"{name}__wide"
            casts.append(_cast(f"{name}__wide", f"{name}__rounded", types[name]))
            casts.append(_cast(f"{name}__rounded", name, FLOAT))
    return [node, *casts]


def _cast(source: str, result: str, kind: int) -> Any:
    import onnx

    return onnx.helper.make_node("Cast", [source], [result], f"{result}__cast", to=kind)


def _widen_type(kind: Any) -> None:
    which = kind.WhichOneof("value")
    if which == "tensor_type" and kind.tensor_type.elem_type in NARROW:
        kind.tensor_type.elem_type = FLOAT
    elif which in {"sequence_type", "optional_type"}:
        _widen_type(getattr(kind, which).elem_type)


def _widen_tensor(tensor: Any) -> None:
    import numpy as np
    import onnx

    array = np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
