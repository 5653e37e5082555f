"""GPUs of this host, numbered as CUDA numbers them.

NVML describes the GPUs within milliseconds and without a CUDA context, but in its own order. If that order could
matter, or a GPU is split into MIG instances, CUDA itself is asked, through pycuda. Nothing is guessed: if neither can
describe the GPUs, the result is a ``NoDeviceError``.
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
