"""ONNX models and requests for the builders' tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginecache.host.devices import Device
from enginecache.host.targets import ComputeCapability, Target
from enginecache.host.toolchain import Toolchain
from enginecache.key.options import BuildOptions
from enginecache.key.profiles import Profile, ShapeRange
from enginecache.model import ModelSource, identify
from enginecache.trt.build.request import BuildRequest

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
SQUEEZENET = LIGHT / "light_squeezenet.onnx"
SM89 = Target((ComputeCapability(8, 9),))
RTX = Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64")
TRT = Toolchain("tensorrt", "11.4.0.106", 13, "linux", "x86_64")
ADA = Device(
    ordinal=3,
    name="NVIDIA L4",
    compute_capability=ComputeCapability(8, 9),
    sm_count=58,
    memory_bytes=24 << 30,
    uuid="GPU-00000000-1111-2222-3333-444444444444",
    pci_bus_id="00000000:17:00.0",
    driver_version="580.65.06",
    cuda_driver_version=(13, 0),
)
TURING = replace(ADA, name="Tesla T4", compute_capability=ComputeCapability(7, 5), sm_count=40)


def tensor(name, dims, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, dims)


def graph_model(nodes, inputs, weights=(), domains=()):
    """A model with output ``y``."""
    graph = helper.make_graph(nodes, "graph", inputs, [tensor("y", None)], weights)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def conv_model(batch="batch", size=8, seed=0):
    """Conv and Relu over ``x`` of shape (batch, 3, size, size)."""
    weight = np.random.default_rng(seed).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv1"),
        helper.make_node("Relu", ["c"], ["y"], name="relu1"),
    ]
    return graph_model(nodes, [tensor("x", [batch, 3, size, size])], [numpy_helper.from_array(weight, "w")])


def reshape_model():
    """``x`` (n, 4) reshaped to the values of the shape tensor ``s``."""
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["r"], name="reshape1"),
        helper.make_node("Relu", ["r"], ["y"], name="relu1"),
    ]
    return graph_model(nodes, [tensor("x", ["n", 4]), tensor("s", [2], TensorProto.INT64)])


def add_integers_model():
    """``y`` = ``x`` + float(``s``): ``s`` looks like a shape tensor and is none."""
    nodes = [
        helper.make_node("Cast", ["s"], ["f"], name="cast1", to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"], name="add1"),
    ]
    return graph_model(nodes, [tensor("x", ["n", 4]), tensor("s", [4], TensorProto.INT64)])


def rows_of_eight_model():
    """``x`` (n, 4) reshaped to (-1, 8): only even ``n`` work."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape1"),
        helper.make_node("Relu", ["r"], ["y"], name="relu1"),
    ]
    shape = numpy_helper.from_array(np.array([-1, 8], dtype=np.int64), "shape")
    return graph_model(nodes, [tensor("x", ["n", 4])], [shape])


def concat_model(first, second):
    """``a`` and ``b`` one above the other; their row dimensions are named by the arguments."""
    node = helper.make_node("Concat", ["a", "b"], ["y"], name="concat1", axis=0)
    return graph_model([node], [tensor("a", [first, 3]), tensor("b", [second, 3])])


def unknown_operator_model():
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu1"),
        helper.make_node("Frobnicate", ["r"], ["y"], name="frob1", domain="my.ops"),
    ]
    return graph_model(nodes, [tensor("x", [1, 4])], domains=["my.ops"])


def profile(**inputs):
    """From ``name=(minimum, optimum, maximum)``; a fourth element ``"values"`` makes it a range of values."""
    pairs = ((name, ShapeRange(*corners[:3], is_values=len(corners) == 4)) for name, corners in inputs.items())
    return Profile(tuple(sorted(pairs)))


def request_for(folder: Path, model=SQUEEZENET, **changes) -> BuildRequest:
    """A request with a new work folder and log in ``folder``; ``model`` is a ModelProto, a path, bytes or a source."""
    number = len(list(folder.glob("work*")))
    work_dir = folder / f"work{number}"
    work_dir.mkdir(mode=0o700)
    if isinstance(model, onnx.ModelProto):
        path = folder / f"model{number}.onnx"
        path.write_bytes(model.SerializeToString())
        model = path
    source = model if isinstance(model, ModelSource) else ModelSource.of(model)
    fields = {
        "source": source,
        "identity": identify(source) if "identity" not in changes else None,
        "profiles": (),
        "options": BuildOptions(),
        "toolchain": RTX,
        "target": SM89,
        "device": None,
        "work_dir": work_dir,
        "log_path": folder / f"build{number}.log",
    }
    return BuildRequest(**{**fields, **changes})


BATCHES = (profile(x=((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))),)
"""The profiles of :func:`conv_model`."""
