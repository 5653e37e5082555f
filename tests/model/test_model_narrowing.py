"""Numbers beyond 32 bits, which TensorRT's parser cuts: refused, and not built as another model."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_onnx_models import identity_of

from enginecache.errors import ModelError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WIDE = [2**31, 2**32, 2**32 + 4, 2**33, 2**63 - 1, -(2**31) - 1]


def model(nodes, dims=(1, 1, 4, 4), weights=()):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, dims)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        list(weights),
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def relu(dims):
    return model([helper.make_node("Relu", ["x"], ["y"])], dims)


@pytest.mark.parametrize("size", [2**31, 2**32, 2**32 + 4, 2**33])
def test_static_size_that_tensorrt_would_cut_names_the_input(size):
    with pytest.raises(ModelError, match=f"input 'x' of .* has a static size of {size}"):
        identity_of(relu(["batch", size]))


def test_largest_static_size_is_read():
    assert identity_of(relu([2**31 - 1])).inputs[0].dims == (2**31 - 1,)


@pytest.mark.parametrize("number", WIDE)
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("Softmax", "axis"), ("Shape", "end"), ("Concat", "axis"), ("MaxPool", "strides"), ("DepthToSpace", "blocksize")],
)
def test_attribute_that_tensorrt_would_cut_names_the_node(operator, attributes, number):
    value = [1, number] if attributes == "strides" else number
    with pytest.raises(ModelError, match=rf"{operator} node 'n' has {attributes} {number}, beyond 32 bits"):
        identity_of(model([helper.make_node(operator, ["x"], ["y"], "n", **{attributes: value})]))


def test_attribute_of_a_node_inside_a_node_is_seen():
    inner = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["z"], axis=2**32)],
        "inner",
        [],
        [helper.make_tensor_value_info("z", FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    with pytest.raises(ModelError, match="Softmax node of z has axis 4294967296"):
        identity_of(model([node], weights=[numpy_helper.from_array(np.ones((), np.bool_), "c")]))


@pytest.mark.parametrize("is_constant_node", [False, True])
@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize(
    ("operator", "inputs"), [("Split", ["x", "p"]), ("CumSum", ["x", "p"]), ("Resize", ["x", "", "", "p"])]
)
def test_parameter_that_tensorrt_would_cut_names_the_node(operator, inputs, is_raw, is_constant_node):
    numbers = np.array([1, 2**32 + 1])
    tensor = numpy_helper.from_array(numbers, "p") if is_raw else helper.make_tensor("p", INT64, [2], numbers)
    constant = [helper.make_node("Constant", [], ["p"], value=tensor)] if is_constant_node else []
    nodes = [*constant, helper.make_node(operator, inputs, ["y"], "n")]
    with pytest.raises(ModelError, match=f"{operator} node 'n' takes 4294967297 from 'p'"):
        identity_of(model(nodes, weights=[] if is_constant_node else [tensor]))


def test_numbers_that_tensorrt_reads_in_64_bits_stay():
    largest = numpy_helper.from_array(np.array([2**63 - 1]), "end")
    start = numpy_helper.from_array(np.array([0]), "start")
    nodes = [
        helper.make_node("Slice", ["x", "start", "end"], ["y"]),
        helper.make_node("Constant", [], ["c"], value_int=2**40),
        helper.make_node("LeakyRelu", ["x"], ["z"], alpha=1e30),
        helper.make_node("Own", ["x"], ["o"], domain="own", number=2**40),
    ]
    assert identity_of(model(nodes, weights=[largest, start]))


def test_old_slice_keeps_its_largest_end():
    old = model([helper.make_node("Slice", ["x"], ["y"], starts=[0], ends=[2**63 - 1])])
    old.opset_import[0].version = 9
    assert identity_of(old)


@pytest.mark.parametrize("size", [2**31, 2**33])
def test_size_of_a_tensor_that_tensorrt_would_cut_names_it(size):
    empty = helper.make_tensor("w", FLOAT, [0, size], [])
    with pytest.raises(ModelError, match=f"tensor 'w' has a static size of {size}"):
        identity_of(model([helper.make_node("Concat", ["x", "w"], ["y"], axis=0)], weights=[empty]))
