"""The GPUs of this host, as CUDA would number them.

NVML describes the GPUs within milliseconds and without a CUDA context, but in an order of its own. Where that order
could matter, and where a GPU is split into MIG instances, CUDA itself is asked, through pycuda. Nothing is guessed: a
host that neither can describe is a ``NoDeviceError``.
"""

from enginecache.host.devices.cuda import read_cuda
from enginecache.host.devices.current import current_device
from enginecache.host.devices.device import Device
from enginecache.host.devices.driver import driver_problem
from enginecache.host.devices.listing import find_device, list_devices
from enginecache.host.devices.nvml import CORES_PER_SM, NvmlGpu, read_nvml

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
