"""Shows what TensorRT-RTX's parser makes of models: ``python parsed_networks.py FOLDER MODEL...``.

Each model is read, pinned and stored anew as a build does it. A line of JSON for each: its digest, its constants and a
digest of its whole network, or who refused it. A process of its own: TensorRT keeps what it is first given, and a crash
here is nobody else's.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import builder_models
import tensorrt_rtx as trt

from enginecache.errors import ModelError
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.open_files import pinned
from enginecache.trt.convert.conversion import without_misread

BITS = {"INT4": 4, "FP4": 4, "FP8": 8, "INT8": 8, "UINT8": 8, "BOOL": 8, "BF16": 16, "HALF": 16, "INT64": 64}
"""Of types that are not 32 bits wide; numpy has no words for some of them."""


MANY = 10
"""Constants above which their number is shown alone."""


def main() -> None:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    folder = Path(sys.argv[1])
    for path in sys.argv[2:]:
        print(json.dumps(reading_of(Path(path), folder, builder, logger)))


def reading_of(path: Path, folder: Path, builder: Any, logger: Any) -> dict[str, Any]:
    try:
        request = builder_models.request_for(folder, path)
    except ModelError as error:
        return {"refused": "enginecache", "why": error.what}
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    with pinned(request) as model, Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        source = without_misread(model.request, BuildLog(nowhere)).source
        if not parser.parse_from_file(str(source.path)):
            return {"digest": request.identity.digest, "refused": "TensorRT", "why": parser.get_error(0).desc()}
        constants = constants_of(network)
        return {
            "digest": request.identity.digest,
            "constants": constants if len(constants) < MANY else len(constants),
            "network": hashlib.sha256(json.dumps([layers_of(network), constants]).encode()).hexdigest(),
        }


def layers_of(network: Any) -> list[list[Any]]:
    """Inputs, outputs and layers, by type, name, metadata and tensors."""
    ends = [*map(network.get_input, range(network.num_inputs)), *map(network.get_output, range(network.num_outputs))]
    layers = map(network.get_layer, range(network.num_layers))
    return [*map(tensor_of, ends), *map(layer_of, layers)]


def layer_of(layer: Any) -> list[Any]:
    inputs = map(layer.get_input, range(layer.num_inputs))
    outputs = map(layer.get_output, range(layer.num_outputs))
    return [str(layer.type), layer.name, layer.metadata, *map(tensor_of, inputs), *map(tensor_of, outputs)]


def tensor_of(tensor: Any) -> list[Any] | None:
    return None if tensor is None else [tensor.name, str(tensor.dtype), list(tensor.shape)]


def constants_of(network: Any) -> list[list[Any]]:
    """Type, shape and bytes of every constant, in the network's order."""
    found = []
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            found.append([str(layer.get_output(0).dtype), list(layer.shape), bytes_of(layer.weights).hex()])
    return found


def bytes_of(weights: Any) -> bytes:
    if hasattr(weights, "tobytes"):
        return weights.tobytes()
    # numpy has no such type: trt.Weights holds a C++ object {type, values, count} behind pybind11's header.
    bits = BITS.get(weights.dtype.name, 32)
    held = ctypes.c_void_p.from_address(id(weights) + 16).value
    return ctypes.string_at(ctypes.c_void_p.from_address(held + 8).value, (weights.size * bits + 7) // 8)


if __name__ == "__main__":
    main()
