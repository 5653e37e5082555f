"""The GPUs of this host, as CUDA would number them.

NVML describes the GPUs within milliseconds and without a CUDA context, but in an order of its own. Where that order
could matter, and where a GPU is split into MIG instances, CUDA itself is asked, through pycuda. Nothing is guessed: a
host that neither can describe is a ``NoDeviceError``.
"""

from enginecache.devices.base import Device
from enginecache.devices.cuda import read_cuda
from enginecache.devices.current import current_device
from enginecache.devices.driver import driver_problem
from enginecache.devices.listing import find_device, list_devices
from enginecache.devices.nvml import CORES_PER_SM, NvmlGpu, read_nvml

__all__ = [
    "CORES_PER_SM",
    "Device",
    "NvmlGpu",
    "current_device",
    "driver_problem",
    "find_device",
    "list_devices",
    "read_cuda",
    "read_nvml",
]
