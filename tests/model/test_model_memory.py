"""Memory that identification takes, measured in a separate process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto
from small_onnx_models import external, linear

MEBIBYTE = 1 << 20

SCRIPT = """
import sys
from enginecache.model import ModelSource, identify
identify(ModelSource.of(sys.argv[1]))
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak) * 1024)
"""
"""Not ``ru_maxrss``: that begins with the peak of the process that started this one."""


def peak_bytes(path: Path) -> int:
    result = subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True)
    return int(result.stdout)


def bytes_tensor(name: str, size_bytes: int) -> TensorProto:
    return TensorProto(name=name, data_type=TensorProto.UINT8, dims=[size_bytes])


def save_external(folder: Path, size_bytes: int, count: int) -> Path:
    """A model of ``count`` tensors in one file; the file has no blocks, so it takes no room on the disk."""
    model = linear()
    each = size_bytes // count
    for index in range(count):
        tensor = external(bytes_tensor(f"w{index}", each), offset=index * each, length=each)
        model.graph.initializer.append(tensor)
    with (folder / "w.bin").open("wb") as file:
        file.truncate(size_bytes)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize("count", [1, 100])
def test_external_data_is_never_held_in_memory(count, tmp_path):
    assert peak_bytes(save_external(tmp_path, 400 * MEBIBYTE, count)) < 150 * MEBIBYTE


@pytest.mark.slow
@pytest.mark.reliability
def test_three_gigabytes_of_external_data_take_under_300_mb(tmp_path):
    assert peak_bytes(save_external(tmp_path, 3 * 10**9, 12)) < 300 * 10**6


@pytest.mark.parametrize(
    ("field", "size_bytes", "count"),
    [
        ("raw_data", 140 * MEBIBYTE, 1),
        ("raw_data", 140 * MEBIBYTE, 10),
        ("float_data", 40 * MEBIBYTE, 10),
    ],
)
def test_inline_weights_take_little_more_than_twice_the_file(field, size_bytes, count, tmp_path):
    model = linear()
    for index in range(count):
        count_each = size_bytes // count // 4
        tensor = model.graph.initializer.add(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[count_each])
        if field == "raw_data":
            tensor.raw_data = bytes(4 * count_each)
        else:
            tensor.float_data.extend([0.5] * count_each)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    # 60 MiB for the interpreter with onnx and numpy, which a small file would drown in.
    assert peak_bytes(path) < 2.2 * path.stat().st_size + 60 * MEBIBYTE
