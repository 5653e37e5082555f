"""The parts left out of a model's identity change nothing that TensorRT builds from; those that stay in do, or may.

``docs/identity.md`` has what was found with more models than the onnx package brings.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder_models import LIGHT, graph_model, request_for, tensor
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from enginecache.key.precision import Conversion
from enginecache.model import ModelSource, identify
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.convert.conversion import convert

HERE = Path(__file__).parent


def messages_of(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for below in [value] if hasattr(value, "ListFields") else value:
                yield from messages_of(below)


def exported_again(model: onnx.ModelProto, ir_version: int = 10) -> onnx.ModelProto:
    """The same model from another exporter, on another day."""
    again = onnx.ModelProto()
    again.CopyFrom(model)
    again.producer_name, again.producer_version, again.domain = "another exporter", "2.9.1", "org.example"
    again.model_version, again.ir_version, again.graph.name = 7, ir_version, "another name"
    for message in list(messages_of(again)):
        fields = message.DESCRIPTOR.fields_by_name
        if "doc_string" in fields:
            message.doc_string = "exported on a Tuesday"
        if "metadata_props" in fields:
            for key in ("date", "namespace", "pkg.torch.onnx.stack_trace"):
                message.metadata_props.add(key=key, value="2026-11-03")
    return again


def networks_of(models: list[onnx.ModelProto], folder: Path) -> list[dict[str, Any]]:
    """Lines of ``parsed_networks.py``."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("probe: no module tensorrt_rtx")
    paths = []
    for index, model in enumerate(models):
        paths.append(folder / f"{index}.onnx")
        paths[-1].write_bytes(model.SerializeToString())
    command = [sys.executable, HERE / "parsed_networks.py", folder, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.rtx
def test_real_models_that_are_exported_again_have_one_digest_and_one_network(tmp_path):
    models = [onnx.load(path) for path in sorted(LIGHT.glob("light_*.onnx"))]
    again = [
        exported_again(model, ir_version) for model, ir_version in zip(models, [3, 4, 7, 8, 9, 10] * 2, strict=False)
    ]
    lines = networks_of([*models, *again], tmp_path)
    assert lines[: len(models)] == lines[len(models) :]
    assert len({line["network"] for line in lines}) == len(models)


@pytest.mark.rtx
def test_a_plan_of_a_model_that_is_exported_again_is_the_same_bytes(builder, tmp_path):
    model = onnx.load(LIGHT / "light_squeezenet.onnx")
    plans = [
        builder.build(request_for(tmp_path, each)).plan_path.read_bytes() for each in (model, exported_again(model))
    ]
    assert plans[0] == plans[1]


def branching() -> onnx.ModelProto:
    """``y = x + 1`` or ``x + 2``, as ``c`` says."""

    def branch(name: str, number: float) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.full(4, number, np.float32), f"w{number}")
        node = helper.make_node("Add", ["x", weight.name], [f"y_{name}"], name="add")
        return helper.make_graph([node], name, [], [tensor(f"y_{name}", [4])], [weight])

    branches = {"then_branch": branch("one", 1.0), "else_branch": branch("two", 2.0)}
    node = helper.make_node("If", ["c"], ["y"], name="if1", **branches)
    return graph_model([node], [tensor("x", [4]), tensor("c", [], TensorProto.BOOL)])


@pytest.mark.rtx
def test_names_of_inner_graphs_reach_the_network_and_count(tmp_path):
    renamed = branching()
    renamed.graph.node[0].attribute[0].g.name = "another"
    one, other = networks_of([branching(), renamed], tmp_path)
    assert one["network"] != other["network"]
    assert one["digest"] != other["digest"]


@pytest.mark.rtx
def test_the_producer_that_counts_lets_the_parser_read_more(tmp_path):
    plain = graph_model([helper.make_node("Relu", ["x"], ["y"], name="relu1")], [tensor("x", [1, 4])])
    plain.graph.node[0].attribute.add(name="trt_outputs_loc", type=AttributeProto.STRINGS, strings=[b"gpu", b"gpu"])
    named = onnx.ModelProto()
    named.CopyFrom(plain)
    named.producer_name = "TensorRT"
    ignored, read = networks_of([plain, named], tmp_path)
    assert "network" in ignored
    assert read["refused"] == "TensorRT"
    assert read["digest"] != ignored["digest"]


@pytest.mark.rtx
def test_value_info_reaches_no_network_and_counts_apart(tmp_path):
    model = onnx.load(LIGHT / "light_squeezenet.onnx")
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    wrong.graph.value_info.append(tensor(model.graph.node[0].output[0], [7, 7], TensorProto.INT64))
    one, other = networks_of([model, wrong], tmp_path)
    assert one["network"] == other["network"]
    assert one["digest"] != other["digest"]
    identities = [identify(ModelSource.of(each.SerializeToString())) for each in (model, wrong)]
    assert identities[0].structure == identities[1].structure


@pytest.mark.parametrize("stem", ["light_squeezenet", "light_shufflenet"])
def test_what_is_left_out_changes_no_converted_graph(stem, tmp_path):
    """The converter is given the file, and its graph is what is built."""
    pytest.importorskip("onnxconverter_common", reason="probe: no onnxconverter-common")
    from importlib import metadata

    conversion = Conversion(
        "fp16", "onnxconverter-common", metadata.version("onnxconverter-common"), onnx.__version__, keeps_io=True
    )
    model = onnx.load(LIGHT / f"{stem}.onnx")
    graphs = []
    for each in (model, exported_again(model, 3), exported_again(model, 10)):
        request = request_for(tmp_path, each, conversion=conversion)
        done = onnx.load(convert(request, BuildLog(io.StringIO())).source.path)
        for message in list(messages_of(done)):
            for name in ("doc_string", "metadata_props"):
                if name in message.DESCRIPTOR.fields_by_name:
                    message.ClearField(name)
        done.graph.ClearField("name")
        graphs.append(done.graph.SerializeToString(deterministic=True))
    assert graphs[0] == graphs[1] == graphs[2]
