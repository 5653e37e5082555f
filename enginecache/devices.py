"""The GPUs of this host, as CUDA would number them.

NVML describes the GPUs within milliseconds and without a CUDA context, but in an order of its own. Where that order
could matter, and where a GPU is split into MIG instances, CUDA itself is asked, through pycuda. Nothing is guessed: a
host that neither can describe is a ``NoDeviceError``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from enginecache.errors import NoDeviceError
from enginecache.targets import ComputeCapability, DeviceModel

_NAME_A_TARGET = "Name what to build for, such as --target sm_89 (TensorRT-RTX needs no GPU for it), or use a GPU host."
_ASK_CUDA = (
    "Install enginecache[cuda], so that CUDA can be asked, or name one whole GPU: "
    "CUDA_VISIBLE_DEVICES=GPU-... with its UUID from nvidia-smi -L."
)

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

Source: NVIDIA/cuda-samples, ``Common/helper_cuda.h``, ``_ConvertSMVer2Cores``, commit c94ff366 (2025-09).
"""


@dataclass(frozen=True)
class Device:
    """One GPU found now.

    Attributes:
        ordinal: CUDA's number of it in this process, under ``CUDA_VISIBLE_DEVICES``.
        name: The driver's product name.
        compute_capability: Its architecture.
        sm_count: Streaming multiprocessors.
        memory_bytes: Whole memory; 0 where the driver does not tell, as for a GPU that shares the host's memory.
        uuid: ``GPU-...``; of the whole GPU for a MIG instance; empty where NVML cannot be asked.
        pci_bus_id: ``00000000:17:00.0``.
        driver_version: Such as ``580.65.06``; empty where NVML cannot be asked.
        cuda_driver_version: CUDA level of the driver, ``(13, 0)``.
    """

    ordinal: int
    name: str
    compute_capability: ComputeCapability
    sm_count: int
    memory_bytes: int
    uuid: str
    pci_bus_id: str
    driver_version: str
    cuda_driver_version: tuple[int, int]

    @property
    def model(self) -> DeviceModel:
        """What a plan is tuned for: two equal cards have one device model."""
        return DeviceModel(self.name, self.sm_count)


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
        raise NoDeviceError(f"no usable NVIDIA driver: NVML says {str(error)!r}", _NAME_A_TARGET) from error
    try:
        return tuple(_nvml_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError as error:
        raise NoDeviceError(
            f"the NVIDIA driver does not describe its GPUs: NVML says {str(error)!r}",
            f"Update the driver, or install enginecache[cuda]. {_NAME_A_TARGET}",
        ) from error
    except AttributeError as error:
        raise NoDeviceError(f"this nvidia-ml-py is too old: {error}", "pip install --upgrade nvidia-ml-py") from error
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def read_cuda(cuda: Any = None) -> tuple[Device, ...]:
    """Describe the GPUs that CUDA shows to this process, in CUDA's order.

    Initialises the CUDA driver in this process (about 200 ms) and creates no context. Reads the process's own
    environment.

    Args:
        cuda: The module ``pycuda.driver``, or one that answers like it.

    Raises:
        NoDeviceError: pycuda is not installed, or CUDA does not answer.
    """
    cuda = _import_cuda() if cuda is None else cuda
    try:
        cuda.init()
        return tuple(_cuda_device(cuda, ordinal) for ordinal in range(cuda.Device.count()))
    except cuda.Error as error:
        raise NoDeviceError(f"CUDA does not describe its GPUs: {error}", _NAME_A_TARGET) from error


def list_devices(
    environ: Mapping[str, str] | None = None,
    nvml: Callable[[], tuple[NvmlGpu, ...]] = read_nvml,
    cuda: Callable[[], tuple[Device, ...]] = read_cuda,
) -> tuple[Device, ...]:
    """The GPUs that CUDA shows to this process, in CUDA's order; at least one.

    Among equal GPUs the order is that of the PCI bus, which need not be CUDA's: then only the UUID can differ.

    Args:
        environ: Environment with ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``; by default the process's.
        nvml: Describes all GPUs of the host.
        cuda: Describes the GPUs that CUDA shows; asked only where NVML cannot tell.

    Raises:
        NoDeviceError: There is none, or which ones there are cannot be told.
    """
    environ = os.environ if environ is None else environ
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    entries = None if visible is None else tuple(entry.strip() for entry in visible.split(","))
    hides_all = NoDeviceError(
        f"CUDA_VISIBLE_DEVICES={visible} hides every GPU", f"Unset it, or list a GPU in it. {_NAME_A_TARGET}"
    )
    if entries is not None and (not entries[0] or entries[0].startswith("-")):
        raise hides_all
    gpus: tuple[NvmlGpu, ...] = ()
    try:
        gpus = nvml()
        devices = _in_cuda_order(gpus, entries, environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST"))
    except NoDeviceError as doubt:
        devices = _complete(_asked(cuda, doubt), gpus)
    if not devices:
        raise hides_all
    return devices


def find_device(ordinal: int | None = None, devices: Callable[[], tuple[Device, ...]] = list_devices) -> Device:
    """The GPU that CUDA calls ``ordinal``; by default the one that CUDA would use.

    Raises:
        NoDeviceError: There is no such GPU, or none, or which ones there are cannot be told.
    """
    found = devices()
    wanted = ordinal or 0
    if 0 <= wanted < len(found):
        return found[wanted]
    lines = "\n".join(f"  {d.ordinal}: {d.name} ({d.compute_capability.sm})" for d in found)
    raise NoDeviceError(f"there is no device {wanted}", f"Choose one of these with --device:\n{lines}")


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise NoDeviceError(
            "nvidia-ml-py, which describes GPUs, is not installed", f"pip install nvidia-ml-py. {_NAME_A_TARGET}"
        ) from None
    return pynvml


def _import_cuda() -> Any:
    try:
        import pycuda.driver
    except ModuleNotFoundError:
        raise NoDeviceError("pycuda is not installed", "pip install 'enginecache[cuda]'") from None
    except ImportError as error:
        raise NoDeviceError(f"pycuda cannot be imported: {error}", _NAME_A_TARGET) from error
    return pycuda.driver


def _nvml_gpu(nvml: Any, index: int) -> NvmlGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = _text(nvml.nvmlDeviceGetName(handle))
    capability = ComputeCapability(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    device = Device(
        ordinal=index,
        name=name,
        compute_capability=capability,
        sm_count=_sm_count(name, capability, nvml.nvmlDeviceGetNumGpuCores(handle)),
        memory_bytes=_memory_bytes(nvml, handle),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        pci_bus_id=_pci_bus_id(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
        driver_version=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda_driver_version=_cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()),
    )
    return NvmlGpu(device, _has_mig(nvml, handle))


def _has_mig(nvml: Any, handle: Any) -> bool:
    answer = _if_supported(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return answer is not None and bool(answer[0] == nvml.NVML_DEVICE_MIG_ENABLE)


def _memory_bytes(nvml: Any, handle: Any) -> int:
    answer = _if_supported(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return 0 if answer is None else int(answer.total)


def _if_supported(nvml: Any, question: Callable[[Any], Any], handle: Any) -> Any:
    """NVML's answer, or None where this GPU or driver does not know the question; any other error is passed on."""
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
            f"how many multiprocessors {name} ({capability.sm}) has cannot be told from its {cores} cores",
            "Install enginecache[cuda], so that CUDA can be asked.",
        )
    return cores // per_sm


def _cuda_device(cuda: Any, ordinal: int) -> Device:
    device = cuda.Device(ordinal)
    return Device(
        ordinal=ordinal,
        name=device.name(),
        compute_capability=ComputeCapability(*device.compute_capability()),
        sm_count=device.get_attribute(cuda.device_attribute.MULTIPROCESSOR_COUNT),
        memory_bytes=device.total_memory(),
        uuid="",
        pci_bus_id=_pci_bus_id(device.pci_bus_id()),
        driver_version="",
        cuda_driver_version=_cuda_version(cuda.get_driver_version()),
    )


def _in_cuda_order(gpus: Sequence[NvmlGpu], entries: Sequence[str] | None, order: str) -> tuple[Device, ...]:
    """What CUDA shows of ``gpus``, where that follows from documented rules alone.

    Source: CUDA programming guide 13, "CUDA environment variables" (``CUDA_VISIBLE_DEVICES``, ``CUDA_DEVICE_ORDER``).
    """
    if not gpus:
        raise NoDeviceError("the NVIDIA driver shows no GPU", _NAME_A_TARGET)
    if entries is not None and any(entry.startswith("MIG-") for entry in entries):
        raise NoDeviceError("CUDA_VISIBLE_DEVICES names a MIG instance, which only CUDA can describe", _ASK_CUDA)
    chosen: Sequence[NvmlGpu] = sorted(gpus, key=lambda gpu: gpu.device.pci_bus_id)
    if entries is None or not all(entry.startswith("GPU-") for entry in entries):
        if any(gpu.has_mig for gpu in gpus):
            raise NoDeviceError("a GPU is split into MIG instances, which only CUDA can number", _ASK_CUDA)
        if order != "PCI_BUS_ID" and not _all_alike(gpus):
            raise NoDeviceError(
                "the GPUs of this host differ, and only CUDA knows the order in which it numbers them",
                f"{_ASK_CUDA}\nOr set CUDA_DEVICE_ORDER=PCI_BUS_ID.",
            )
    if entries is not None:
        chosen = _visible(chosen, entries)
    if any(gpu.has_mig for gpu in chosen):
        raise NoDeviceError("the GPU is split into MIG instances, which only CUDA can describe", _ASK_CUDA)
    return tuple(replace(gpu.device, ordinal=ordinal) for ordinal, gpu in enumerate(chosen))


def _all_alike(gpus: Sequence[NvmlGpu]) -> bool:
    devices = [gpu.device for gpu in gpus]
    return len({(d.name, d.compute_capability, d.sm_count, d.memory_bytes) for d in devices}) == 1


def _visible(gpus: Sequence[NvmlGpu], entries: Sequence[str]) -> list[NvmlGpu]:
    """The GPUs that the entries of ``CUDA_VISIBLE_DEVICES`` name, in their order.

    An entry that names no GPU ends the list, and so does an index among UUIDs. A GPU named twice makes CUDA show none.

    Source: CUDA programming guide 13, "CUDA environment variables"; for the GPU named twice, and for kinds that are
    mixed, PyTorch's ``_parse_visible_devices`` in ``torch/cuda/__init__.py``, as the guide does not say.
    """
    found: list[NvmlGpu] = []
    for entry in entries:
        gpu = _named(gpus, entry)
        if gpu is None or entry.startswith("GPU-") != entries[0].startswith("GPU-"):
            break
        if gpu in found:
            return []
        found.append(gpu)
    return found


def _named(gpus: Sequence[NvmlGpu], entry: str) -> NvmlGpu | None:
    if entry.isascii() and entry.isdigit():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    matches = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.device.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _asked(cuda: Callable[[], tuple[Device, ...]], doubt: NoDeviceError) -> tuple[Device, ...]:
    try:
        return cuda()
    except NoDeviceError as error:
        raise NoDeviceError(f"{doubt.what} ({error.what})", doubt.fix) from error


def _complete(devices: Sequence[Device], gpus: Sequence[NvmlGpu]) -> tuple[Device, ...]:
    """Add what pycuda does not tell, from NVML's description of the same card."""
    known = {gpu.device.pci_bus_id: gpu.device for gpu in gpus}
    return tuple(
        replace(device, uuid=known[device.pci_bus_id].uuid, driver_version=known[device.pci_bus_id].driver_version)
        if device.pci_bus_id in known
        else device
        for device in devices
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _pci_bus_id(text: str) -> str:
    """One spelling: NVML writes the domain with eight digits, CUDA with four."""
    domain, rest = text.split(":", 1)
    return f"{domain:0>8}:{rest}".upper()


def _cuda_version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10
