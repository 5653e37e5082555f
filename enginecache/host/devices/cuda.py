"""Read the GPUs that CUDA shows to this process, in CUDA's order, through pycuda."""

from __future__ import annotations

import warnings
from typing import Any

from enginecache.errors import NoDeviceError
from enginecache.host.devices.device import NAME_A_TARGET, Device, bus_id, cuda_version
from enginecache.host.targets import ComputeCapability


def read_cuda(cuda: Any = None) -> tuple[Device, ...]:
    """Describe the GPUs that CUDA shows to this process, in CUDA's order.

    Initialises the CUDA driver in this process (about 200 ms) and creates no context. CUDA reads the process's own
    environment, once: later changes of ``CUDA_VISIBLE_DEVICES`` do not count.

    Args:
        cuda: The module ``pycuda.driver``, or one that answers like it.

    Raises:
        NoDeviceError: pycuda is not installed, or CUDA does not answer.
    """
    cuda = _import_cuda() if cuda is None else cuda
    try:
        cuda.init()
        return tuple(_device(cuda, ordinal) for ordinal in range(cuda.Device.count()))
    except cuda.Error as error:
        raise NoDeviceError(f"CUDA cannot list its GPUs: {error}", NAME_A_TARGET) from error


def _import_cuda() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycuda warns in prose of the error that it then raises
            import pycuda.driver
    except ModuleNotFoundError:
        raise NoDeviceError("pycuda is not installed", "pip install pycuda") from None
    except ImportError as error:
        raise NoDeviceError(f"pycuda cannot be imported: {error}", NAME_A_TARGET) from error
    return pycuda.driver


def _device(cuda: Any, ordinal: int) -> Device:
    device = cuda.Device(ordinal)
    return Device(
        ordinal=ordinal,
        name=device.name(),
        compute_capability=ComputeCapability(*device.compute_capability()),
        sm_count=device.get_attribute(cuda.device_attribute.MULTIPROCESSOR_COUNT),
        memory_bytes=device.total_memory(),
        uuid="",
        pci_bus_id=bus_id(device.pci_bus_id()),
        driver_version="",
        cuda_driver_version=cuda_version(cuda.get_driver_version()),
        l2_bytes=device.get_attribute(cuda.device_attribute.L2_CACHE_SIZE),
    )
