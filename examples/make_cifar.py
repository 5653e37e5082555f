"""Make ``cifar.onnx``: a small image classifier with a dynamic batch, like those that are trained on CIFAR-10.

Input ``images``: (batch, 3, 32, 32), float32. Output ``scores``: (batch, 10), float32. The weights are random but
fixed: the model is for trying out engines, not for telling cats from dogs.

Usage: python examples/make_cifar.py [FILE]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = (3, 16, 32, 64)
CLASSES = 10


def make_model() -> onnx.ModelProto:
    """Three blocks of convolution, ReLU and pooling, then a linear layer."""
    random = np.random.default_rng(10)
    nodes, weights = [], []

    def weight(name: str, *shape: int) -> str:
        scale = np.sqrt(2.0 / np.prod(shape[1:])) if len(shape) > 1 else 0.0
        values = (random.standard_normal(shape) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        return name

    current = "images"
    for block, (fan_in, fan_out) in enumerate(itertools.pairwise(CHANNELS)):
        kernel, bias = weight(f"conv{block}.weight", fan_out, fan_in, 3, 3), weight(f"conv{block}.bias", fan_out)
        nodes.append(helper.make_node("Conv", [current, kernel, bias], [f"conv{block}"], f"conv{block}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"conv{block}"], [f"relu{block}"], f"relu{block}"))
        pool = helper.make_node("MaxPool", [f"relu{block}"], [f"pool{block}"], f"pool{block}")
        pool.attribute.extend([helper.make_attribute("kernel_shape", [2, 2]), helper.make_attribute("strides", [2, 2])])
        nodes.append(pool)
        current = f"pool{block}"
    nodes.append(helper.make_node("GlobalAveragePool", [current], ["pooled"], "pooled"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["features"], "features"))
    linear = weight("linear.weight", CLASSES, CHANNELS[-1]), weight("linear.bias", CLASSES)
    nodes.append(helper.make_node("Gemm", ["features", *linear], ["scores"], "scores", transB=1))
    graph = helper.make_graph(
        nodes,
        "cifar",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="enginecache-example")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    """Write the model."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("cifar.onnx")
    path.write_bytes(make_model().SerializeToString())
    print(path)


if __name__ == "__main__":
    main()
