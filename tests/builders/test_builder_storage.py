"""Models of one digest hold the same constants for TensorRT, however their tensors are stored.

The whole matrix of element types and forms of storage, read by the real parser as a build reads it; and plans built of
those that TensorRT-RTX takes. ``docs/identity.md`` has the table, as ``pytest -s`` prints it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from builder_models import profile, request_for, tensor
from onnx import TensorProto, helper, numpy_helper

from enginecache.errors import ModelError
from enginecache.key.precision import Conversion
from enginecache.model import ModelSource, identify
from enginecache.model.tensors import ELEMENT_TYPES, READ_AS_RAW, READ_FROM_FILES

HERE = Path(__file__).parent
COUNT = 8
QUANTIZED = {"INT8", "INT4", "FLOAT4E2M1", "FLOAT8E4M3FN"}
"""Types whose constants TensorRT takes before a DequantizeLinear alone; the others it casts."""

NUMBERS = [
    number
    for number, element in ELEMENT_TYPES.items()
    if number in TensorProto.DataType.values() and element.name != "STRING"
]


def contents(number: int) -> tuple[TensorProto, bytes]:
    """A tensor in its typed field, and its raw form."""
    values = [1, 0, 1, 1, 0, 0, 1, 0] if ELEMENT_TYPES[number].bits == 2 or number == TensorProto.BOOL else None
    typed = helper.make_tensor("w", number, [COUNT], values or [1, 2, 4, 1, 2, 4, 1, 2])
    try:
        raw = numpy_helper.from_array(numpy_helper.to_array(typed), "w")
    except (TypeError, ValueError):
        pytest.skip("probe: this onnx package cannot convert such a tensor to raw form")
    assert raw.data_type == number
    return typed, raw.raw_data


def blank(number: int) -> TensorProto:
    return TensorProto(name="w", data_type=number, dims=[COUNT])


def forms(number: int, folder: Path) -> dict[str, TensorProto]:
    """The tensor in every form that a file may have it in; the names of the good ones come first."""
    typed, content = contents(number)
    field = ELEMENT_TYPES[number].field
    found = {"raw_data": blank(number), "typed field": typed}
    found["raw_data"].raw_data = content
    for name, offset in (("external", 0), ("external, unaligned", 3)):
        location = f"{number}-{offset}.bin"
        (folder / location).write_bytes(bytes(offset) + content + b"\xff" * 40)
        outside = found[name] = blank(number)
        outside.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": len(content)}.items():
            outside.external_data.add(key=key, value=str(value))
    for name, data in {"raw_data, short": content[:-1], "raw_data, long": content + b"\1"}.items():
        found[name] = blank(number)
        found[name].raw_data = data
    entries = list(getattr(typed, field))
    for name, values in {"typed field, short": entries[:-1], "typed field, long": [*entries, entries[0]]}.items():
        found[name] = blank(number)
        getattr(found[name], field).extend(values)
    both = found["both"] = blank(number)
    both.CopyFrom(typed)
    both.raw_data = content
    other = "int64_data" if field != "int64_data" else "int32_data"
    getattr(found.setdefault("wrong field", blank(number)), other).extend([1] * COUNT)
    return found


GOOD = ("raw_data", "typed field", "external", "external, unaligned")
BAD = ("raw_data, short", "raw_data, long", "typed field, short", "typed field, long", "both", "wrong field")


def model_with(weights: TensorProto, *, in_constant: bool = False) -> onnx.ModelProto:
    """``y = x + float(w)``."""
    nodes, tensors = [], [weights]
    if in_constant:
        nodes, tensors = [helper.make_node("Constant", [], ["w"], value=weights)], []
    if ELEMENT_TYPES[weights.data_type].name in QUANTIZED:
        nodes.append(helper.make_node("DequantizeLinear", ["w", "scale"], ["f"]))
        tensors.append(numpy_helper.from_array(np.array(0.5, np.float32), "scale"))
    else:
        nodes.append(helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Add", ["x", "f"], ["y"]))
    graph = helper.make_graph(nodes, "graph", [tensor("x", [COUNT])], [tensor("y", [COUNT])], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
    """Return the result for every type, form and place: from their names to lines of ``parsed_networks.py``."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("probe: no module tensorrt_rtx")
    folder, work = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("work")
    paths = {}
    for number in NUMBERS:
        for form, weights in forms(number, folder).items():
            for place in ("initializer", "constant"):
                path = folder / f"{len(paths)}.onnx"
                path.write_bytes(model_with(weights, in_constant=place == "constant").SerializeToString())
                paths[ELEMENT_TYPES[number].name, form, place] = path
    done = subprocess.run(
        [sys.executable, HERE / "parsed_networks.py", work, *paths.values()],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(paths, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.rtx
@pytest.mark.parametrize("place", ["initializer", "constant"])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: ELEMENT_TYPES[number].name)
def test_models_of_one_digest_have_the_constants_of_the_raw_form(number, place, readings):
    name = ELEMENT_TYPES[number].name
    raw, *others = (readings[name, form, place] for form in GOOD)
    for form, reading in zip(GOOD[1:], others, strict=True):
        if reading.get("refused") == "enginecache":
            assert form.startswith("external")
            assert name not in READ_FROM_FILES
        else:
            assert reading.get("constants") == raw.get("constants"), form
            assert reading.get("refused") == raw.get("refused"), form
            is_one = reading["digest"] == raw["digest"]
            assert is_one == (form.startswith("external") or name in READ_AS_RAW), form
    assert {readings[name, form, place].get("refused") for form in BAD} == {"enginecache"}


@pytest.mark.rtx
def test_the_types_that_tensorrt_takes_are_the_ones_that_may_be_external(readings):
    taken = {name for (name, form, _), reading in readings.items() if form == "raw_data" and "constants" in reading}
    assert taken == READ_FROM_FILES


@pytest.mark.rtx
def test_the_table_of_types_and_storage_has_forty_pairs_and_more(readings):
    lines = []
    for name in (ELEMENT_TYPES[number].name for number in NUMBERS):
        cells = []
        for form in ("raw_data", "typed field", "external"):
            reading = readings[name, form, "initializer"]
            key = reading.get("digest", "")[:8]
            cells.append(f"refused by {reading['refused']}" if "refused" in reading else key)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("", "| type | raw_data | typed field | external |", *lines, sep="\n")
    assert len(readings) > len(lines) * len(GOOD) >= 40


PLANNED = sorted(READ_FROM_FILES - QUANTIZED)


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_plans_of_every_storage_hold_the_numbers_of_the_file(name, builder, tmp_path):
    (number,) = (number for number in NUMBERS if ELEMENT_TYPES[number].name == name)
    every = forms(number, tmp_path)
    numbers = numpy_helper.to_array(every["raw_data"]).astype(np.float32)
    for form in ("raw_data", "typed field", "external"):
        request = request_for(tmp_path, model_with(every[form]))
        assert numbers.tobytes() in builder.build(request).plan_path.read_bytes(), form


@pytest.mark.rtx
def test_a_misread_tensor_is_stored_raw_for_bytes_and_beside_external_data(builder, tmp_path):
    """The copy that the builder is given finds the external data of the others, and a dynamic size stays one."""
    typed, _ = contents(TensorProto.UINT8)
    model = model_with(typed)
    other = forms(TensorProto.FLOAT, tmp_path)["external"]
    other.name = "v"
    model.graph.initializer.append(other)
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(helper.make_node("Mul", ["z", "v"], ["y"]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    wanted = np.array([1, 2, 4, 1, 2, 4, 1, 2], np.float32).tobytes()
    profiles = (profile(x=((COUNT,), (COUNT,), (COUNT,))),)
    for source in (model, ModelSource.of(model.SerializeToString(), tmp_path)):
        request = request_for(tmp_path, source, profiles=profiles)
        plan = builder.build(request)
        assert wanted in plan.plan_path.read_bytes()
        assert "given to TensorRT as raw data" in request.log_path.read_text()


@pytest.mark.rtx
def test_a_misread_tensor_is_stored_raw_before_the_graph_is_converted(builder, tmp_path):
    pytest.importorskip("onnxconverter_common", reason="probe: no onnxconverter-common")
    typed, content = contents(TensorProto.UINT8)
    version = metadata.version("onnxconverter-common")
    conversion = Conversion("fp16", "onnxconverter-common", version, onnx.__version__, keeps_io=True)
    plan = builder.build(request_for(tmp_path, model_with(typed), conversion=conversion)).plan_path.read_bytes()
    numbers = np.frombuffer(content, np.uint8)
    assert any(numbers.astype(kind).tobytes() in plan for kind in (np.float16, np.float32, np.int32))


@pytest.mark.rtx
def test_a_misread_tensor_of_a_model_whose_external_data_is_in_itself_is_stored_raw(builder, tmp_path):
    """Rewriting the file would move what lies in it."""
    typed, _ = contents(TensorProto.UINT8)
    model = model_with(typed)
    inside = TensorProto(name="v", data_type=TensorProto.UINT8, dims=[COUNT], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "self.onnx", "length": COUNT}.items():
        inside.external_data.add(key=key, value=str(value))
    model.graph.initializer.append(inside)
    nodes = [("Cast", ["v"], ["g"]), ("Add", ["z", "g"], ["y"])]
    model.graph.node[-1].output[0] = "z"
    model.graph.node.extend(helper.make_node(operator, inputs, outputs) for operator, inputs, outputs in nodes)
    model.graph.node[-2].attribute.add(name="to", type=onnx.AttributeProto.INT, i=TensorProto.FLOAT)
    path = tmp_path / "self.onnx"
    path.write_bytes(model.SerializeToString())
    plan = builder.build(request_for(tmp_path, path)).plan_path.read_bytes()
    sums = np.frombuffer(path.read_bytes()[:COUNT], np.uint8).astype(np.float32)
    weights = np.array([1, 2, 4, 1, 2, 4, 1, 2], np.float32)
    assert any(numbers.tobytes() in plan for numbers in (sums, sums + weights))


def test_external_data_of_a_type_that_tensorrt_does_not_have_is_refused_with_advice_that_helps(tmp_path):
    weights = forms(TensorProto.UINT16, tmp_path)["external"]
    with pytest.raises(ModelError, match="type UINT16") as caught:
        identify(ModelSource.of(model_with(weights).SerializeToString(), tmp_path))
    assert "such as INT32" in caught.value.fix
    array = np.arange(COUNT, dtype=np.int32)
    (tmp_path / "again.bin").write_bytes(array.tobytes())
    weights.data_type = TensorProto.INT32
    weights.external_data[0].value = "again.bin"
    weights.external_data[2].value = str(array.nbytes)
    assert identify(ModelSource.of(model_with(weights).SerializeToString(), tmp_path)).digest
