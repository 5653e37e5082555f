"""Find the current GPU of this process, where TensorRT's runtime would load an engine."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from enginecache.errors import NoDeviceError
from enginecache.host.devices.device import Device, bus_id
from enginecache.host.devices.listing import find_device, list_devices

_LIBRARY = "libcuda.so.1"
_BUS_ID_BYTES = 32


def current_device(devices: Callable[[], tuple[Device, ...]] = list_devices) -> Device:
    """Return the GPU of the calling thread's CUDA context; without a context, the GPU that CUDA would use.

    Does not initialize CUDA and loads no CUDA library: it uses only one that the process has loaded. (Listing the GPUs
    asks CUDA if NVML is not enough.) The GPU is identified by its PCI bus id, since device numbers depend on
    ``CUDA_VISIBLE_DEVICES`` at the time when CUDA started. A ``cudaSetDevice`` that created no context, as before CUDA
    12, is not seen.

    Args:
        devices: Lists the GPUs.

    Raises:
        NoDeviceError: There is no GPU, the GPUs are unknown, or the current one is not among them.

    Source: CUDA driver API, ``cuCtxGetDevice``, ``cuDeviceGetPCIBusId``; CUDA runtime API 12, ``cudaSetDevice``.
    """
    current = _current_bus_id()
    if current is None:
        return find_device(devices=devices)
    for device in devices():
        if device.pci_bus_id == current:
            return device
    raise NoDeviceError(
        f"the GPU that this process uses, {current}, is not one that CUDA_VISIBLE_DEVICES shows",
        "Set CUDA_VISIBLE_DEVICES before the program starts, not after CUDA has started.",
    )


def _current_bus_id() -> str | None:
    """Return the PCI bus id of the calling thread's CUDA context; None without a context."""
    try:
        # RTLD_NOLOAD: the library that is loaded already, or an error.
        cuda = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuCtxGetDevice(ctypes.byref(device)) != 0:
        return None
    text = ctypes.create_string_buffer(_BUS_ID_BYTES)
    if cuda.cuDeviceGetPCIBusId(text, ctypes.c_int(_BUS_ID_BYTES), device) != 0:
        return None
    return bus_id(text.value.decode())
