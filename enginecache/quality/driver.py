"""The CUDA driver, as far as running an engine needs it: one context and stream, and memory on the GPU."""

from __future__ import annotations

from typing import Any

from enginecache.errors import CheckUnavailableError

_FILL = 0xFF
"""New memory is filled with it: floats are then NaN, so that an engine which writes nothing is not taken for right."""


class Driver:
    """The first GPU that this process sees, in the primary context, which the CUDA runtime uses too.

    Everything is asked of one stream, in order: work of the default stream does not wait for a stream that does not
    block, nor the other way round, so memory that was filled there could be filled after the engine had written it
    (seen on an H200, 2026-12-01). Not safe across threads. It lives as long as the process.

    Raises:
        CheckUnavailableError: There is no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver

            self._cuda = driver
            self._call(driver.cuInit, 0)
        except (ImportError, RuntimeError, OSError) as error:  # cuda-bindings raises these where there is no libcuda
            raise CheckUnavailableError(f"the CUDA driver cannot be used: {error}", _SEE_DOCTOR) from error
        device = self._call(driver.cuDeviceGet, 0)
        self._call(driver.cuCtxSetCurrent, self._call(driver.cuDevicePrimaryCtxRetain, device))
        self._stream = self._call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._taken: list[int] = []

    @property
    def stream(self) -> int:
        """Return the stream in the form that TensorRT takes."""
        return int(self._stream)

    def allocate(self, size_bytes: int) -> int:
        """Return memory on the GPU, filled with bytes that make no number. :meth:`free_all` gives it back."""
        size_bytes = max(size_bytes, 1)
        pointer = int(self._call(self._cuda.cuMemAlloc, size_bytes))
        self._taken.append(pointer)
        self._call(self._cuda.cuMemsetD8Async, pointer, _FILL, size_bytes, self._stream)
        return pointer

    def upload(self, array: Any) -> int:
        """Return memory on the GPU with the bytes of a contiguous array, which must live until :meth:`wait` returns."""
        pointer = self.allocate(array.nbytes)
        if array.nbytes:
            self._call(self._cuda.cuMemcpyHtoDAsync, pointer, array.ctypes.data, array.nbytes, self._stream)
        return pointer

    def download(self, pointer: int, array: Any) -> None:
        """Fill a contiguous array from memory on the GPU; call :meth:`wait` before."""
        if array.nbytes:
            self._call(self._cuda.cuMemcpyDtoH, array.ctypes.data, pointer, array.nbytes)

    def wait(self) -> None:
        """Wait for all that was asked of the stream."""
        self._call(self._cuda.cuStreamSynchronize, self._stream)

    def free_all(self) -> None:
        """Give back all memory."""
        while self._taken:
            self._call(self._cuda.cuMemFree, self._taken.pop())

    def _call(self, function: Any, *arguments: Any) -> Any:
        status, *results = function(*arguments)
        if int(status):
            _, text = self._cuda.cuGetErrorString(status)
            said = text.decode() if isinstance(text, bytes) else f"error {int(status)}"
            raise DriverError(int(status), f"{function.__name__}: {said}")
        return results[0] if results else None


class DriverError(RuntimeError):
    """A call of the CUDA driver failed.

    Attributes:
        status: The number of the error.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status

    @property
    def is_about_memory(self) -> bool:
        """True where the GPU had too little memory. Source: CUDA driver API, CUDA_ERROR_OUT_OF_MEMORY."""
        return self.status == 2


_SEE_DOCTOR = "`enginecache doctor` shows the GPUs and the driver."
