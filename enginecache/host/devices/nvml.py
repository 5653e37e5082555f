"""Read all GPUs of the host from NVML, in NVML's order, without a CUDA context."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from enginecache.errors import NoDeviceError
from enginecache.host.devices.device import ASK_CUDA, NAME_A_TARGET, Device, bus_id, cuda_version
from enginecache.host.targets import ComputeCapability

_WITH_64_CORES = ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0))
_WITH_128_CORES = (
    *((5, 0), (5, 2), (5, 3), (6, 1), (6, 2)),
    *((8, 6), (8, 7), (8, 9), (9, 0)),
    *((10, 0), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1)),
)
CORES_PER_SM: Mapping[tuple[int, int], int] = {
    **dict.fromkeys(_WITH_64_CORES, 64),
    **dict.fromkeys(_WITH_128_CORES, 128),
}
"""CUDA cores of one streaming multiprocessor. NVML counts cores, TensorRT tunes for multiprocessors.

NVML also counts multiprocessors, in ``nvmlDeviceGetAttributes_v2``, but only those of MIG instances.

Source: NVIDIA/cuda-samples, ``Common/helper_cuda.h``, ``_ConvertSMVer2Cores``, commit c94ff366 (2025-09); NVML API
reference, ``nvmlDeviceGetAttributes_v2``: "currently only supports MIG device handles".
"""


@dataclass(frozen=True)
class NvmlGpu:
    """One GPU as NVML describes it.

    Attributes:
        device: Its description; the ordinal is NVML's.
        has_mig: Whether it is split into MIG instances; CUDA then shows an instance, with fewer multiprocessors.
    """

    device: Device
    has_mig: bool = False


def read_nvml(nvml: Any = None) -> tuple[NvmlGpu, ...]:
    """Describe every GPU of the host, in NVML's order.

    Creates no CUDA context and ignores ``CUDA_VISIBLE_DEVICES``. Safe across threads: NVML counts its users.

    Args:
        nvml: The module ``pynvml`` of nvidia-ml-py, or one that answers like it.

    Raises:
        NoDeviceError: There is no NVML, no usable driver, or an answer is missing.
    """
    nvml = _import_nvml() if nvml is None else nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoDeviceError(f"no usable NVIDIA driver: NVML says {str(error)!r}", NAME_A_TARGET) from error
    try:
        return tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError as error:
        raise NoDeviceError(
            f"the NVIDIA driver cannot list its GPUs: NVML says {str(error)!r}",
            f"Update the driver, or install pycuda. {NAME_A_TARGET}",
        ) from error
    except AttributeError as error:
        raise NoDeviceError(f"this nvidia-ml-py is too old: {error}", "pip install --upgrade nvidia-ml-py") from error
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise NoDeviceError(
            "nvidia-ml-py, which describes GPUs, is not installed", f"pip install nvidia-ml-py. {NAME_A_TARGET}"
        ) from None
    return pynvml


def _gpu(nvml: Any, index: int) -> NvmlGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = _text(nvml.nvmlDeviceGetName(handle))
    capability = ComputeCapability(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    device = Device(
        ordinal=index,
        name=name,
        compute_capability=capability,
        sm_count=_sm_count(name, capability, nvml.nvmlDeviceGetNumGpuCores(handle)),
        memory_bytes=_memory_bytes(nvml, handle),
        uuid=uuid,
        pci_bus_id=bus_id(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
        driver_version=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda_driver_version=_cuda_driver_version(nvml),
        visible_as=uuid,
    )
    return NvmlGpu(device, _has_mig(nvml, handle))


def _cuda_driver_version(nvml: Any) -> tuple[int, int]:
    """Return the CUDA level of the ``libcuda.so.1`` that a program here would load.

    Not ``nvmlSystemGetCudaDriverVersion``, which invents a version if there is no such library.

    Source: NVML API reference, "System Queries".
    """
    try:
        return cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2())
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            raise
        raise NoDeviceError(
            "the NVIDIA driver is installed without CUDA: libcuda.so.1 is not found",
            "Start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install the driver's CUDA part. "
            f"{NAME_A_TARGET}",
        ) from error


def _has_mig(nvml: Any, handle: Any) -> bool:
    answer = _if_supported(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return answer is not None and bool(answer[0] == nvml.NVML_DEVICE_MIG_ENABLE)


def _memory_bytes(nvml: Any, handle: Any) -> int:
    answer = _if_supported(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return 0 if answer is None else int(answer.total)


def _if_supported(nvml: Any, question: Callable[[Any], Any], handle: Any) -> Any:
    """Return NVML's answer, or None if this GPU or driver does not support the question; raise any other error."""
    try:
        return question(handle)
    except nvml.NVMLError as error:
        if error.value in {nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND}:
            return None
        raise


def _sm_count(name: str, capability: ComputeCapability, cores: int) -> int:
    per_sm = CORES_PER_SM.get(capability)
    if per_sm is None or cores <= 0 or cores % per_sm:
        raise NoDeviceError(
            f"the number of multiprocessors of {name} ({capability.sm}) cannot be derived from its {cores} cores",
            f"{ASK_CUDA}.",
        )
    return cores // per_sm


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
