"""What is done to an ONNX graph before and after its conversion, because the converter does not.

Each step is here for a graph that onnxconverter-common 1.16 was seen to spoil, 2026-11. All change the model in place.
Functions are not looked into: they are inlined before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

FLOAT, FLOAT16 = 1, 10
"""Numbers of ``TensorProto.DataType``."""

WHOLE_NUMBERS = {2, 3, 4, 5, 6, 7, 12, 13}
"""The integer ones among them."""

PASSING = {
    *("Abs", "Add", "Ceil", "Clip", "Div", "Floor", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Range"),
    *("Reciprocal", "Round", "Sqrt", "Sub", "Where"),
    *("Concat", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose"),
    "Unsqueeze",
}
"""Operators that compute each number by itself, or only move it."""

MAX_FP16 = 65504.0
"""The largest finite number."""

AS_GOOD_AS_INFINITE = 1e30

FIRST_IR_WITHOUT_WEIGHTS_AS_INPUTS = 4


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_of(inner)


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of those inside it."""
    return (node for inner in graphs_of(graph) for node in inner.node)


def tensors_of(graph: Any) -> Iterator[Any]:
    """Every ``TensorProto`` of a graph and of those inside it."""
    for inner in graphs_of(graph):
        yield from inner.initializer
        sparse = list(inner.sparse_initializer)
        for attribute in (attribute for node in inner.node for attribute in node.attribute):
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            sparse += [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
            sparse += attribute.sparse_tensors
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def take_weights_from_inputs(model: Any) -> None:
    """List only real inputs as inputs; IR version 3 lists the initializers too, and would get casts for them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    weights.update(tensor.values.name for tensor in model.graph.sparse_initializer)
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, FIRST_IR_WITHOUT_WEIGHTS_AS_INPUTS)


def name_nodes(graph: Any) -> None:
    """Give every node a name that no other has: the converter makes names of tensors from them."""
    taken = {node.name for node in nodes_of(graph)}
    seen = {""}
    for index, node in enumerate(nodes_of(graph)):
        if node.name in seen:
            node.name = _fresh(f"{node.name or node.op_type}_{index}", taken)
        seen.add(node.name)


def separate_outputs(graph: Any) -> None:
    """Give each output a node of its own, for the converter to cast after.

    Nodes that read an output too would be left with FP32; and an output of a node that stays in FP32, or of no node at
    all, would become FP16 although it was to keep its type.
    """
    read = {name for node in nodes_of(graph) for name in node.input}
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    names = [v.name for v in graph.output if v.type.tensor_type.elem_type == FLOAT and v.name in made]
    taken = read | made | {node.name for node in nodes_of(graph)}
    inner = {name: _fresh(f"{name}_inside", taken) for name in names}
    for node in nodes_of(graph):
        for names_of_node in (node.input, node.output):
            for index, name in enumerate(names_of_node):
                names_of_node[index] = inner.get(name, name)
    for tensor in graph.initializer:
        tensor.name = inner.get(tensor.name, tensor.name)
    for name in names:
        graph.node.add(op_type="Identity", name=_fresh(f"{name}_output", taken), input=[inner[name]], output=[name])


def kept_nodes(graph: Any, kept_operators: Collection[str]) -> set[str]:
    """Names of the nodes that must stay in FP32 although their operator need not.

    Nodes whose type is said by an attribute, which the converter leaves as it is; those that compute with shapes, or
    what becomes an index or another whole number, since FP16 has not all of them above 2048; those that read weights
    beyond FP16, which the converter would clamp; and constants that only such nodes read.
    """
    kept = {node.name for node in nodes_of(graph) if _makes_float(node)} | _shape_arithmetic(graph)
    kept |= {name for inner in graphs_of(graph) for name in _index_arithmetic(inner)}
    beyond = _weights_beyond_fp16(graph)
    kept |= {node.name for node in nodes_of(graph) if not beyond.isdisjoint(node.input)}
    readers: dict[str, list[bool]] = {}
    for node in nodes_of(graph):
        is_kept = node.op_type in kept_operators or node.name in kept
        for name in node.input:
            readers.setdefault(name, []).append(is_kept)
    constants = (node for node in nodes_of(graph) if node.op_type == "Constant")
    return kept | {node.name for node in constants if all(readers.get(node.output[0], [False]))}


def _weights_beyond_fp16(graph: Any) -> set[str]:
    """Names of the weights and constants with a number too large for FP16.

    Not those that stand for infinity, as in masks: in FP32 they would be infinite one node later, and a row of nothing
    else then has no softmax; clamped they do what they are for. Nor small ones: nearly every trained weight has some
    that vanish, and the epsilon of a division is safer clamped.
    """
    import numpy as np
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for inner in graphs_of(graph) for tensor in inner.initializer}
    for node in nodes_of(graph):
        if node.op_type == "Constant":
            tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    found = set()
    for name, tensor in tensors.items():
        if tensor.data_type == FLOAT and tensor.data_location != tensor.EXTERNAL:
            sizes = np.abs(numpy_helper.to_array(tensor))
            if bool(((sizes > MAX_FP16) & (sizes < AS_GOOD_AS_INFINITE)).any()):
                found.add(name)
    return found


def _makes_float(node: Any) -> bool:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type in {"RandomNormal", "RandomUniform"}:
        return bool(attributes.get("dtype", FLOAT) == FLOAT)
    if node.op_type == "ConstantOfShape":
        return "value" not in attributes
    if node.op_type == "Constant":
        return not attributes.keys().isdisjoint({"value_float", "value_floats"})
    return FLOAT in {attributes.get("to"), attributes.get("dtype")}


def _shape_arithmetic(graph: Any) -> set[str]:
    """Names of the nodes that read shapes and constants alone; the graph's nodes are in topological order."""
    fixed = {"", *(tensor.name for tensor in graph.initializer)}
    shapes: set[str] = set()
    found = set()
    for node in graph.node:
        inputs = set(node.input) - fixed
        has_graph = any(attribute.HasField("g") for attribute in node.attribute)
        if node.op_type == "Constant":
            fixed.update(node.output)
        elif node.op_type in {"Shape", "Size"}:
            shapes.update(node.output)
        elif inputs and inputs <= shapes and not has_graph:
            shapes.update(node.output)
            found.add(node.name)
    return found


def _index_arithmetic(graph: Any) -> set[str]:
    """Names of the casts to whole numbers, and of the nodes whose numbers those take.

    Back to the first node that does more than pass numbers on.
    """
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [node for node in graph.node if node.op_type == "Cast" and node.attribute[0].i in WHOLE_NUMBERS]
    found = {node.name for node in waiting}
    while waiting:
        for name in waiting.pop().input:
            maker = makers.get(name)
            if maker is not None and maker.op_type in PASSING and maker.name not in found:
                found.add(maker.name)
                waiting.append(maker)
    return found


def separate_weights(graph: Any, is_kept: Callable[[Any], bool]) -> None:
    """Give nodes in FP32 weights of their own: shared ones would stay FP32 for the other nodes too."""
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == FLOAT}
    shared = {name for node in nodes_of(graph) if not is_kept(node) for name in node.input} & weights.keys()
    taken = {*weights, *(name for node in nodes_of(graph) for name in (*node.input, *node.output))}
    copies: dict[str, str] = {}
    for node in filter(is_kept, nodes_of(graph)):
        for index, name in enumerate(node.input):
            if name in shared and name not in copies:
                copies[name] = _fresh(f"{name}_fp32", taken)
                graph.initializer.add().CopyFrom(weights[name])
                graph.initializer[-1].name = copies[name]
            node.input[index] = copies.get(name, name) if name in shared else name


def straighten_casts(graph: Any, names: Collection[str]) -> None:
    """Let nodes in FP32 that follow each other pass FP32 on: the converter casts to FP16 and back between them.

    Args:
        graph: The converted graph.
        names: Names of the nodes that it had before.
    """
    casts = [node for node in nodes_of(graph) if node.op_type == "Cast" and node.name not in names]
    wide = {node.output[0]: node.input[0] for node in casts if node.attribute[0].i == FLOAT16}
    for node in casts:
        if node.attribute[0].i == FLOAT:
            node.input[0] = wide.get(node.input[0], node.input[0])


def _fresh(name: str, taken: set[str]) -> str:
    """``name``, or with underscores after it until nothing is called so; taken from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
