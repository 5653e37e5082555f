"""The engine, run on the GPU through the CUDA driver, in a child process.

``python -m enginecache.quality.execute`` takes one request and reports one result; see :mod:`enginecache.trt.child` for
its pipes. An engine that crashes takes this process with it, and not its parent.

Named tensors and ``execute_async_v3``, which TensorRT has had since 8.5, are all that is used.

Source: NVIDIA TensorRT documentation, Python API, IExecutionContext and IOutputAllocator, 8.6 to 11.4.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enginecache.errors import CheckUnavailableError, EngineCacheError
from enginecache.files.plain import from_plain, to_plain
from enginecache.quality.driver import Driver, DriverError
from enginecache.quality.inputs import Point
from enginecache.quality.reference import load_arrays, save_arrays
from enginecache.quality.rounding import BFLOAT16, round_to
from enginecache.trt.child import Reports, end_process, receive_request
from enginecache.trt.load.deserialize import deserialize
from enginecache.trt.load.request import Failure, LoadRequest
from enginecache.trt.loaded_version import load_module

_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "uint16",
    "BOOL": "bool",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
}
"""Numpy's names of TensorRT's types. BF16 is handled as its bits."""


def main() -> None:
    """Read the request, run the engine, report, and end the process."""
    record, reports = receive_request()
    with contextlib.suppress(OSError, ValueError):
        # A crash is an outcome here, and a core of this process would be as large as the GPU's mappings.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    run(record, reports)
    end_process(0)


def run(record: Mapping[str, Any], reports: Reports) -> None:
    """Run the engine at every point, and send exactly one result."""
    try:
        driver = Driver()  # before TensorRT: a Runtime without a driver crashes
        request = from_plain(LoadRequest, record["plan"])
        loaded = deserialize(request, echo=sys.stderr, before=lambda: reports.send({"event": "deserializing"}))
        if isinstance(loaded, Failure):
            reports.send({"event": "not_loaded", "failure": to_plain(loaded)})
            return
        reports.send({"event": "running"})
        execution = Execution(loaded.engine, load_module(request.flavour), driver)
        folder = Path(record["folder"])
        for index, fields in enumerate(record["points"]):
            point = Point.from_json(fields)
            arrays = load_arrays(folder / f"inputs-{index}.npz")
            feeds = dict(zip((entry.name for entry in point.inputs), arrays, strict=True))
            save_arrays(folder / f"found-{index}.npz", execution.run(point.profile, feeds, record["outputs"]))
    except _NoRun as error:
        reports.send({"event": "no_run", "what": str(error)})
    except (EngineCacheError, DriverError, MemoryError) as error:
        what = error.what if isinstance(error, EngineCacheError) else str(error) or "out of memory"
        # An error of the driver while the engine runs is the engine's, unless memory ran out.
        is_engines = isinstance(error, DriverError) and not error.is_about_memory
        reports.send({"event": "no_run" if is_engines else "failed", "what": what})
    else:
        reports.send({"event": "done"})


class _NoRun(Exception):  # noqa: N818  # never leaves this module
    """The engine does not run with inputs that its profile has."""


class Execution:
    """An engine with an execution context.

    Args:
        engine: The ``ICudaEngine``.
        trt: The module that it is of.
        driver: The GPU.
    """

    def __init__(self, engine: Any, trt: Any, driver: Driver) -> None:
        self._engine, self._trt, self._driver = engine, trt, driver
        self._context = engine.create_execution_context()
        if self._context is None:
            raise CheckUnavailableError("TensorRT gave no execution context", "")
        self._profile = 0
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]

    def run(self, profile: int, feeds: Mapping[str, Any], wanted: Sequence[str]) -> list[Any]:
        """Run once, and return the outputs in the order of ``wanted``. Blocks until they are there.

        Args:
            profile: Index of the optimization profile.
            feeds: Arrays by the names of the model's inputs; they are cast to the engine's types.
            wanted: Names of the model's outputs.
        """
        try:
            return self._run(profile, feeds, wanted)
        finally:
            self._driver.free_all()

    def _run(self, profile: int, feeds: Mapping[str, Any], wanted: Sequence[str]) -> list[Any]:
        context, driver = self._context, self._driver
        self._choose(profile)
        kept = [self._feed(name, array) for name, array in self._named(feeds).items()]
        lacking = context.infer_shapes()
        if lacking:
            raise _NoRun(f"the engine needs more inputs: {', '.join(lacking)}")
        missing = [name for name in wanted if name not in self.outputs]
        if missing:
            raise _NoRun(f"the engine has no output {missing[0]!r}; it has {', '.join(self.outputs)}")
        results = {name: self._prepare(name) for name in self.outputs}
        if not context.execute_async_v3(driver.stream):
            raise _NoRun("TensorRT did not run the engine")
        driver.wait()
        del kept
        return [results[name].fetch(driver) for name in wanted]

    def _choose(self, profile: int) -> None:
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._driver.stream):
                raise _NoRun(f"the engine has no profile {profile}")
            self._driver.wait()
            self._profile = profile

    def _named(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arrays by the engine's names: an input that is also an output has another there.

        The parser keeps the model's order, so those whose names are in only one of the two belong together in order.
        """
        renamed = iter([name for name in self.inputs if name not in feeds])
        names = {name: name if name in self.inputs else next(renamed, None) for name in feeds}
        # An input that nothing reads is not in the engine.
        return {own: feeds[name] for name, own in names.items() if own is not None}

    def _feed(self, name: str, array: Any) -> Any:
        """Give the engine an input; what must live until it has run."""
        array = self._cast(name, array)
        if not self._context.set_input_shape(name, tuple(array.shape)):
            raise _NoRun(f"the engine does not take input {name!r} of shape {'x'.join(map(str, array.shape))}")
        if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:  # a shape tensor
            pointer = array.ctypes.data
        else:
            pointer = self._driver.upload(array)
        if not self._context.set_tensor_address(name, pointer):
            raise _NoRun(f"the engine does not take an address for input {name!r}")
        return array

    def _cast(self, name: str, array: Any) -> Any:
        import numpy as np

        kind = self._kind(name)
        if kind == "BF16":
            array = (round_to(array, BFLOAT16).view(np.uint32) >> 16).astype(np.uint16)
        with np.errstate(over="ignore"):
            shape = array.shape
            return np.ascontiguousarray(array.astype(_NUMPY[kind])).reshape(shape)

    def _kind(self, name: str) -> str:
        kind = str(self._engine.get_tensor_dtype(name).name)
        if kind not in _NUMPY:
            raise CheckUnavailableError(f"{name!r} is of TensorRT's type {kind}, which cannot be given to it here", "")
        return kind

    def _prepare(self, name: str) -> _Result:
        """Give the engine memory for an output; where only the run tells its size, a way to get it."""
        import numpy as np

        kind = self._kind(name)
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            allocator = _make_allocator(self._trt, self._driver)
            self._context.set_output_allocator(name, allocator)
            return _Result(kind, allocator=allocator)
        array = np.zeros(shape, _NUMPY[kind])
        if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
            self._context.set_tensor_address(name, array.ctypes.data)
            return _Result(kind, array)
        pointer = self._driver.allocate(array.nbytes)
        self._context.set_tensor_address(name, pointer)
        return _Result(kind, array, pointer)


class _Result:
    """Where one output goes.

    Args:
        kind: TensorRT's name of its type.
        array: For its elements, on the host; None where its shape is not known yet.
        pointer: Where they are on the GPU; 0 where the engine writes to the host.
        allocator: What knows its shape when the engine has run.
    """

    def __init__(self, kind: str, array: Any = None, pointer: int = 0, allocator: Any = None) -> None:
        self._kind, self._array, self._pointer, self._allocator = kind, array, pointer, allocator

    def fetch(self, driver: Driver) -> Any:
        """Return the elements; BF16 as FP32."""
        import numpy as np

        array, pointer = self._array, self._pointer
        if self._allocator is not None:
            array, pointer = np.zeros(self._allocator.shape, _NUMPY[self._kind]), self._allocator.pointer
        if pointer:
            driver.download(pointer, array)
        return (array.astype(np.uint32) << 16).view(np.float32) if self._kind == "BF16" else array


def _make_allocator(trt: Any, driver: Driver) -> Any:
    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.pointer = 0
            self.shape: tuple[int, ...] = (0,)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:  # noqa: ARG002
            self.pointer = driver.allocate(size)  # of 256 bytes' alignment, which is more than TensorRT asks for
            return self.pointer

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            del stream
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:  # noqa: ARG002
            self.shape = tuple(shape)

    return Allocator()


if __name__ == "__main__":
    main()
