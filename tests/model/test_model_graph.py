"""What counts in the structure, and that nothing else does."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, NodeProto, helper
from small_onnx_models import LIGHT, identity_of, in_constant, in_function, in_if, linear, model_of, raw

from enginecache.errors import ModelError
from enginecache.model import ModelSource, identify
from enginecache.model.graph import NOISE_KEYS, StructureWriter


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
    "ir version": lambda m: setattr(m, "ir_version", 9),
    "producer": lambda m: setattr(m, "producer_name", "other"),
    "model version": lambda m: setattr(m, "model_version", 7),
    "graph name": lambda m: setattr(m.graph, "name", "other"),
    "metadata": lambda m: m.metadata_props.add(key="stride", value="32"),
    "namespace": lambda m: m.graph.node[0].metadata_props.add(key="namespace", value="a/b"),
    "value info": lambda m: m.graph.value_info.add(name="hidden"),
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


def test_order_of_value_info_counts():
    one, other = linear(), linear()
    one.graph.value_info.add(name="a")
    one.graph.value_info.add(name="b")
    other.graph.value_info.add(name="b")
    other.graph.value_info.add(name="a")
    assert identity_of(one).structure != identity_of(other).structure


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_doc_strings_and_exporter_noise_do_not_count_in_real_models(path):
    model = onnx.load(path)
    before = identity_of(model)
    for message in list(messages_of(model)):
        fields = message.DESCRIPTOR.fields_by_name
        if "doc_string" in fields:
            message.doc_string = "exported from /home/someone/train.py"
        if "metadata_props" in fields:
            for key in NOISE_KEYS:
                message.metadata_props.add(key=key, value="File /home/someone/train.py, line 7")
    after = identity_of(model)
    assert (after.structure, after.weights) == (before.structure, before.weights)


@pytest.mark.parametrize("make", [in_constant, in_if, in_function])
def test_noise_inside_subgraphs_and_tensors_does_not_count_but_a_fact_does(make):
    model = make(raw())
    before = identity_of(model)
    tensor = next(message for message in messages_of(model) if isinstance(message, onnx.TensorProto))
    tensor.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="line 1")
    tensor.doc_string = "a weight"
    assert identity_of(model).digest == before.digest
    tensor.metadata_props.add(key="scale", value="0.5")
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
