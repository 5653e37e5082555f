"""Changes of an ONNX graph before and after its conversion that the converter does not make.

Each step is here for a graph that onnxconverter-common 1.16 was seen to spoil, 2026-11. All change the model in place.
Functions are not looked into: they are inlined before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from graphlib import TopologicalSorter
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
    """Yield a graph and those inside its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_of(inner)


def nodes_of(graph: Any) -> Iterator[Any]:
    """Return the nodes of a graph and of those inside it."""
    return (node for inner in graphs_of(graph) for node in inner.node)


def tensors_of(graph: Any) -> Iterator[Any]:
    """Yield every ``TensorProto`` of a graph and of those inside it."""
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


def import_domains(model: Any) -> None:
    """Give the domain of every node an opset, and ONNX's own its shorter name.

    TensorRT goes by neither; shape inference fails without the one, and the converter knows no other name.
    """
    own = ("", "ai.onnx")
    for entry in (*model.opset_import, *nodes_of(model.graph)):
        if entry.domain in own:
            entry.domain = ""
    known = {entry.domain for entry in model.opset_import}
    for domain in sorted({node.domain for node in nodes_of(model.graph)} - known):
        model.opset_import.add(domain=domain, version=1)


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
    """Return the names of the nodes that must stay in FP32 although their operator need not.

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
    """Return the names of the weights and constants with a number too large for FP16.

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
    """Return the names of the nodes that read shapes and constants alone, in a graph in topological order."""
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
    """Return the names of the casts to whole numbers, and of the nodes whose numbers those take.

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
    """Give nodes in FP32 weights of their own.

    Shared ones would stay FP32 for the other nodes too; and of a graph inside a node, the converter looks at the
    weights of that graph alone.
    """
    weights = {tensor.name: tensor for inner in graphs_of(graph) for tensor in inner.initializer}
    weights = {name: tensor for name, tensor in weights.items() if tensor.data_type == FLOAT}
    shared = {name for node in nodes_of(graph) if not is_kept(node) for name in node.input} & weights.keys()
    taken = {*weights, *(name for node in nodes_of(graph) for name in (*node.input, *node.output))}
    for inner in list(graphs_of(graph)):
        own = {tensor.name for tensor in inner.initializer}
        copies: dict[str, str] = {}
        for node in filter(is_kept, inner.node):
            for index, name in enumerate(node.input):
                if name not in weights or (name in own and name not in shared):
                    continue
                if name not in copies:
                    copies[name] = _fresh(f"{name}_fp32", taken)
                    inner.initializer.add().CopyFrom(weights[name])
                    inner.initializer[-1].name = copies[name]
                node.input[index] = copies[name]


def straighten_casts(graph: Any, names: Collection[str]) -> None:
    """Let nodes in FP32 that follow each other pass FP32 on: the converter casts to FP16 and back between them.

    Args:
        graph: The converted graph.
        names: Names of the nodes that it had before.
    """
    casts = [node for node in nodes_of(graph) if node.op_type == "Cast" and node.name not in names]
    wide = {node.output[0]: node.input[0] for node in casts if node.attribute[0].i == FLOAT16}
    same = {}
    for node in casts:
        if node.attribute[0].i == FLOAT and node.input[0] in wide:
            node.input[0] = wide[node.input[0]]
            same[node.output[0]] = node.input[0]
    outputs = {value.name for inner in graphs_of(graph) for value in inner.output}
    # What reads such a cast reads its input: a few operators want an input of the network itself.
    for node in nodes_of(graph):
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
    for inner in graphs_of(graph):
        idle = same.keys() - outputs
        if any(node.output[:1] and node.output[0] in idle for node in inner.node):
            _keep_nodes(inner, [node for node in inner.node if not node.output[:1] or node.output[0] not in idle])


def join_outputs(graph: Any, own: Collection[str], stays: Collection[str]) -> None:
    """Let those of the model's ``own`` nodes that are in ``stays`` make outputs themselves, without a cast after them.

    TensorRT takes ``TensorScatter`` only where its output is one of the network.
    """
    outputs = list(dict.fromkeys(value.name for value in graph.output))
    for name in outputs:
        makers = {name: node for node in graph.node for name in node.output}
        between, made = [], name
        while made in makers and makers[made].name not in own and makers[made].op_type in {"Cast", "Identity"}:
            between.append(makers[made])
            made = makers[made].input[0]
        if not between or made not in makers or makers[made].name not in stays or made in outputs:
            continue
        _keep_nodes(graph, [node for node in graph.node if name not in node.output])
        for node in nodes_of(graph):
            for names in (node.input, node.output):
                names[:] = [name if each == made else each for each in names]
        for node in between[1:]:
            if not any(node.output[0] in other.input for other in nodes_of(graph)):
                _keep_nodes(graph, [other for other in graph.node if other.output[:1] != node.output[:1]])


def set_outputs_aside(graph: Any) -> list[str]:
    """Leave each output once, and none that is an input; return the names of all, for :func:`restore_outputs`.

    The converter takes neither; TensorRT takes a tensor once that stands twice among the outputs.
    """
    order = list(dict.fromkeys(value.name for value in graph.output))
    inputs = {value.name for value in graph.input}
    values = {value.name: value for value in graph.output}
    kept = [values[name] for name in order if name not in inputs]
    del graph.output[:]
    graph.output.extend(kept)
    return order


def restore_outputs(graph: Any, order: Sequence[str]) -> None:
    """List the outputs in ``order``; an output that is an input has that one's type."""
    values = {value.name: value for value in (*graph.input, *graph.output)}
    outputs = [values[name] for name in order]
    del graph.output[:]
    graph.output.extend(outputs)


def separate_inner_graphs(graph: Any) -> None:
    """Give graphs inside nodes outputs that a node of theirs makes, and no inputs of the whole graph.

    The converter skips a graph without nodes, and casts the inputs of the whole graph for its own nodes alone.
    """
    taken = _names_in(graph)
    for inner in list(graphs_of(graph))[1:]:
        made = {name for node in inner.node for name in node.output}
        for value in inner.output:
            if value.name not in made:
                name = _fresh(f"{value.name}_result", taken)
                inner.node.add(
                    op_type="Identity", name=_fresh(f"{name}_node", taken), input=[value.name], output=[name]
                )
                value.name = name
    read = {name for node in graph.node for name in _captured(node)}
    for value in graph.input:
        if value.name in read and value.type.tensor_type.elem_type == FLOAT:
            _pass_on(graph, list(graph.node), value.name, taken)


def separate_kept_graphs(graph: Any, kept: Collection[str], floats: Collection[str]) -> set[str]:
    """Let nodes with graphs that stay in FP32 read what is around them in FP32; return the names of new such nodes.

    The converter casts a node's inputs, and not what a graph inside it takes from outside.

    Args:
        graph: The whole graph.
        kept: Names of the nodes that stay in FP32.
        floats: Names of its FP32 tensors.
    """
    taken = _names_in(graph)
    found = set()
    for node in list(graph.node):
        if node.name in kept:
            for name in sorted(_captured(node) & set(floats)):
                found.add(_pass_on(graph, [node], name, taken))
    return found


def name_captures(graph: Any, is_kept: Callable[[Any], bool]) -> None:
    """Say the types of what FP32 nodes of inner graphs read from outside: the converter casts what it knows of."""
    values = {
        value.name: value for inner in graphs_of(graph) for value in (*inner.input, *inner.value_info, *inner.output)
    }
    for inner in list(graphs_of(graph))[1:]:
        known = {value.name for value in (*inner.input, *inner.value_info, *inner.output)}
        for name in dict.fromkeys(name for node in filter(is_kept, inner.node) for name in node.input):
            if name in values and name not in known and values[name].type.tensor_type.elem_type == FLOAT:
                inner.value_info.add().CopyFrom(values[name])


def floats_of(graph: Any) -> set[str]:
    """Return the names of the FP32 tensors of the outermost graph that are not weights, as far as types are known."""
    weights = {tensor.name for tensor in graph.initializer}
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == FLOAT} - weights


def nodes_inside(node: Any) -> Iterator[Any]:
    """Yield the nodes of the graphs inside a node, at any depth."""
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from nodes_of(inner)


def name_unused_outputs(graph: Any) -> set[str]:
    """Give a name to omitted outputs: the converter sorts nodes by names, and mistakes an empty one for a name.

    Returns:
        The names, for :func:`unname`.
    """
    taken = _names_in(graph)
    found = set()
    for node in nodes_of(graph):
        for index, name in enumerate(node.output):
            if not name:
                node.output[index] = _fresh(f"{node.name}_unused_{index}", taken)
                found.add(node.output[index])
    return found


def unname(graph: Any, names: Collection[str]) -> None:
    """Undo :func:`name_unused_outputs`."""
    for node in nodes_of(graph):
        for index, name in enumerate(node.output):
            if name in names:
                node.output[index] = ""


def sort_nodes(graph: Any) -> None:
    """Put every node behind those that it depends on: the converter forgets what inner graphs read from outside."""
    for inner in list(graphs_of(graph)):
        makers = {name: index for index, node in enumerate(inner.node) for name in node.output if name}
        needs = {
            index: sorted(
                {makers[name] for name in (*node.input, *_captured(node)) if makers.get(name, index) != index}
            )
            for index, node in enumerate(inner.node)
        }
        if any(before > index for index, found in needs.items() for before in found):
            _keep_nodes(inner, [inner.node[index] for index in TopologicalSorter(needs).static_order()])


def _keep_nodes(graph: Any, nodes: Sequence[Any]) -> None:
    """Leave these nodes, in this order."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _captured(node: Any) -> set[str]:
    """Return the names that the graphs inside a node read, their own among them."""
    inside: set[str] = set()
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            inside.update(value.name for value in graph.output)
            for inner in nodes_of(graph):
                inside.update(inner.input)
    return inside


def _pass_on(graph: Any, nodes: Sequence[Any], name: str, taken: set[str]) -> str:
    """Give a tensor a second name, by which the graphs inside ``nodes`` read it; return the name of the new node."""
    inner_name = _fresh(f"{name}_captured", taken)
    for node in (inside for outer in nodes for inside in nodes_inside(outer)):
        for index, read in enumerate(node.input):
            node.input[index] = inner_name if read == name else read
    identity = graph.node.add(op_type="Identity", name=_fresh(f"{inner_name}_node", taken))
    identity.input.append(name)
    identity.output.append(inner_name)
    return str(identity.name)


def _names_in(graph: Any) -> set[str]:
    """Return the names of all nodes and tensors."""
    names = {name for node in nodes_of(graph) for name in (node.name, *node.input, *node.output)}
    for inner in graphs_of(graph):
        names.update(value.name for value in (*inner.input, *inner.output, *inner.value_info, *inner.initializer))
    return names


def _fresh(name: str, taken: set[str]) -> str:
    """Return ``name``, with underscores after it until it is unused, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
