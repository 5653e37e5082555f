"""Quantized types that are found in a model."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_onnx_models import external, identity_of, model_of, raw

from enginecache.files.plain import from_plain, to_plain
from enginecache.model import ModelIdentity

SCALE = raw(np.float32(0.5), "scale")


def zero_point(data_type: int, name: str = "zero") -> TensorProto:
    return helper.make_tensor(name, data_type, [], [0])


def quantize(*more: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", ["x", "scale", *more], ["q"], **attributes)


def dequantize(*more: str, data: str = "q") -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [data, "scale", *more], ["y"])


def found_in(nodes, initializers=(), **fields) -> tuple[str, ...]:
    return identity_of(model_of(list(nodes), [SCALE, *initializers], **fields)).quantization


def graph_of(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "inner", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])


@pytest.mark.parametrize(
    ("data_type", "name"),
    [
        (TensorProto.INT8, "int8"),
        (TensorProto.UINT8, "uint8"),
        (TensorProto.INT16, "int16"),
        (TensorProto.FLOAT8E4M3FN, "fp8"),
        (TensorProto.INT4, "int4"),
        (TensorProto.FLOAT4E2M1, "fp4"),
    ],
)
def test_zero_point_tells_the_type(data_type, name):
    nodes = [quantize("zero"), dequantize("zero")]
    assert found_in(nodes, [zero_point(data_type)]) == (name,)
    assert found_in(nodes[:1], [zero_point(data_type)]) == (name,)
    assert found_in(nodes[1:], [zero_point(data_type)]) == (name,)


def test_model_without_quantized_nodes_has_no_types():
    relu = helper.make_node("Relu", ["x"], ["y"])
    assert found_in([relu], [zero_point(TensorProto.INT8)]) == ()


def test_quantize_without_zero_point_is_what_its_attribute_says_or_uint8():
    assert found_in([quantize(output_dtype=TensorProto.INT8)]) == ("int8",)
    assert found_in([quantize(output_dtype=0)]) == ("uint8",)
    assert found_in([quantize()]) == ("uint8",)


def test_dequantize_without_zero_point_has_the_type_of_its_weights():
    weights = raw(np.zeros((3, 4), np.int8), "w")
    assert found_in([dequantize(data="w")], [weights]) == ("int8",)
    assert found_in([dequantize("", data="w")], [weights]) == ("int8",)


def test_int32_of_a_bias_is_no_quantized_type():
    assert found_in([dequantize("zero", data="b")], [raw(np.zeros(4, np.int32), "b"), zero_point(6)]) == ()


def test_external_weights_and_constant_nodes_tell_it_too(tmp_path):
    weights = raw(np.zeros((3, 4), np.int8), "w")
    (tmp_path / "w.bin").write_bytes(weights.raw_data)
    assert identity_of(model_of([dequantize(data="w")], [SCALE, external(weights)]), tmp_path).quantization == ("int8",)
    constant = helper.make_node("Constant", [], ["zero"], value=zero_point(TensorProto.INT8, "another name"))
    assert found_in([constant, quantize("zero")]) == ("int8",)


def test_inner_graphs_and_functions_are_looked_into():
    branch = graph_of(quantize("zero"), dequantize("zero"))
    condition = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=graph_of(quantize()))
    assert found_in([condition], [zero_point(TensorProto.INT8)]) == ("int8", "uint8")
    function = helper.make_function(
        "own", "f", ["x", "scale"], ["q"], [quantize(output_dtype=3)], [helper.make_opsetid("", 21)]
    )
    assert found_in([helper.make_node("f", ["x", "scale"], ["y"], domain="own")], functions=[function]) == ("int8",)


@pytest.mark.parametrize(
    ("operator", "types"),
    [
        ("TRT_FP8QuantizeLinear", ("fp8",)),
        ("TRT_MXFP8DynamicQuantize", ("fp8",)),
        ("TRT_FP4DynamicQuantize", ("fp4",)),
        ("TRT_INT4DequantizeLinear", ("int4",)),
        ("TRT_FP8Attention", ()),
    ],
)
def test_tensorrts_own_operators_count(operator, types):
    assert found_in([helper.make_node(operator, ["x", "scale"], ["y"], domain="trt")]) == types


def test_types_survive_the_memos_record():
    identity = identity_of(model_of([quantize("zero"), dequantize()], [SCALE, zero_point(TensorProto.INT8)]))
    assert identity.quantization == ("int8",)
    assert from_plain(ModelIdentity, to_plain(identity)) == identity


def test_fifty_thousand_nodes_are_walked_in_time():
    nodes = [quantize("zero") if index % 2 else dequantize("zero") for index in range(50_000)]
    data = model_of(nodes, [SCALE, zero_point(TensorProto.INT8)])
    started = time.process_time()
    assert identity_of(data).quantization == ("int8",)
    assert time.process_time() - started < 1.5
