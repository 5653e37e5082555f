"""Small synthetic files of the forms that inspection knows. The bytes after a header are not a plan's."""

import json
import pickle
import struct

from onnx import TensorProto, helper

RTX_RELEASES = {
    # version, CUDA of cu12 and of cu13, mask of a plan without named targets, bits that can be named
    "1.4.0.76": (12090, 13020, 0x3E, 0x1F),
    "1.5.0.114": (12090, 13020, 0x7E, 0x3F),
    "1.6.1.120": (12090, 13040, 0x7E, 0x3F),
    "1.7.1.116": (0, 0, 0x7E, 0x3F),
}
"""Read from builds of each release, 2026-12."""


def rtx_plan(version="1.7.1.116", *, mask=0b1000, size=400, cuda=0, weights=0, layout=2):
    """A file with the header of TensorRT-RTX."""
    parts = bytes(map(int, version.split(".")))
    head = b"vtrt" + struct.pack("<IQQ", 0, layout, size) + parts + b"vtrt" + struct.pack("<QQII", mask, 0, cuda, 0)
    return (head + struct.pack("<Q", weights) + bytes(range(256)) * (size // 256 + 1))[:size]


def _tagged(number, size, value=0):
    return struct.pack("<I", 0x00018000 | number) + value.to_bytes(size, "little")


H200 = (9, 0, 1_980_000, 3_201_000, 6016, 62_914_560, 39_321_600, 49_152, 233_472, 512, 132, 0, 1024, 2**31 - 1, 65535)
H200 = (*H200, 65535, 150_109_880_320)
_SIZES = (4, 4, 4, 4, 4, 8, 8, 4, 4, 4, 4, 1, 4, 4, 4, 4, 8)
_TAG_OF = {1: 0x0A, 4: 0x07, 8: 0x08}


def trt_plan(version="8.6.0.12", *, device=H200, size=1200):
    """A file with the header of TensorRT 8.6, with the offsets that were seen: the device begins at 0x78."""
    parts = bytes(map(int, version.split(".")))
    head = b"ftrt" + struct.pack("<IIIQ", 0, 1, 0, size) + parts + bytes(4)
    head += b"NGNE" + bytes(4) + struct.pack("<QQ", 56, size - 63)
    head += b"ptrt" + bytes(4) + struct.pack("<QQ", 236, size - 87)
    assert len(head) == 80
    head += b"".join(_tagged(0x02, 1, part) for part in parts)
    head += _tagged(0x4E, 0) + _tagged(0x07, 4) + _tagged(0x11, 0) + _tagged(0x10, 0)
    assert len(head) == 0x78
    head += b"".join(_tagged(_TAG_OF[size_], size_, value) for size_, value in zip(_SIZES, device, strict=True))
    head += _tagged(0x58, 0)
    return (head + bytes(range(256)) * (size // 256 + 1))[:size]


def old_plan(serialization=205):
    return b"ptrt" + struct.pack("<III", 0, serialization, 0) + bytes(500)


def timing_cache(version=100):
    body = b"\x13\x80\x01\x00" + bytes(148)
    return b"ptrt" + struct.pack("<IQI", version, len(body), 0) + body


def ultralytics(plan, **facts):
    header = json.dumps({"description": "a model", "author": "Ultralytics", "stride": 32, **facts}).encode()
    return struct.pack("<i", len(header)) + header + plan


def tensoracle(plan):
    header = json.dumps({"conditions": {}, "plan_sha256": "ab" * 32}, sort_keys=True, separators=(",", ":")).encode()
    return b"TENSORACLE\x01" + struct.pack(">Q", len(header)) + header + plan


def model_connect():
    return (
        b"BUNDLE\x01" + struct.pack("<I", 52) + json.dumps({"trt_version": "10.3.0", "gpu_name": "NVIDIA L4"}).encode()
    )


def torch_tensorrt(plan, protocol=pickle.DEFAULT_PROTOCOL):
    """A blob as Torch-TensorRT pickles it."""
    return pickle.dumps({"serialized_engine": plan, "input_names": ["x"], "output_names": ["y"]}, protocol=protocol)


class _Runs:
    def __reduce__(self):
        import os

        return os.system, ("false",)


def running_pickle():
    """A pickle that runs a command when it is loaded."""
    return pickle.dumps({"serialized_engine": _Runs()})


def ep_context(content, *, embedded=True, source="NvTensorRTRTXExecutionProvider", **attributes):
    """An ONNX model with one EPContext node."""
    value = content if isinstance(content, bytes) else content.encode()
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=int(embedded), source=source)
    node.attribute.append(helper.make_attribute("ep_cache_context", value))
    node.attribute.extend(helper.make_attribute(name, item) for name, item in attributes.items())
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]), helper.make_tensor_value_info("y", 1, [1])
    graph = helper.make_graph([node], "g", [shape[0]], [shape[1]])
    opsets = [helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()
