import subprocess
import sys

import check_models as models
import numpy as np
import pytest

from enginecache.quality.check import Checker, CheckOptions
from enginecache.quality.memory import available_bytes

GIB = 1 << 30


def written(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


HOST = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB >> 10} kB\n"}


def group(folder, limit, used, cached=0):
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 1\nfile {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        (HOST, 8 * GIB),
        ({**HOST, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "max\n", "5")}, 8 * GIB),
        (
            {**HOST, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", str(2 * GIB), str(GIB), GIB // 2)},
            GIB * 3 // 2,
        ),
        ({**HOST, "proc/self/cgroup": "0::/a/b\n", **group("sys/fs/cgroup/a", str(GIB), "0")}, GIB),
        ({**HOST, "proc/self/cgroup": "0::/of/the/host\n", **group("sys/fs/cgroup", str(GIB), "0")}, GIB),
        ({**HOST, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", str(GIB), str(2 * GIB))}, 0),
        (
            {
                **HOST,
                "proc/self/cgroup": "9:name=systemd:/\n4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(3 * GIB),
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(GIB),
            },
            2 * GIB,
        ),
    ],
    ids=["unknown", "host", "no limit", "cache", "a group above", "a namespace", "over the limit", "version 1"],
)
def test_available_memory_is_that_of_the_narrowest_group(tmp_path, files, available):
    assert available_bytes(written(tmp_path, files)) == available


def test_memory_of_this_host_is_known():
    assert available_bytes() > 1 << 20


def test_limit_makes_an_allocation_fail_and_not_the_process(tmp_path):
    root = written(tmp_path, {"proc/meminfo": f"MemAvailable: {GIB >> 10} kB\n"})
    code = (
        "from pathlib import Path\nfrom enginecache.quality.memory import limit_memory\n"
        f"assert limit_memory(Path({str(root)!r})) == {int(GIB * 0.9)}\n"
        "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('refused')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "refused\n"


def test_model_that_takes_more_memory_than_there_is_is_a_sentence_in_the_result(tmp_path):
    text = "(float[2] x) => (float y) { e = Expand(x, shape) y = ReduceSum<keepdims=0>(e) }"
    model = models.model(text, shape=np.array([1 << 20, 1 << 20, 2]))
    (tmp_path / "check").mkdir()
    found = Checker().check(models.subject_of(tmp_path, model, model), CheckOptions(), tmp_path / "check")
    assert found.verdict == "uninformative"
    assert "did not compute the model" in found.reason
