"""The GPUs of this host, as CUDA would number them."""

from __future__ import annotations

from dataclasses import dataclass

from enginecache.targets import ComputeCapability, DeviceModel


@dataclass(frozen=True)
class Device:
    """One GPU found now.

    Attributes:
        ordinal: CUDA's number of it in this process, under ``CUDA_VISIBLE_DEVICES``.
        name: The driver's product name.
        compute_capability: Its architecture.
        sm_count: Streaming multiprocessors.
        memory_bytes: Whole memory.
        uuid: ``GPU-...``.
        pci_bus_id: ``00000000:17:00.0``.
        driver_version: Such as ``580.65.06``.
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
