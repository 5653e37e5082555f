"""The GPU that is current in this process: where TensorRT's runtime would put an engine."""

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
    """The GPU whose CUDA context is current in the calling thread; without one, the GPU that CUDA would use.

    Starts no CUDA and loads no CUDA library: it looks only into one that the process has loaded and started. (Listing
    the GPUs asks CUDA where NVML cannot tell.) The GPU is known by its PCI bus id, as numbers go by what
    ``CUDA_VISIBLE_DEVICES`` was when CUDA started. A ``cudaSetDevice`` that made no context, as before CUDA 12, is not
    seen.

    Args:
        devices: Lists the GPUs.

    Raises:
        NoDeviceError: There is no GPU, which ones there are cannot be told, or the current one is not among them.

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
    """Where the GPU of the calling thread's CUDA context is; None where there is no such context."""
    try:
        # RTLD_NOLOAD: the one that is loaded already, or an error.
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
