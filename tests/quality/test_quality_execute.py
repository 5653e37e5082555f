"""The engine's half without a GPU: an engine of numpy, whose memory is this process's. On GPU hosts see tests/gpu."""

import contextlib
import ctypes
import enum
import shutil
from types import SimpleNamespace

import check_models as models
import ml_dtypes
import numpy as np
import pytest

from enginecache.errors import CheckUnavailableError, NoDeviceError, StoreError
from enginecache.host.devices import list_devices
from enginecache.quality import execute
from enginecache.quality.check import EXECUTE, Checker, CheckOptions
from enginecache.quality.driver import Driver, DriverError
from enginecache.quality.execute import Execution

Mode = enum.Enum("Mode", ["INPUT", "OUTPUT"])
Location = enum.Enum("Location", ["DEVICE", "HOST"])


class Allocator:
    """Allocator that TensorRT asks for the memory of an output whose size only the run determines."""


TRT = SimpleNamespace(TensorIOMode=Mode, TensorLocation=Location, IOutputAllocator=Allocator)
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}


class Memory:
    """A driver whose memory is this process's."""

    stream = 7

    def __init__(self):
        self.taken = {}
        self.freed = 0

    def allocate(self, size_bytes):
        buffer = np.full(max(size_bytes, 1), 0xFF, np.uint8)
        self.taken[buffer.ctypes.data] = buffer
        return buffer.ctypes.data

    def upload(self, array):
        pointer = self.allocate(array.nbytes)
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)
        return pointer

    def download(self, pointer, array):
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def wait(self):
        pass

    def free_all(self):
        self.freed += len(self.taken)
        self.taken.clear()


class Engine:
    """An engine that computes with ``compute(**inputs) -> outputs`` of numpy, and its own execution context.

    Args:
        inputs: TensorRT's types by name.
        outputs: The same; a name that ends with ``?`` is of a shape that only the run tells.
        compute: The computation.
        host: Names of tensors that lie on the host: shape tensors.
    """

    num_optimization_profiles = 2

    def __init__(self, inputs, outputs, compute, host=(), shapes=None):
        self.kinds = {**inputs, **outputs}
        self.inputs, self.host = list(inputs), host
        self.compute, self.known = compute, shapes or {}
        self.profile, self.shapes, self.addresses, self.allocators = 0, {}, {}, {}

    num_io_tensors = property(lambda self: len(self.kinds))

    def get_tensor_name(self, index):
        return list(self.kinds)[index]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_location(self, name):
        return Location.HOST if name in self.host else Location.DEVICE

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.kinds[name])

    def create_execution_context(self):
        return self

    def set_optimization_profile_async(self, profile, _stream):
        self.profile = profile
        return profile < self.num_optimization_profiles

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return 99 not in shape

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def set_output_allocator(self, name, allocator):
        self.allocators[name] = allocator

    def infer_shapes(self):
        return [name for name in self.inputs if name not in self.addresses]

    def get_tensor_shape(self, name):
        return self.known.get(name, ()) if name in self.known else self._results()[name].shape

    def _results(self):
        arrays = {}
        for name in self.inputs:
            array = np.zeros(self.shapes[name], NUMPY[self.kinds[name]])
            ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
            arrays[name] = array
        return self.compute(**arrays)

    def execute_async_v3(self, _stream):
        for name, result in self._results().items():
            array = np.ascontiguousarray(result.astype(NUMPY[self.kinds[name]]))
            if name in self.allocators:
                self.addresses[name] = self.allocators[name].reallocate_output(name, 0, array.nbytes, 256)
                self.allocators[name].notify_shape(name, array.shape)
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)
        return True


def test_outputs_come_in_the_order_of_the_model_and_memory_is_given_back():
    memory = Memory()
    engine = Engine({"x": "FLOAT"}, {"b": "FLOAT", "a": "FLOAT"}, lambda x: {"a": x * 2, "b": x.sum(1)})
    x = models.normal(3, 4)
    double, total = Execution(engine, TRT, memory).run(0, {"x": x}, ["a", "b"])
    assert np.array_equal(double, x * 2)
    assert np.allclose(total, x.sum(1))
    assert (memory.freed, memory.taken) == (3, {})


@pytest.mark.parametrize(
    ("kind", "given"), [("HALF", np.float32), ("BF16", np.float32), ("INT32", np.int64), ("BOOL", np.bool_)]
)
def test_arrays_are_cast_to_the_engines_types(kind, given):
    values = np.array([0, 1, 1, 0]) if kind == "BOOL" else np.array([0, 1, 300, -7])
    engine = Engine({"x": kind}, {"y": kind}, lambda x: {"y": x})
    (found,) = Execution(engine, TRT, Memory()).run(0, {"x": values.astype(given)}, ["y"])
    assert found.astype(float).tolist() == values.astype(given).astype(NUMPY[kind]).astype(float).tolist()


def test_shape_tensor_is_given_on_the_host():
    engine = Engine({"x": "FLOAT", "s": "INT32"}, {"y": "FLOAT"}, lambda x, s: {"y": x.reshape(s)}, host=["s"])
    (found,) = Execution(engine, TRT, Memory()).run(0, {"x": models.normal(2, 6), "s": np.array([3, 4])}, ["y"])
    assert found.shape == (3, 4)


def test_output_whose_size_only_the_run_tells_is_allocated_by_the_run():
    engine = Engine({"x": "FLOAT"}, {"y": "INT32"}, lambda x: {"y": np.argwhere(x > 0)}, shapes={"y": (-1, 1)})
    (found,) = Execution(engine, TRT, Memory()).run(0, {"x": np.array([1, -1, 2], np.float32)}, ["y"])
    assert found.tolist() == [[0], [2]]


def test_output_on_the_host_is_read_there():
    engine = Engine({"x": "FLOAT"}, {"y": "INT32"}, lambda x: {"y": np.array(x.shape)}, host=["y"])
    assert Execution(engine, TRT, Memory()).run(0, {"x": models.normal(2, 5)}, ["y"])[0].tolist() == [2, 5]


def test_profile_is_chosen():
    engine = Engine({"x": "FLOAT"}, {"y": "FLOAT"}, lambda x: {"y": x})
    execution = Execution(engine, TRT, Memory())
    execution.run(1, {"x": models.normal(2)}, ["y"])
    assert engine.profile == 1
    with pytest.raises(execute._NoRun, match="no profile 2"):
        execution.run(2, {"x": models.normal(2)}, ["y"])


def test_input_that_is_an_output_too_has_the_engines_name():
    engine = Engine({"__x": "FLOAT", "z": "FLOAT"}, {"x": "FLOAT"}, lambda __x, z: {"x": __x + z})
    (found,) = Execution(engine, TRT, Memory()).run(0, {"x": np.ones(2), "z": np.ones(2)}, ["x"])
    assert found.tolist() == [2, 2]


def test_input_that_the_engine_does_not_read_is_left_out():
    engine = Engine({"x": "FLOAT"}, {"y": "FLOAT"}, lambda x: {"y": x})
    assert Execution(engine, TRT, Memory()).run(0, {"x": np.ones(2), "unused": np.ones(9)}, ["y"])[0].size == 2


@pytest.mark.parametrize(
    ("shape", "wanted", "said"), [((99,), ["y"], "of shape 99"), ((2,), ["z"], "no output 'z'; it has y")]
)
def test_engine_that_cannot_run_says_why(shape, wanted, said):
    engine = Engine({"x": "FLOAT"}, {"y": "FLOAT"}, lambda x: {"y": x})
    with pytest.raises(execute._NoRun, match=said):
        Execution(engine, TRT, Memory()).run(0, {"x": np.ones(shape)}, wanted)


def test_type_that_numpy_does_not_have_is_refused():
    engine = Engine({"x": "FP8"}, {"y": "FP8"}, lambda x: {"y": x})
    with pytest.raises(CheckUnavailableError, match="FP8"):
        Execution(engine, TRT, Memory()).run(0, {"x": np.ones(2)}, ["y"])


@pytest.fixture
def no_driver():
    try:
        list_devices()
    except NoDeviceError:
        return
    pytest.skip("probe: a GPU is here")


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_nothing_of_tensorrt_is_touched():
    pytest.importorskip("cuda.bindings", reason="probe: cuda-bindings is not installed")
    with pytest.raises(CheckUnavailableError, match="the CUDA driver cannot be used"):
        Driver()


class ScriptedChecker(models.HereChecker):
    """Answers for the engine's process."""

    def __init__(self, report):
        super().__init__()
        self.report = report

    def run_child(self, module, request, device):
        return self.report if module == EXECUTE else super().run_child(module, request, device)


LINEAR = models.model("(float[4,8] x) => (float[4,8] y) { y = MatMul(x, w) }", w=models.normal(8, 8))


def checked(tmp_path, monkeypatch, report):
    from dataclasses import replace

    import builder_models

    monkeypatch.setattr("enginecache.quality.check.require_packages", lambda _device: None)
    (tmp_path / "check").mkdir()
    subject = replace(models.subject_of(tmp_path, LINEAR), device=builder_models.ADA)
    return ScriptedChecker(report).check(subject, CheckOptions(), tmp_path / "check")


FAILURE = {"kind": "no_engine", "lines": ["bad magic"], "diagnostics": [], "what": ""}


@pytest.mark.parametrize(
    ("report", "verdict", "said"),
    [
        (
            {"event": "died", "what": "by SIGSEGV", "after": "running"},
            "failed",
            "crashed while it ran",
        ),
        ({"event": "died", "what": "by SIGSEGV", "after": "deserializing"}, "failed", "crashed while it was loaded"),
        ({"event": "died", "what": "by SIGSEGV", "after": ""}, "uninformative", "could not be run"),
        ({"event": "no_run", "what": "TensorRT did not run the engine"}, "failed", "did not run"),
        ({"event": "timeout", "what": "it did not end within 600 s"}, "failed", "within 600 s"),
        ({"event": "failed", "what": "out of memory"}, "uninformative", "out of memory"),
        (
            {"event": "failed", "what": "no context", "log": ["a", "no CUDNN handle"]},
            "uninformative",
            "no CUDNN handle",
        ),
        ({"event": "not_loaded", "failure": FAILURE}, "failed", "bad magic"),
        ({"event": "not_loaded", "failure": {**FAILURE, "kind": "memory"}}, "uninformative", "memory"),
    ],
)
def test_end_of_the_engines_process_decides(tmp_path, monkeypatch, report, verdict, said):
    found = checked(tmp_path, monkeypatch, report)
    assert (found.verdict, found.scope, found.device) == (verdict, "engine", "NVIDIA L4")
    assert said in found.reason


@pytest.mark.parametrize(("status", "event"), [(1, "failed"), (0, "failed"), (-11, "died"), (-9, "failed")])
def test_only_a_crash_is_the_engines_and_no_exception(monkeypatch, status, event):
    class Worker:
        def reports(self):
            return iter([{"event": "running"}])

        def wait(self):
            return status

        def not_ready(self, _status, _tail):
            return None

    monkeypatch.setattr("enginecache.quality.check.running_worker", lambda *_, **__: contextlib.nullcontext(Worker()))
    assert Checker().run_child(EXECUTE, {}, None)["event"] == event


def test_folder_that_is_deleted_during_a_check_is_an_error_and_no_verdict(tmp_path, monkeypatch):
    def run_child(checker, _module, request, _device):
        shutil.rmtree(request["folder"])
        return checker.report

    monkeypatch.setattr(ScriptedChecker, "run_child", run_child)
    monkeypatch.setattr("enginecache.quality.check._Run._compute_reference", lambda _: {"outputs": ["y"]})
    with pytest.raises(StoreError, match="the arrays of a check"):
        checked(tmp_path, monkeypatch, {"event": "done"})


def test_all_work_on_the_gpu_is_asked_of_the_engines_stream():
    """Work of the default stream is not ordered with it: memory was filled after the engine had written it."""
    asked = []

    class Cuda:
        def __getattr__(self, name):
            def call(*arguments):
                asked.append((name, arguments))
                return 0, 4096

            return call

    driver = object.__new__(Driver)
    driver._cuda, driver._stream, driver._taken = Cuda(), 7, []
    array = np.arange(4, dtype=np.int32)
    pointer = driver.upload(array)
    driver.wait()
    driver.download(pointer, array)
    assert [name for name, _ in asked] == [
        *("cuMemAlloc", "cuMemsetD8Async", "cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuMemcpyDtoH"),
    ]
    assert all(arguments[-1] == 7 for name, arguments in asked if name.endswith(("Async", "Synchronize")))


def test_error_of_the_driver_has_its_name_and_knows_memory():
    assert DriverError(2, "cuMemAlloc: out of memory").is_about_memory
    assert not DriverError(700, "cuStreamSynchronize: an illegal memory access was encountered").is_about_memory
