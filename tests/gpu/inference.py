"""Run a deserialized engine on the GPU through the CUDA driver alone."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "BOOL": "bool"}


class Gpu:
    """The first device's primary context, which the CUDA runtime inside TensorRT uses too.

    Args:
        ordinal: CUDA ordinal of the device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result:
            raise RuntimeError(f"{name}: CUDA driver error {result}")

    def make_current(self) -> None:
        """Make the context current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Free memory of the device."""
        self.make_current()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def infer(self, engine: Any, feeds: dict[str, np.ndarray], profile: int = 0) -> dict[str, np.ndarray]:
        """Return the outputs of one inference by name.

        Args:
            engine: An ``ICudaEngine`` with named tensors (TensorRT 8.5 and later).
            feeds: Inputs by name.
            profile: Index of the optimization profile.

        Raises:
            ValueError: A shape is outside the profile.
        """
        self.make_current()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        context = engine.create_execution_context()
        if profile and not context.set_optimization_profile_async(profile, stream.value):
            raise ValueError(f"there is no profile {profile}")
        buffers: list[_Buffer] = []
        try:
            buffers += [self._feed(engine, context, name, given) for name, given in feeds.items()]
            names = map(engine.get_tensor_name, range(engine.num_io_tensors))
            outputs = {name: self._output(engine, context, name) for name in names if name not in feeds}
            buffers += outputs.values()
            if not context.execute_async_v3(stream.value):
                raise RuntimeError("the engine did not run")
            self._call("cuStreamSynchronize", stream)
            for one in outputs.values():
                size = ctypes.c_size_t(one.array.nbytes)
                self._call("cuMemcpyDtoH_v2", one.host, ctypes.c_uint64(one.pointer), size)
            return {name: one.array for name, one in outputs.items()}
        finally:
            for one in buffers:
                if one.pointer:
                    self._call("cuMemFree_v2", ctypes.c_uint64(one.pointer))
            del context
            self._call("cuStreamDestroy_v2", stream)

    def _feed(self, engine: Any, context: Any, name: str, given: np.ndarray) -> _Buffer:
        array = np.ascontiguousarray(given, dtype=_dtype(engine, name))
        if engine.is_shape_inference_io(name):  # a shape tensor lies in the host's memory
            context.set_tensor_address(name, array.ctypes.data)
            return _Buffer(array, 0)
        if not context.set_input_shape(name, array.shape):
            raise ValueError(f"{name}: {array.shape} is outside the profile")
        one = self._allocate(array)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(one.pointer), one.host, ctypes.c_size_t(array.nbytes))
        context.set_tensor_address(name, one.pointer)
        return one

    def _output(self, engine: Any, context: Any, name: str) -> _Buffer:
        one = self._allocate(np.empty(tuple(context.get_tensor_shape(name)), _dtype(engine, name)))
        context.set_tensor_address(name, one.pointer)
        return one

    def _allocate(self, array: np.ndarray) -> _Buffer:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 1)))
        return _Buffer(array, pointer.value)


class _Buffer(NamedTuple):
    """An array of the host and its place on the device; 0 for none."""

    array: np.ndarray
    pointer: int

    @property
    def host(self) -> ctypes.c_void_p:
        return self.array.ctypes.data_as(ctypes.c_void_p)


def _dtype(engine: Any, name: str) -> str:
    return _NUMPY[str(engine.get_tensor_dtype(name)).rpartition(".")[2]]
