"""The structure digest: the fields that count, and that no others do."""

from __future__ import annotations

import struct

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, NodeProto, helper
from small_onnx_models import LIGHT, identity_of, in_constant, in_function, in_if, linear, model_of, raw

from enginecache.errors import ModelError
from enginecache.model import ModelSource, identify
from enginecache.model.graph import StructureWriter


def messages_of(message):
    """Every message at and below this one."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for below in [value] if hasattr(value, "ListFields") else value:
                yield from messages_of(below)


def structure_of(message) -> str:
    writer = StructureWriter(lambda _tensor, _content: None)
    writer.write(type(message).FromString(message.SerializeToString()))
    return writer.hexdigest()


def change_attribute(model):
    model.graph.node[0].attribute.add(name="alpha", type=AttributeProto.FLOAT, f=1.5)


CHANGES = {
    "node name": lambda m: setattr(m.graph.node[0], "name", "other"),
    "node removed name": lambda m: m.graph.node[0].ClearField("name"),
    "operator": lambda m: setattr(m.graph.node[0], "op_type", "Gemm"),
    "attribute": change_attribute,
    "node output": lambda m: m.graph.node[0].output.append("z"),
    "static size": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 4),
    "dynamic size's name": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "n"),
    "negative for no size": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -1),
    "input name": lambda m: setattr(m.graph.input[0], "name", "x2"),
    "output name": lambda m: setattr(m.graph.output[0], "name", "y2"),
    "input type": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 10),
    "opset": lambda m: setattr(m.opset_import[0], "version", 19),
    "opset domain": lambda m: m.opset_import.add(domain="custom", version=1),
    "producer that TensorRT's parser looks for": lambda m: setattr(m, "producer_name", "TensorRT"),
    "metadata for TensorRT": lambda m: m.graph.node[0].metadata_props.add(key="trt_layer_precision", value="fp16"),
    "training info": lambda m: m.training_info.add(),
    "tensor name": lambda m: setattr(m.graph.initializer[0], "name", "v"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_decides_the_engine_changes_structure_and_leaves_weights(change):
    model = linear()
    before = identity_of(model)
    change(model)
    after = identity_of(model)
    assert after.structure != before.structure
    assert after.weights == before.weights
    assert after.digest != before.digest


METADATA = {
    "producer": lambda m: setattr(m, "producer_name", "exporter"),
    "producer version": lambda m: setattr(m, "producer_version", "2.9.1"),
    "model version": lambda m: setattr(m, "model_version", 7),
    "domain": lambda m: setattr(m, "domain", "org.example"),
    "ir version": lambda m: setattr(m, "ir_version", 9),
    "graph name": lambda m: setattr(m.graph, "name", "other"),
    "date": lambda m: m.metadata_props.add(key="date", value="2026-11-03T11:30:00"),
    "same key twice": lambda m: [m.metadata_props.add(key="date", value=day) for day in ("Monday", "Tuesday")],
    "metadata of the graph": lambda m: m.graph.metadata_props.add(key="git", value="abc"),
    "metadata of a node": lambda m: m.graph.node[0].metadata_props.add(key="namespace", value="a/b"),
    "metadata of an input": lambda m: m.graph.input[0].metadata_props.add(key="pkg.torch.kind", value="user"),
    "metadata of a tensor": lambda m: m.graph.initializer[0].metadata_props.add(key="scale", value="0.5"),
}


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_what_only_tells_of_the_export_changes_nothing(change):
    model = linear()
    before = identity_of(model)
    change(model)
    assert identity_of(model) == before


def test_the_name_of_a_graph_inside_a_node_counts():
    # TensorRT makes names of layers from it.
    model = in_if(raw())
    before = identity_of(model)
    model.graph.node[0].attribute[0].g.name = "another"
    assert identity_of(model).structure != before.structure


def test_value_info_counts_apart_from_the_graph():
    model = linear()
    before = identity_of(model)
    assert not before.value_info
    model.graph.value_info.add(name="hidden")
    after = identity_of(model)
    assert (after.structure, after.weights) == (before.structure, before.weights)
    assert after.value_info
    assert after.digest != before.digest


def test_the_graph_that_value_info_stands_in_counts():
    def noted(branch: str):
        model = in_if(raw())
        attribute = next(a for a in model.graph.node[0].attribute if a.name == branch)
        attribute.g.value_info.add(name="hidden")
        return identity_of(model).value_info

    assert noted("then_branch") != noted("else_branch")


def test_order_of_value_info_counts():
    one, other = linear(), linear()
    one.graph.value_info.add(name="a")
    one.graph.value_info.add(name="b")
    other.graph.value_info.add(name="b")
    other.graph.value_info.add(name="a")
    assert identity_of(one).digest != identity_of(other).digest


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_doc_strings_and_exporter_noise_do_not_count_in_real_models(path):
    model = onnx.load(path)
    before = identity_of(model)
    for message in list(messages_of(model)):
        fields = message.DESCRIPTOR.fields_by_name
        if "doc_string" in fields:
            message.doc_string = "exported from /home/someone/train.py"
        if "metadata_props" in fields:
            message.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File train.py, line 7")
    after = identity_of(model)
    assert (after.structure, after.weights) == (before.structure, before.weights)


@pytest.mark.parametrize("make", [in_constant, in_if, in_function])
def test_noise_inside_subgraphs_and_tensors_does_not_count_but_what_is_for_tensorrt_does(make):
    model = make(raw())
    before = identity_of(model)
    tensor = next(message for message in messages_of(model) if isinstance(message, onnx.TensorProto))
    tensor.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="line 1")
    tensor.doc_string = "a weight"
    assert identity_of(model).digest == before.digest
    tensor.metadata_props.add(key="TensorRT.scale", value="0.5")
    assert identity_of(model).structure != before.structure


def test_a_noise_key_outside_metadata_counts():
    model = linear()
    model.graph.quantization_annotation.add(tensor_name="w")
    before = identity_of(model)
    annotation = model.graph.quantization_annotation[0]
    annotation.quant_parameter_tensor_names.add(key="pkg.torch.onnx.stack_trace", value="s")
    assert identity_of(model).structure != before.structure


TEXT = st.text(max_size=3)
ATTRIBUTES = st.builds(
    AttributeProto,
    name=TEXT,
    type=st.sampled_from(AttributeProto.AttributeType.values()),
    i=st.none() | st.integers(-3, 3),
    f=st.none() | st.sampled_from([0.0, -0.0, 1.0]),
    s=st.none() | st.binary(max_size=3),
    ints=st.lists(st.integers(-2, 2), max_size=3),
    floats=st.lists(st.sampled_from([0.0, 1.0]), max_size=3),
    strings=st.lists(st.binary(max_size=2), max_size=3),
)
NODES = st.builds(
    NodeProto,
    name=st.none() | TEXT,
    op_type=TEXT,
    input=st.lists(TEXT, max_size=3),
    output=st.lists(TEXT, max_size=3),
    attribute=st.lists(ATTRIBUTES, max_size=2),
)


@given(NODES, NODES)
@settings(max_examples=300, deadline=None)
def test_two_nodes_share_a_digest_only_if_they_are_the_same(left, right):
    is_same = left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True)
    assert (structure_of(left) == structure_of(right)) == is_same


@given(NODES)
@settings(max_examples=50, deadline=None)
def test_the_digest_is_the_same_each_time(node):
    assert structure_of(node) == structure_of(node)


def float_attribute(bits: int, *, many: bool = False) -> AttributeProto:
    """An attribute whose float has these bits: no float of Python's holds a signaling NaN."""
    content = struct.pack("<I", bits)
    fields = b"\x3a\x04" if many else b"\x15"  # floats, packed; f
    wire_type = AttributeProto.FLOATS if many else AttributeProto.FLOAT
    return AttributeProto.FromString(b"\x0a\x01a" + fields + content + b"\xa0\x01" + bytes([wire_type]))


@pytest.mark.parametrize("many", [False, True])
def test_a_signaling_nan_in_an_attribute_is_not_the_quiet_one(many):
    nans = [0x7FA00000, 0x7FE00000, 0x7FC00000, 0xFFC00000]
    attributes = [float_attribute(bits, many=many) for bits in nans]
    graphs = [onnx.GraphProto(node=[NodeProto(op_type="Custom", attribute=[one])]) for one in attributes]
    assert len(set(map(structure_of, graphs))) == len(nans)
    models = [onnx.ModelProto(functions=[onnx.FunctionProto(name="f", attribute_proto=[one])]) for one in attributes]
    assert len(set(map(structure_of, models))) == len(nans)


def test_a_field_that_is_set_to_its_default_is_not_a_field_that_is_missing():
    assert structure_of(NodeProto(op_type="Relu")) != structure_of(NodeProto(op_type="Relu", name=""))


def test_text_cannot_move_between_neighbouring_fields():
    left, right = NodeProto(input=["ab", "c"]), NodeProto(input=["a", "bc"])
    assert structure_of(left) != structure_of(right)
    assert structure_of(NodeProto(input=["a"], output=["b"])) != structure_of(NodeProto(input=["a", "b"]))


def test_a_name_that_is_not_utf8_counts_by_its_bytes():
    model = linear()
    data = model.SerializeToString()
    assert data.count(b"matmul") == 1
    names = [b"matmul", b"matmu\xff", b"matmu\xfe"]
    digests = {identify(ModelSource.of(data.replace(b"matmul", name))).digest for name in names}
    assert len(digests) == 3


def test_lists_longer_than_one_slice_are_whole():
    node = helper.make_node("Custom", ["x"], ["y"], domain="custom", table=list(range(150_000)))
    before = identity_of(model_of([node], []))
    node.attribute[0].ints[131_073] = 0
    assert identity_of(model_of([node], [])).structure != before.structure


def varint_field(number: int, value: int = 1) -> bytes:
    tag, out = number << 3, b""
    while tag > 127:
        out, tag = out + bytes([tag & 127 | 128]), tag >> 7
    return out + bytes([tag, value])


@pytest.mark.parametrize(
    "kind",
    ["ModelProto", "GraphProto", "NodeProto", "AttributeProto", "TensorProto", "ValueInfoProto", "TypeProto"],
)
def test_an_unknown_field_anywhere_is_refused(kind):
    model = in_constant(raw())
    model.graph.initializer.add().CopyFrom(raw(name="v"))
    message = next(message for message in messages_of(model) if type(message).__name__ == kind)
    message.MergeFromString(varint_field(1999))
    with pytest.raises(ModelError, match="does not know") as caught:
        identity_of(model)
    assert "pgrade" in caught.value.fix


def field(number: int, content: bytes) -> bytes:
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return head + length + content


def in_graphs(levels: int, extra: bytes) -> bytes:
    """A graph inside a graph, with something more on the wire in the innermost one."""
    graph = field(2, b"inner") + extra
    for _ in range(levels):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute)) + field(2, b"g")
    return linear().SerializeToString() + field(7, graph)


def in_types(levels: int, extra: bytes) -> bytes:
    """A sequence of sequences, with something more on the wire in the innermost type."""
    kind = field(1, b"\x08\x01") + extra
    for _ in range(levels):
        kind = field(4, field(1, kind))
    return linear().SerializeToString() + field(7, field(13, field(1, b"v") + field(2, kind)))


UNKNOWN = {
    "field": b"\xfa\x3f\x04evil",
    "group": b"\xfb\x3f\xfb\x3f\xfc\x3f\xfc\x3f",
    "wrong type": b"\x0d\x00\x00\x00\x00",  # field 1 as a fixed number
}


@pytest.mark.parametrize("extra", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize(("make", "levels"), [(in_graphs, range(32)), (in_types, range(47))])
def test_an_unknown_field_is_refused_at_any_depth_that_protobuf_reads(make, levels, extra):
    for level in levels:
        assert identify(ModelSource.of(make(level, b""))).digest
        with pytest.raises(ModelError, match="does not know"):
            identify(ModelSource.of(make(level, extra)))
    with pytest.raises(ModelError, match="nested too deeply"):
        identify(ModelSource.of(make(levels.stop + 3, extra)))


@pytest.mark.parametrize("place", ["external_data", "metadata_props", "segment"])
def test_an_unknown_field_inside_what_is_left_out_is_refused(place):
    model = linear()
    tensor = model.graph.initializer[0]
    below = tensor.segment if place == "segment" else getattr(tensor, place).add(key="pkg.torch.onnx.stack_trace")
    below.MergeFromString(varint_field(1999))
    with pytest.raises(ModelError, match="does not know"):
        identity_of(model)


def test_an_unknown_enum_value_is_refused():
    model = in_constant(raw())
    model.graph.node[0].attribute[0].MergeFromString(varint_field(20, 99))
    with pytest.raises(ModelError, match="does not know"):
        identity_of(model)


def test_an_unknown_data_location_is_refused():
    model = linear()
    model.graph.initializer[0].MergeFromString(varint_field(14, 2))
    with pytest.raises(ModelError, match="does not know"):
        identity_of(model)
