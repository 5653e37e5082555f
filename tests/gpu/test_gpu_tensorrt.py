"""The full TensorRT on the GPU here: every option builds, loads and computes; bad plans are errors.

``pytest -m gpu tests/gpu`` runs it anywhere; without TensorRT or a GPU each test is skipped by a probe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeBuilder
from inference import Gpu
from models import linear, save
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from enginecache.cache import EngineCache
from enginecache.errors import (
    BackendError,
    EngineCacheError,
    InvalidInputError,
    LoadError,
    LoadRefusedError,
    NoDeviceError,
)
from enginecache.host.devices import list_devices
from enginecache.pipeline.results import Entry

HAS_TENSORRT = importlib.util.find_spec("tensorrt") is not None


def _devices() -> tuple[Any, ...]:
    try:
        return tuple(list_devices())
    except NoDeviceError:
        return ()


DEVICES = _devices()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICES, reason="probe: list_devices finds no GPU"),
    pytest.mark.skipif(not HAS_TENSORRT, reason="probe: no module tensorrt"),
]

DIMS = {"batch": (1, 8, 16)}
LEVELS = [{"optimization_level": level} for level in range(6)]
PLAIN_OPTIONS: list[dict[str, Any]] = [
    {},
    *LEVELS,
    {"workspace_bytes": 64 << 20},
    {"workspace_bytes": 1 << 20},
    {"hardware_compatibility": "ampere_plus"},
    {"timing_cache": False},
    {"precision": "fp16"},
    {"precision": "fp16", "optimization_level": 1},
]
FLAGS = [
    *("DEBUG", "DIRECT_IO", "ENABLE_TACTIC_HEURISTIC", "GPU_FALLBACK"),
    *("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "REFIT", "REJECT_EMPTY_ALGORITHMS", "SAFETY_SCOPE"),
    *("SPARSE_WEIGHTS", "STRICT_TYPES", "TF32=OFF"),
]
MAY_BE_REFUSED = {"SAFETY_SCOPE", "STRICT_TYPES", "GPU_FALLBACK", "DIRECT_IO"}
"""Flags of features that a desktop or data-centre GPU, or this release, may lack."""


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache", backend="tensorrt")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_network(), tmp_path_factory.mktemp("model") / "network.onnx")


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Entry:
    """The engine of the default options, built once: a builder of TensorRT 8.6 takes 8 s to start."""
    cache = EngineCache(tmp_path_factory.mktemp("stored") / "cache", backend="tensorrt")
    return cache.get(network, dims=DIMS)


@pytest.fixture
def copied(tmp_path: Path, stored: Entry) -> EngineCache:
    """A cache of its own with that engine."""
    shutil.copytree(stored.path.parents[2], tmp_path / "cache", symlinks=True)
    return EngineCache(tmp_path / "cache", backend="tensorrt")


def small_network() -> Any:
    """Two convolutions with ReLU, an average pool and a Gemm: (batch, 3, 32, 32) to (batch, 10)."""
    random = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> TensorProto:
        scale = float(np.sqrt(2 / np.prod(shape[1:]))) if len(shape) > 1 else 0.1
        return numpy_helper.from_array((random.standard_normal(shape) * scale).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "gemm"),
    ]
    weights = [weight("w1", 32, 3, 3, 3), weight("b1", 32), weight("w2", 64, 32, 3, 3), weight("b2", 64)]
    weights += [weight("w3", 64, 10), weight("b3", 10)]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 32, 32)).astype(np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, in parts of the largest expected value."""
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def assert_computes(
    gpu: Gpu, engine: Any, model: Path, counts: tuple[int, ...] = (1, 8, 16), limit: float = 5e-3
) -> None:
    evaluator = ReferenceEvaluator(str(model))
    for count in counts:
        x = images(count)
        (expected,) = evaluator.run(None, {"x": x})
        found = gpu.infer(engine, {"x": x})["y"]
        assert error(found, expected) < limit, f"batch {count}"
    with pytest.raises(ValueError, match="outside"):
        gpu.infer(engine, {"x": images(17)})


def refusal(cache: EngineCache, network: Path, flag: str) -> EngineCacheError | None:
    try:
        cache.get(network, dims=DIMS, builder_flags=[flag])
    except EngineCacheError as refused:
        return refused
    return None


def enginecache(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "enginecache", *map(str, arguments)]
    environment = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


# Options


@pytest.mark.parametrize("options", PLAIN_OPTIONS, ids=lambda options: json.dumps(options) if options else "default")
def test_engine_of_each_option_computes_what_the_model_does(gpu, cache, network, options):
    built = cache.get(network, dims=DIMS, **options)
    assert built.outcome == "built"
    assert cache.get(network, dims=DIMS, **options).outcome == "hit"
    assert_computes(gpu, cache.load(network, dims=DIMS, **options), network)


@pytest.mark.parametrize("flag", FLAGS)
def test_engine_of_each_builder_flag_computes_or_the_flag_is_refused_with_a_reason(gpu, cache, network, flag):
    if flag in MAY_BE_REFUSED and (refused := refusal(cache, network, flag)) is not None:
        assert refused.fix
        return
    engine = cache.load(network, dims=DIMS, builder_flags=[flag])
    assert engine.refittable is (flag == "REFIT")
    assert_computes(gpu, engine, network)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"strip_plan": True}], ids=str)
def test_option_that_this_release_lacks_is_refused_before_the_build(cache, network, options):
    import tensorrt as trt

    if int(trt.__version__.split(".")[0]) >= 10:
        pytest.skip("probe: TensorRT 10 and later have this option")
    with pytest.raises((BackendError, InvalidInputError)):
        cache.get(network, dims=DIMS, **options)
    assert not list(cache.entries())


def test_version_compatible_plan_runs_its_host_code_only_where_it_is_trusted(gpu, cache, network):
    options: dict[str, Any] = {"version_compatible": True, "builder_flags": ["EXCLUDE_LEAN_RUNTIME"]}
    entry = cache.get(network, dims=DIMS, **options)
    with pytest.raises(LoadRefusedError, match="host code"):
        entry.load()
    assert_computes(gpu, entry.load(trusted=True), network)
    assert cache.get(network, dims=DIMS, **options).outcome == "hit"


def test_int8_engine_of_a_quantized_model_computes(gpu, cache, tmp_path):
    scale, zero = (
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.05]),
        helper.make_tensor("z", TensorProto.INT8, [], [0]),
    )
    model = linear(features=32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
    ]
    gemm = model.graph.node[0]
    gemm.input[0] = "d"
    del model.graph.node[:]
    model.graph.node.extend([*nodes, gemm])
    model.graph.initializer.extend([scale, zero])
    path = save(model, tmp_path / "int8.onnx")
    engine = cache.load(path, dims=DIMS, precision="int8")
    x = np.random.default_rng(3).standard_normal((8, 32)).astype(np.float32)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    assert error(gpu.infer(engine, {"x": x})["y"], expected) < 2e-2


# Profiles and shapes


def test_engine_with_two_profiles_computes_in_each(gpu, cache, network):
    profiles = [{"x": tuple((n, 3, 32, 32) for n in sizes)} for sizes in ((1, 1, 4), (8, 16, 32))]
    engine = cache.load(network, profiles=profiles)
    assert engine.num_optimization_profiles == 2
    evaluator = ReferenceEvaluator(str(network))
    for profile, count in ((0, 1), (0, 4), (1, 8), (1, 32)):
        (expected,) = evaluator.run(None, {"x": images(count)})
        assert error(gpu.infer(engine, {"x": images(count)}, profile)["y"], expected) < 5e-3
    with pytest.raises(ValueError, match="outside"):
        gpu.infer(engine, {"x": images(8)}, 0)


def test_shape_tensor_takes_the_values_of_its_profile(gpu, cache, tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Relu", ["r"], ["y"])],
        "reshaped",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = save(model, tmp_path / "reshaped.onnx")
    profile = {"x": ((2, 8), (4, 8), (8, 8)), "shape": ((1, 4), (8, 4), (16, 64))}
    engine = cache.load(path, profiles=[profile])
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    for shape in ((8, 4), (2, 16)):
        found = gpu.infer(engine, {"x": x, "shape": np.array(shape)})["y"]
        assert np.array_equal(found, np.maximum(x.reshape(shape), 0))


def test_static_model_needs_no_shapes(gpu, cache, tmp_path):
    path = save(linear(4), tmp_path / "static.onnx")
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    assert error(gpu.infer(cache.load(path), {"x": x})["y"], expected) < 5e-3


# Plugins


def test_model_with_a_plugin_builds_loads_and_computes(gpu, cache, tmp_path):
    library = plugin_library()
    node = helper.make_node(
        "InstanceNormalization_TRT",
        *(["x"], ["y"], "norm"),
        epsilon=1e-5,
        scales=[1.0, 2.0, 0.5],
        bias=[0.0, 1.0, -1.0],
        plugin_version="1",
        plugin_namespace="",
        relu=0,
        alpha=0.0,
    )
    shape = ["batch", 3, 16, 16]
    graph = helper.make_graph(
        [node],
        "normalized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = save(model, tmp_path / "plugin.onnx")
    engine = cache.load(path, dims=DIMS, plugins=[library])
    x = np.random.default_rng(5).standard_normal((8, 3, 16, 16)).astype(np.float32)
    mean, variance = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
    scales, bias = np.array([1, 2, 0.5]).reshape(1, 3, 1, 1), np.array([0, 1, -1]).reshape(1, 3, 1, 1)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scales + bias
    assert error(gpu.infer(engine, {"x": x})["y"], expected) < 5e-3
    without = cache.explain(path, dims=DIMS)
    assert without.verdict == "miss"


def plugin_library() -> Path:
    import tensorrt as trt

    found = sorted(Path(trt.__file__).parent.glob("libnvinfer_plugin.so*"))
    if not found:
        pytest.skip("probe: this TensorRT brings no plugin library in its package")
    return found[0]


# Timing caches


def test_rebuild_begins_with_the_timings_of_the_first_build_and_is_faster(gpu, copied, network, stored):
    again = copied.get(network, dims=DIMS, rebuild=True)
    assert again.outcome == "built"
    assert again.record.build_seconds < stored.record.build_seconds
    assert_computes(gpu, again.load(), network)


def test_timing_cache_that_tensorrt_refuses_stops_no_build(gpu, copied, network):
    cache = copied
    kept = [
        path
        for path in cache.root.path.rglob("*")
        if path.is_file() and "timing" in str(path.relative_to(cache.root.path))
    ]
    assert kept, "no timing cache was kept"
    for path in kept:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        path.chmod(0o600)
        path.write_bytes(content)
    assert_computes(gpu, cache.get(network, dims=DIMS, rebuild=True).load(), network)
    assert cache.verify(deep=True, repair=True).is_clean


# Plans that are not good


class GivenPlan(FakeBuilder):
    """Publishes given bytes, as a builder would."""

    def __init__(self, plan: bytes) -> None:
        super().__init__()
        self.plan = plan

    def build(self, request: Any, progress: Any = None) -> Any:
        built = super().build(request, progress)
        built.plan_path.write_bytes(self.plan)
        return built


def damaged(plan: bytes) -> dict[str, bytes]:
    middle = len(plan) // 2
    return {
        "cut in half": plan[:middle],
        "one byte short": plan[:-1],
        "one byte more": plan + b"\0",
        "header alone": plan[:64],
        "wrong magic": b"XXXX" + plan[4:],
        "zeros": bytes(len(plan)),
        "random": np.random.default_rng(0).bytes(len(plan)),
        "empty": b"",
        "TensorRT-RTX": b"vtrt" + plan[4:],
        "version in the header changed": plan[:8] + bytes(8) + plan[16:],
        "body zeroed": plan[:256] + bytes(len(plan) - 256),
    }


@pytest.mark.parametrize("trial", ["auto", "always"])
@pytest.mark.parametrize("how", damaged(bytes(1024)))
def test_bad_plan_is_an_error_and_the_process_lives(tmp_path, network, stored, how, trial):
    builder = GivenPlan(damaged(stored.path.read_bytes())[how])
    bad = EngineCache(tmp_path / "cache", backend="tensorrt", builder=builder).get(network, dims=DIMS)
    with pytest.raises((LoadError, LoadRefusedError)) as caught:
        bad.load(trial=trial)
    assert caught.value.fix


def test_bad_plan_is_set_aside_and_built_again(gpu, tmp_path, network, stored):
    folder = tmp_path / "cache"
    builder = GivenPlan(damaged(stored.path.read_bytes())["cut in half"])
    EngineCache(folder, backend="tensorrt", builder=builder).get(network, dims=DIMS)
    cache = EngineCache(folder, backend="tensorrt")
    assert_computes(gpu, cache.load(network, dims=DIMS), network)
    assert cache.verify(deep=True).is_clean


def test_flipped_byte_is_found_by_the_digest_before_tensorrt_sees_it(gpu, copied, network):
    cache, entry = copied, copied.get(network, dims=DIMS)
    content = bytearray(entry.path.read_bytes())
    content[len(content) // 2] ^= 1
    entry.path.chmod(0o600)
    entry.path.write_bytes(content)
    engine = cache.load(network, dims=DIMS)
    assert_computes(gpu, engine, network)
    assert [reason.code for reason in cache.get(network, dims=DIMS).reasons] == ["exact"]


# Loading


@pytest.mark.parametrize("trial", ["auto", "always", "never"])
def test_engine_loads_with_and_without_a_trial(gpu, copied, network, trial):
    entry = copied.get(network, dims=DIMS)
    started = time.monotonic()
    assert_computes(gpu, entry.load(trial=trial), network)
    first_s = time.monotonic() - started
    started = time.monotonic()
    entry.load(trial="auto")
    assert time.monotonic() - started < max(first_s, 1.0)


def test_process_without_a_gpu_is_refused_and_does_not_crash(stored):
    script = (
        "import sys; from enginecache import EngineCache, LoadRefusedError\n"
        "cache = EngineCache(sys.argv[1])\n"
        "record = cache.find(sys.argv[2])\n"
        "for trial in ('auto', 'always', 'never'):\n"
        "    try:\n"
        "        cache._loader.load(record, cache.path(record), trial=trial)\n"
        "    except LoadRefusedError as error:\n"
        "        print('refused:', error.what)\n"
    )
    for visible in ("", "-1"):
        command = [sys.executable, "-c", script, str(stored.path.parents[2]), stored.key]
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
        assert (ran.returncode, ran.stdout.count("refused:")) == (0, 3), ran.stdout + ran.stderr


def test_get_with_every_gpu_hidden_is_exit_8(tmp_path, network):
    ran = enginecache(
        *("get", network, "--dim", "batch=1:8:16", "--backend", "tensorrt", "--dir", tmp_path / "cache"),
        CUDA_VISIBLE_DEVICES="",
    )
    assert (ran.returncode, ran.stdout) == (8, "")
    assert "CUDA_VISIBLE_DEVICES" in ran.stderr


@pytest.mark.parametrize("visible", ["0", DEVICES[0].uuid if DEVICES else ""])
def test_gpu_named_in_cuda_visible_devices_is_the_same_request(copied, network, visible):
    arguments = ("get", network, "--dim", "batch=1:8:16", "--backend", "tensorrt", "--dir", copied.root.path, "--json")
    found = json.loads(enginecache(*arguments, CUDA_VISIBLE_DEVICES=visible).stdout)
    assert found["outcome"] == "hit"


# Several at once


def test_herd_of_processes_on_a_cold_key_builds_once(cache, network):
    arguments = ("get", network, "--dim", "batch=1:8:16", "--backend", "tensorrt", "--dir", cache.root.path, "--json")
    with ThreadPoolExecutor(12) as pool:
        ran = list(pool.map(lambda _: enginecache(*arguments), range(12)))
    assert [one.returncode for one in ran] == [0] * 12
    outcomes = sorted(json.loads(one.stdout)["outcome"] for one in ran)
    assert outcomes == ["built", *["hit"] * 11]


def test_two_keys_at_once_on_one_gpu_are_both_built(cache, network):
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda level: cache.get(network, dims=DIMS, optimization_level=level), (1, 2)))
    assert [entry.outcome for entry in built] == ["built", "built"]


def test_eight_threads_load_and_compute(gpu, copied, network):
    cache = copied
    (expected,) = ReferenceEvaluator(str(network)).run(None, {"x": images(8)})
    failures: list[str] = []

    def serve() -> None:
        with contextlib.suppress(AssertionError):
            engine = cache.load(network, dims=DIMS)
            for _ in range(25):
                found = gpu.infer(engine, {"x": images(8)})["y"]
                if error(found, expected) > 5e-3:
                    failures.append("another result")
            return
        failures.append("an assertion")

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_memory_of_dropped_engines_is_given_back(gpu, copied, network):
    cache = copied

    def use() -> None:
        for engine in [cache.load(network, dims=DIMS) for _ in range(4)]:
            gpu.infer(engine, {"x": images(16)})

    use()  # what TensorRT and CUDA keep for the process is taken now
    gc.collect()
    before = gpu.free_bytes()
    for _ in range(5):
        use()
    gc.collect()
    assert before - gpu.free_bytes() < 16 << 20


# Several GPUs


@pytest.mark.skipif(len(DEVICES) < 2, reason="probe: list_devices finds one GPU")
def test_each_gpu_of_a_host_builds_and_loads_its_own(cache, network):
    for device in DEVICES[:2]:
        entry = cache.get(network, dims=DIMS, device=device.ordinal)
        assert entry.record.device_name == device.name
        assert entry.outcome == "built" or device.name == DEVICES[0].name
