"""Small real models, and tensors in each form that ONNX knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginecache.model import ModelIdentity, ModelSource, identify

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def identity_of(model: onnx.ModelProto, folder: Path | None = None) -> ModelIdentity:
    return identify(ModelSource.of(model.SerializeToString(), folder))


def raw(array: np.ndarray = WEIGHT, name: str = "w") -> TensorProto:
    return numpy_helper.from_array(array, name)


def typed(array: np.ndarray = WEIGHT, name: str = "w") -> TensorProto:
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, data_type, array.shape, array.ravel().tolist())


def external(tensor: TensorProto, location: str = "w.bin", **entries: object) -> TensorProto:
    """The same tensor, with its content said to be in a file."""
    moved = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    moved.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        moved.external_data.add(key=key, value=str(value))
    return moved


def linear(weight: TensorProto | None = None) -> onnx.ModelProto:
    """``y = x @ w``, with a dynamic batch."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")
    return model_of([node], [raw() if weight is None else weight])


def model_of(nodes: list[onnx.NodeProto], initializers: list[TensorProto], **fields: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        initializers,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)], **fields)


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return linear(tensor)


def in_constant(tensor: TensorProto) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    return model_of([constant, helper.make_node("MatMul", ["x", "w"], ["y"])], [])


def in_if(tensor: TensorProto) -> onnx.ModelProto:
    branch = in_constant(tensor).graph
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=linear().graph)
    return model_of([node], [raw(np.ones((), np.bool_), "condition")])


def in_loop(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Loop", ["trips", ""], ["y"], body=linear(tensor).graph)
    return model_of([node], [raw(np.array(3), "trips")])


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    body = list(in_constant(tensor).graph.node)
    function = helper.make_function("local", "Linear", ["x"], ["y"], body, [helper.make_opsetid("", 20)])
    return model_of([helper.make_node("Linear", ["x"], ["y"], domain="local")], [], functions=[function])


def in_sparse(tensor: TensorProto) -> onnx.ModelProto:
    model = linear()
    del model.graph.initializer[:]
    indices = raw(np.arange(12), "")
    model.graph.sparse_initializer.add(values=tensor, indices=indices, dims=[3, 4])
    return model


def in_training(tensor: TensorProto) -> onnx.ModelProto:
    model = linear()
    model.training_info.add(initialization=linear(tensor).graph)
    return model


def in_tensor_list(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Custom", ["x"], ["y"], domain="custom", tensors=[raw(), tensor])
    return model_of([node], [])


def in_sparse_list(tensor: TensorProto) -> onnx.ModelProto:
    model = in_tensor_list(raw())
    attribute = model.graph.node[0].attribute.add(name="sparse", type=onnx.AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add(values=tensor, indices=raw(np.arange(12), ""), dims=[3, 4])
    return model


PLACES = [
    in_initializer,
    in_constant,
    in_if,
    in_loop,
    in_function,
    in_sparse,
    in_training,
    in_tensor_list,
    in_sparse_list,
]
