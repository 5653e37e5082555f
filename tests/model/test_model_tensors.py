"""The same tensors have the same digest, however they are stored; other tensors have another."""

from __future__ import annotations

import math
import struct

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from small_onnx_models import PLACES, WEIGHT, external, identity_of, in_constant, linear, raw, typed

from enginecache.errors import ModelError
from enginecache.model.tensors import ELEMENT_TYPES, READ_AS_RAW, READ_FROM_FILES, store_raw

OTHER = WEIGHT.copy()
OTHER[2, 3] = np.nextafter(OTHER[2, 3], np.float32(0))


@pytest.fixture
def folder(tmp_path):
    content = WEIGHT.tobytes()
    (tmp_path / "w.bin").write_bytes(content)
    (tmp_path / "shared.bin").write_bytes(bytes(64) + content + OTHER.tobytes())
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_storage_does_not_count_wherever_the_tensor_stands(place, folder):
    expected = identity_of(place(raw()))
    forms = [
        typed(),
        external(raw()),
        external(raw(), length=48),
        external(raw(), "./w.bin", offset=0, length=48, checksum="0" * 40, basepath="elsewhere"),
        external(raw(), "shared.bin", offset=64),
    ]
    for form in forms:
        found = identity_of(place(form), folder)
        assert (found.structure, found.weights) == (expected.structure, expected.weights), form


@pytest.mark.parametrize("place", PLACES)
def test_one_bit_of_a_weight_changes_weights_and_leaves_structure(place, folder):
    expected = identity_of(place(raw()))
    for form in [raw(OTHER), typed(OTHER), external(raw(OTHER), "shared.bin", offset=112, length=48)]:
        found = identity_of(place(form), folder)
        assert found.structure == expected.structure
        assert found.weights != expected.weights
        assert found.digest != expected.digest


@pytest.mark.parametrize(
    "change",
    [{"name": "v"}, {"dims": [4, 3]}, {"data_type": TensorProto.UINT32}, {"segment": {"begin": 0, "end": 12}}],
    ids=lambda change: next(iter(change)),
)
def test_name_type_and_shape_of_a_tensor_are_structure(change):
    tensor = raw()
    for name, value in change.items():
        if name == "dims":
            tensor.dims[:] = value
        elif name == "segment":
            tensor.segment.CopyFrom(TensorProto.Segment(**value))
        else:
            setattr(tensor, name, value)
    before, after = identity_of(in_constant(raw())), identity_of(in_constant(tensor))
    assert after.structure != before.structure
    assert after.weights == before.weights


def test_every_element_type_of_the_onnx_package_is_known():
    known = {number: element.name for number, element in ELEMENT_TYPES.items()}
    for name, number in TensorProto.DataType.items():
        assert number == TensorProto.UNDEFINED or known[number] == name


NUMERIC = [number for number in sorted(ELEMENT_TYPES) if number != TensorProto.STRING]


@pytest.mark.parametrize("number", NUMERIC, ids=lambda number: ELEMENT_TYPES[number].name)
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_storage_counts_only_where_tensorrt_reads_it_differently(number, count, tmp_path):
    if number not in TensorProto.DataType.values():
        pytest.skip("probe: this onnx package has no such element type")
    values = [index % 2 for index in range(count)]
    try:
        in_fields = helper.make_tensor("w", number, [count], values)
        in_bytes = raw_twin(in_fields)
    except (TypeError, ValueError):
        pytest.skip("probe: this onnx package cannot convert such a tensor to raw form")
    name = ELEMENT_TYPES[number].name
    assert len(in_bytes.raw_data) == ELEMENT_TYPES[number].size_bytes([count], "w")
    (tmp_path / "w.bin").write_bytes(in_bytes.raw_data)
    typed_identity, raw_identity = identity_of(linear(in_fields)), identity_of(linear(in_bytes))
    is_misread = count > 0 and name not in READ_AS_RAW
    assert typed_identity.has_misread == is_misread
    assert (typed_identity.digest != raw_identity.digest) == is_misread
    assert not raw_identity.has_misread
    if name in READ_FROM_FILES:
        assert identity_of(linear(external(in_bytes)), tmp_path).digest == raw_identity.digest
    else:
        with pytest.raises(ModelError, match="TensorRT does not have"):
            identity_of(linear(external(in_bytes)), tmp_path)
    if count > 1:
        flipped = helper.make_tensor("w", number, [count], [1 - value for value in values])
        assert identity_of(linear(flipped)).digest not in {typed_identity.digest, raw_identity.digest}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", NUMERIC, ids=lambda number: ELEMENT_TYPES[number].name)
def test_what_tensorrt_misreads_is_stored_raw_wherever_it_stands(place, number):
    if number not in TensorProto.DataType.values():
        pytest.skip("probe: this onnx package has no such element type")
    try:
        in_fields = helper.make_tensor("w", number, [7], [1, 0, 1, 1, 0, 0, 1])
        in_bytes = raw_twin(in_fields)
    except (TypeError, ValueError):
        pytest.skip("probe: this onnx package cannot convert such a tensor to raw form")
    model = place(in_fields)
    is_misread = ELEMENT_TYPES[number].name not in READ_AS_RAW
    assert identity_of(model).has_misread == is_misread
    assert store_raw(model) == is_misread
    assert identity_of(model).digest == identity_of(place(in_bytes)).digest


def raw_twin(tensor: TensorProto) -> TensorProto:
    """The raw form, as the onnx package packs it."""
    array = onnx.numpy_helper.to_array(tensor)
    twin = onnx.numpy_helper.from_array(array, tensor.name)
    if twin.data_type != tensor.data_type:
        message = "an old onnx package, that turns small types into FLOAT"
        raise TypeError(message)
    return twin


@given(st.lists(st.integers(0, 63), max_size=40))
@settings(max_examples=50, deadline=None)
def test_six_bit_elements_are_packed_as_onnx_packs_them(codes):
    if "FLOAT6E2M3" not in TensorProto.DataType.keys():  # noqa: SIM118 - an enum, not a mapping
        pytest.skip("probe: this onnx package has no FLOAT6E2M3")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT6E2M3, dims=[len(codes)], int32_data=codes)
    expected = raw_twin(tensor)
    store_raw(tensor)
    assert tensor.raw_data == expected.raw_data


FLOATS = [(TensorProto.FLOAT, "f", "float_data"), (TensorProto.DOUBLE, "d", "double_data")]


@given(st.lists(st.floats(width=32), max_size=50), st.sampled_from(FLOATS))
@settings(max_examples=50, deadline=None)
def test_floats_have_one_content_in_either_storage(values, kind):
    data_type, form, name = kind
    content = struct.pack(f"<{len(values)}{form}", *values)
    in_fields = TensorProto(name="w", data_type=data_type, dims=[len(values)], **{name: values})
    in_bytes = TensorProto(name="w", data_type=data_type, dims=[len(values)], raw_data=content)
    assert identity_of(linear(in_fields)).digest == identity_of(linear(in_bytes)).digest


@pytest.mark.parametrize("at", [0, 70_000])
@pytest.mark.parametrize(("data_type", "form", "name"), FLOATS)
def test_a_signaling_nan_is_not_the_quiet_one_in_either_storage(data_type, form, name, at):
    """Python's floats cannot hold it, so the field comes from the wire."""
    array = np.zeros(70_001, f"<u{struct.calcsize(form)}")
    digests = set()
    for bits in (0x7FA00001, 0x7FE00001) if form == "f" else (0x7FF4000000000001, 0x7FFC000000000001):
        array[at] = bits
        content = array.tobytes()
        tag = bytes([TensorProto.DESCRIPTOR.fields_by_name[name].number << 3 | 2])
        size = len(content)
        length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
        in_bytes = TensorProto(name="w", data_type=data_type, dims=[len(array)], raw_data=content)
        in_fields = TensorProto(name="w", data_type=data_type, dims=[len(array)])
        in_fields.MergeFromString(tag + length + content)
        digest = identity_of(linear(in_bytes)).digest
        assert identity_of(linear(in_fields)).digest == digest
        digests.add(digest)
    assert len(digests) == 2


def test_typed_storage_of_many_slices_is_whole():
    array = np.arange(200_003, dtype=np.int64)
    assert identity_of(linear(raw(array))).digest == identity_of(linear(typed(array))).digest
    array[131_072] = 0
    assert identity_of(linear(raw(array))).weights == identity_of(linear(typed(array))).weights


def strings(*values: bytes) -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.STRING, dims=[len(values)], string_data=values)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
@settings(max_examples=100, deadline=None)
def test_strings_count_with_their_lengths_and_nuls(left, right):
    digests = [identity_of(linear(strings(*values))).weights for values in (left, right)]
    assert (digests[0] == digests[1]) == (left == right)


def test_the_borders_between_tensors_count():
    def two(first: bytes, second: bytes) -> onnx.ModelProto:
        model = linear()
        del model.graph.initializer[:]
        for name, content in (("a", first), ("b", second)):
            dims = [len(content)]
            model.graph.initializer.add(name=name, data_type=TensorProto.INT8, dims=dims, raw_data=content)
        return model

    assert identity_of(two(b"ab", b"c")).weights != identity_of(two(b"a", b"bc")).weights


@pytest.mark.parametrize("value", [-1, 256, 300])
def test_a_number_that_does_not_fit_its_unsigned_type_is_refused(value):
    # TensorRT takes the number itself, the onnx package its low bits: two readers, two weights.
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[1], int32_data=[value])
    with pytest.raises(ModelError, match="cannot hold"):
        identity_of(linear(tensor))


def test_a_uint32_above_any_int64_is_refused():
    tensor = TensorProto(name="w", data_type=TensorProto.UINT32, dims=[1], uint64_data=[(1 << 64) - 1])
    with pytest.raises(ModelError, match="cannot hold"):
        identity_of(linear(tensor))


def test_a_sign_extended_half_is_its_bits():
    signed = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[1], int32_data=[-1])
    unsigned = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[1], int32_data=[0xFFFF])
    assert identity_of(linear(signed)).digest == identity_of(linear(unsigned)).digest


@pytest.mark.parametrize(
    "fields",
    [
        {"raw_data": b"abc"},
        {"raw_data": b"abcde"},
        {"float_data": []},
        {"float_data": [1.0, 2.0]},
        {"data_type": TensorProto.UINT8, "int32_data": [1, 2]},
        {"data_type": TensorProto.INT4, "dims": [3], "int32_data": [1]},
        {"data_type": TensorProto.STRING, "string_data": [b"a", b"b"]},
        {"raw_data": b"abcd", "float_data": [1.0]},
        {"int64_data": [1]},
        {"double_data": [1.0], "float_data": [1.0]},
        {"string_data": [b"a"]},
        {"data_type": TensorProto.STRING, "raw_data": b"a"},
        {"data_type": TensorProto.UNDEFINED, "raw_data": b"a"},
        {"data_type": 99, "raw_data": b"a"},
        {"data_type": -1},
    ],
    ids=str,
)
def test_content_that_readers_would_take_differently_is_refused(fields):
    with pytest.raises(ModelError, match="tensor 'w'") as caught:
        identity_of(linear(TensorProto(**{"name": "w", "data_type": TensorProto.FLOAT, "dims": [1], **fields})))
    assert caught.value.fix


def test_an_empty_second_storage_is_nothing():
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], float_data=[1.0], raw_data=b"")
    alone = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], float_data=[1.0])
    assert identity_of(linear(tensor)).digest == identity_of(linear(alone)).digest


@given(st.lists(st.integers(0, 9), max_size=5), st.sampled_from(NUMERIC))
def test_size_is_that_of_the_packed_elements(dims, number):
    bits = ELEMENT_TYPES[number].bits
    assert ELEMENT_TYPES[number].size_bytes(dims, "w") == math.ceil(math.prod(dims) * bits / 8)


@pytest.mark.parametrize("dims", [[-1], [1 << 40, 1 << 40], [(1 << 63) - 1] * 100_000, [2, -2]])
def test_a_shape_that_no_tensor_can_have_is_refused_at_once(dims, tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    with pytest.raises(ModelError, match="shape that no tensor can have"):
        identity_of(linear(external(tensor)), tmp_path)
