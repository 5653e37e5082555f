"""With a scripted engine: TensorRT-RTX gives an engine only on a GPU that it supports.

The script's names and answers are compared with the real bindings.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from fakes import H100
from records import entry, hex_of

from enginecache.errors import LoadRefusedError
from enginecache.pipeline.runtime_cache import RuntimeCaches
from enginecache.storage.folder import Root

NAMES = {
    "ICudaEngine": {"create_runtime_config", "create_execution_context"},
    "IRuntimeConfig": {"create_runtime_cache", "set_runtime_cache"},
    "IRuntimeCache": {"serialize", "deserialize"},
}
RECORD = entry("a")
ADA = replace(H100, name="NVIDIA L4", sm_count=58)


class Scripted:
    """The kernels of one process; refuses what another environment compiled, as TensorRT-RTX does."""

    def __init__(self, environment: bytes = b"sm89") -> None:
        self.environment = environment
        self.kernels: set[bytes] = set()
        self.offered: list[bytes] = []

    def serialize(self):
        return memoryview(b" ".join([self.environment, *sorted(self.kernels)]))

    def deserialize(self, blob):
        self.offered.append(bytes(blob))
        environment, *kernels = bytes(blob).split(b" ")
        if environment != self.environment:
            return False
        self.kernels |= set(kernels)
        return True


class ScriptedConfig:
    def __init__(self, cache, takes=True):
        self._cache = cache
        self._takes = takes
        self.is_set = False

    def create_runtime_cache(self):
        return self._cache

    def set_runtime_cache(self, cache):
        assert cache is self._cache
        self.is_set = self._takes
        return self._takes


class ScriptedEngine:
    def __init__(self, cache=None, takes=True):
        self.cache = Scripted() if cache is None else cache
        self._config = ScriptedConfig(self.cache, takes)

    def create_runtime_config(self):
        return self._config

    def create_execution_context(self, runtime_config):
        assert runtime_config is self._config
        assert runtime_config.is_set
        return "a context"

    def infer(self, *kernels: bytes):
        self.cache.kernels |= set(kernels)


class TensorRTEngine:
    """An engine of TensorRT up to 10.0: without runtime configurations."""

    def create_execution_context(self):
        return "a context"


class NewTensorRTEngine(TensorRTEngine):
    """An engine of TensorRT from 10.16 on: its runtime configuration has no runtime cache."""

    def create_runtime_config(self):
        return object()


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def caches(root):
    return RuntimeCaches(root)


def start(caches, engine=None, *, record=RECORD, device=ADA):
    engine = ScriptedEngine() if engine is None else engine
    return engine, caches.of(engine, record, device)


@pytest.mark.rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx")
def test_the_real_bindings_have_the_names_and_answers_of_the_script():
    import tensorrt_rtx as trt

    for name, members in NAMES.items():
        assert members <= set(dir(getattr(trt, name)))
    assert "blob: typing_extensions.Buffer) -> bool" in trt.IRuntimeCache.deserialize.__doc__
    assert "-> tensorrt_rtx_bindings.tensorrt_rtx.IHostMemory" in trt.IRuntimeCache.serialize.__doc__
    assert "-> nvinfer1::IRuntimeCache" in trt.IRuntimeConfig.create_runtime_cache.__doc__
    assert "-> bool" in trt.IRuntimeConfig.set_runtime_cache.__doc__
    assert "runtime_config: tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig" in (
        trt.ICudaEngine.create_execution_context.__doc__
    )


def test_the_next_program_starts_with_the_kernels_of_the_last(caches):
    engine, kernels = start(caches)
    assert not kernels.is_warm
    with kernels:
        assert kernels.create_context() == "a context"
        engine.infer(b"k1", b"k2")
    second, warm = start(caches)
    assert warm.is_warm
    assert second.cache.kernels == {b"k1", b"k2"}
    assert warm.create_context() == "a context"


def test_a_server_keeps_them_while_it_runs(caches):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    assert kernels.keep() == ()
    assert start(caches)[0].cache.kernels == {b"k1"}
    engine.infer(b"k2")
    assert kernels.keep() == ()
    assert start(caches)[0].cache.kernels == {b"k1", b"k2"}


def test_nothing_is_written_where_nothing_was_compiled(caches, root):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    kernels.keep()
    (path,) = (root.path / "runtime-caches").iterdir()
    inode = path.stat().st_ino
    assert kernels.keep() == ()
    assert path.stat().st_ino == inode
    assert start(caches)[1].keep() == ()
    assert path.stat().st_ino == inode


@pytest.mark.parametrize(
    ("record", "device"),
    [
        (replace(RECORD, digest=hex_of("another blob")), ADA),
        (replace(RECORD, tensorrt_version="1.7.1.117"), ADA),
        (RECORD, replace(ADA, name="NVIDIA L40S", sm_count=142)),
        (RECORD, replace(ADA, driver_version="590.10")),
        (RECORD, replace(ADA, cuda_driver_version=(13, 1))),
    ],
)
def test_another_blob_device_or_driver_starts_anew(caches, record, device):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    kernels.keep()
    other, cold = start(caches, record=record, device=device)
    assert (cold.is_warm, other.cache.offered) == (False, [])
    assert start(caches)[1].is_warm


def test_an_equal_gpu_starts_with_them(caches):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    kernels.keep()
    assert start(caches, device=replace(ADA, ordinal=1, uuid="GPU-2", pci_bus_id="00000000:18:00.0"))[1].is_warm


def test_what_tensorrt_refuses_is_replaced(caches):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    kernels.keep()
    engine, refused = start(caches, ScriptedEngine(Scripted(b"sm120")))
    assert not refused.is_warm
    with refused:
        refused.create_context()
        engine.infer(b"k9")
    assert start(caches, ScriptedEngine(Scripted(b"sm120")))[0].cache.kernels == {b"k9"}


def test_damaged_kernels_are_never_given_to_tensorrt(caches, root):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    kernels.keep()
    (path,) = (root.path / "runtime-caches").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    other, cold = start(caches)
    assert (cold.is_warm, other.cache.offered) == (False, [])


def test_an_error_in_the_block_keeps_nothing_and_an_interrupt_does(caches):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    with pytest.raises(RuntimeError, match="CUDA"), kernels:
        raise RuntimeError("CUDA error 700")
    assert not start(caches)[1].is_warm
    with pytest.raises(KeyboardInterrupt), kernels:
        raise KeyboardInterrupt
    assert start(caches)[1].is_warm


def test_what_cannot_be_written_is_a_warning_and_no_error(caches, root):
    engine, kernels = start(caches)
    engine.infer(b"k1")
    root.tmp.rmdir()
    (warning,) = kernels.keep()
    assert "nothing can be kept" in warning
    with kernels:
        pass


def test_a_serialization_that_fails_is_a_warning(caches):
    engine, kernels = start(caches)
    engine.cache.serialize = lambda: None
    (warning,) = kernels.keep()
    assert "gave no runtime cache" in warning


@pytest.mark.parametrize("engine", [TensorRTEngine(), NewTensorRTEngine()])
def test_an_engine_of_tensorrt_has_none_and_gives_its_context(caches, root, engine):
    _, kernels = start(caches, engine)
    with kernels:
        assert kernels.create_context() == "a context"
    assert (kernels.config, kernels.is_warm) == (None, False)
    assert list((root.path / "runtime-caches").iterdir()) == []


def test_a_configuration_that_takes_no_runtime_cache_keeps_nothing(caches, root):
    engine = ScriptedEngine(takes=False)
    _, kernels = start(caches, engine)
    engine.infer(b"k1")
    assert kernels.keep() == ()
    assert list((root.path / "runtime-caches").iterdir()) == []


def test_a_context_that_tensorrt_does_not_create_is_an_error(caches):
    engine, kernels = start(caches)
    engine.create_execution_context = lambda _config: None
    with pytest.raises(LoadRefusedError, match="no execution context"):
        kernels.create_context()
