"""One GPU, and the normal spelling of the values that NVML and CUDA report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from enginecache.host.targets import ComputeCapability, DeviceModel

NAME_A_TARGET = "Name what to build for, such as --target sm_89 (TensorRT-RTX needs no GPU for it), or use a GPU host."
ASK_CUDA = "Install pycuda, so that CUDA can be asked"


@dataclass(frozen=True)
class Device:
    """One GPU of this host.

    NVML is asked first, and CUDA (pycuda) if NVML is not enough. Both report the same name, compute capability, number
    of multiprocessors and PCI bus id for a whole GPU; seen on an H100, 2026-11.

    Attributes:
        ordinal: Its CUDA number in this process, under ``CUDA_VISIBLE_DEVICES``: derived from NVML by documented rules,
            or reported by CUDA.
        name: The driver's product name; of a MIG instance, the instance's: ``NVIDIA H100 80GB HBM3 MIG 1g.10gb``.
        compute_capability: Its architecture.
        sm_count: Streaming multiprocessors. CUDA's ``MULTIPROCESSOR_COUNT``; NVML has only their cores, see
            :data:`~enginecache.host.devices.nvml.CORES_PER_SM`.
        memory_bytes: Whole memory; 0 if the driver does not report it, as for a GPU that shares the host's memory. CUDA
            reports less than NVML, without the driver's own: 85,017,493,504 and 85,520,809,984 bytes on one H100.
        uuid: ``GPU-...``, from NVML; empty without NVML, and for a MIG instance.
        pci_bus_id: ``00000000:17:00.0``.
        driver_version: Such as ``580.65.06``, from NVML; empty without NVML.
        cuda_driver_version: CUDA level of the driver, ``(13, 0)``, always from ``libcuda.so.1``, so that an installed
            ``cuda-compat`` counts.
        l2_bytes: Size of the L2 cache; None from NVML, which does not report it.
        visible_as: The value of ``CUDA_VISIBLE_DEVICES`` that shows only this GPU; empty if it is the only one already,
            or if the value is unknown.
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
    l2_bytes: int | None = None
    visible_as: str = ""

    @property
    def model(self) -> DeviceModel:
        """Return the kind of GPU that a plan is tuned for: two equal cards have one device model."""
        return DeviceModel(self.name, self.sm_count)

    @property
    def device_class(self) -> str:
        """Return the device model as one string, for rows and file names: ``NVIDIA H200, 132 SMs``.

        H100 and H200 are both 9.0 and differ here; two equal cards do not.
        """
        return str(self.model)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, versions as strings, with the device class."""
        return vars(self) | {
            "compute_capability": str(self.compute_capability),
            "cuda_driver_version": version_text(self.cuda_driver_version),
            "device_class": self.device_class,
        }


def version_text(version: tuple[int, int]) -> str:
    """Return ``13.0`` for ``(13, 0)``."""
    return ".".join(str(part) for part in version)


def bus_id(text: str) -> str:
    """Normalize a PCI bus id: NVML writes the domain with eight digits, CUDA with four."""
    domain, rest = text.split(":", 1)
    return f"{domain:0>8}:{rest}".upper()


def cuda_version(number: int) -> tuple[int, int]:
    """Return ``(12, 8)`` for 12080, the form that NVML and CUDA report."""
    return number // 1000, number % 1000 // 10
