"""Variables that a real build asks for: every name has a rule, and a keyed variable changes the plan."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from models import linear, save

from enginecache.cache import EngineCache
from enginecache.environment import RULES, kind_of

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx"),
]

RECORDER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

static void record(const char *name) {
    int saved = errno, file = open(RECORD, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    char line[512];
    size_t length = strnlen(name, sizeof line - 1);
    memcpy(line, name, length);
    line[length++] = '\n';
    if (file >= 0) {
        if (write(file, line, length) < 0) _exit(99);
        close(file);
    }
    errno = saved;
}

#define WATCH(function)                                                              \
    char *function(const char *name) {                                               \
        static char *(*real)(const char *);                                          \
        if (!real) real = (char *(*)(const char *))dlsym(RTLD_NEXT, #function);      \
        record(name);                                                                \
        return real(name);                                                           \
    }

WATCH(getenv)
WATCH(secure_getenv)
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Builds a model with a library that records each name that the builder asks for; gives the names."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("probe: no C compiler")
    source, library, record = tmp_path / "recorder.c", tmp_path / "recorder.so", tmp_path / "names"
    source.write_text(RECORDER, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", f'-DRECORD="{record}"', "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)

    def build(model: Path, **ask) -> set[str]:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        with EngineCache.open(dir=tmp_path / "cache", pass_environment=["LD_PRELOAD"]) as cache:
            entry = cache.get(model, target="sm_89", **ask)
        assert entry.outcome == "built"
        assert entry.record.fields["environment"] == {"LD_PRELOAD": str(library)}
        return set(record.read_text(encoding="utf-8").split("\n")) - {""}

    return build


def test_every_name_that_a_real_build_asks_for_has_a_rule(recorded, tmp_path):
    names = recorded(save(linear(), tmp_path / "model.onnx"), dims={"batch": 4})
    assert "NVIDIA_TF32_OVERRIDE" in names  # the recorder does record
    assert "PYTHONHOME" in names
    assert sorted(name for name in names if kind_of(name) is None) == []


@pytest.mark.slow
def test_every_name_that_a_conversion_and_a_real_network_ask_for_has_a_rule(recorded, tmp_path):
    onnx = importlib.util.find_spec("onnx")
    network = Path(onnx.origin).parent / "backend/test/data/light/light_squeezenet.onnx"
    names = recorded(network) | recorded(save(linear(), tmp_path / "model.onnx"), dims={"batch": 4}, precision="fp16")
    assert sorted(name for name in names if kind_of(name) is None) == []


def test_names_known_to_be_read_have_rules_that_say_so():
    """As traced in one release; a later one may ask for fewer."""
    traced = {pattern for pattern, _, _, source in RULES if "traced" in source}
    assert {"NVIDIA_TF32_OVERRIDE", "__*NOWUD", "TRT_*", "CUDNN_*", "MYELIN_*", "NVRTC_*"} <= traced


def test_a_variable_that_forbids_tf32_reaches_tensorrt_and_has_an_engine_of_its_own(tmp_path, monkeypatch):
    model = save(linear(), tmp_path / "model.onnx")
    with EngineCache.open(dir=tmp_path / "cache") as cache:
        plain = cache.get(model, target="sm_89", dims={"batch": 64})
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        forbidden = cache.get(model, target="sm_89", dims={"batch": 64})
        assert forbidden.outcome == "built"
        assert forbidden.key != plain.key
        assert any("Disabling TF32" in reason.text for reason in forbidden.reasons)  # TensorRT's own words
        assert forbidden.digest != plain.digest
        assert cache.get(model, target="sm_89", dims={"batch": 64}).key == forbidden.key
        os.environ.pop("NVIDIA_TF32_OVERRIDE")
        assert cache.get(model, target="sm_89", dims={"batch": 64}).key == plain.key
