"""Small ONNX models, and the real ones that the onnx package brings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

LIGHT_DIR = Path(onnx.__file__).parent / "backend/test/data/light"
LIGHT = sorted(LIGHT_DIR.glob("light_*.onnx"))
_QUICK = {"light_inception_v1", "light_shufflenet", "light_squeezenet"}
DAILY = [path for path in LIGHT if path.stem in _QUICK]
"""Real models that build in a second or two; the others take several, and are built in the long runs."""
RARE = [pytest.param(path, marks=pytest.mark.reliability) for path in LIGHT if path.stem not in _QUICK]
EXAMPLE = Path(__file__).parents[2] / "examples/cifar.onnx"


def linear(
    rows: int | str = "batch",
    *,
    features: int = 8,
    seed: int = 0,
    name: str = "x",
    transpose: int = 0,
    extra_inputs: list[onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    """``y = x @ w + b``: x is (rows, features), w is (features, features)."""
    random = np.random.default_rng(seed)
    weight = numpy_helper.from_array(random.standard_normal((features, features)).astype(np.float32), "w")
    bias = numpy_helper.from_array(random.standard_normal(features).astype(np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("Gemm", [name, "w", "b"], ["y"], "gemm", transB=transpose)],
        "linear",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, features]), *(extra_inputs or [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, features])],
        [weight, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def gather(path: Path, *, rows: int) -> Path:
    """Write ``y = w[x]`` with x of (batch,), and w of KiBs of zeros in a file that takes no room on the disk."""
    weights = path.with_suffix(".data")
    weights.touch()
    os.truncate(weights, rows << 10)
    table = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, 256], data_location=TensorProto.EXTERNAL)
    table.external_data.add(key="location", value=weights.name)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "x"], ["y"])],
        "gather",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 256])],
        [table],
    )
    return save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def save(model: onnx.ModelProto, path: Path, *, external: str | None = None) -> Path:
    """Write a model, with its weights in the file ``external`` next to it if one is named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if external is None:
        path.write_bytes(model.SerializeToString())
    else:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save_model(copy, str(path), save_as_external_data=True, location=external, size_threshold=0)
    return path
