"""List the GPUs that CUDA shows to this process, and find one by its number."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from enginecache.errors import NoDeviceError
from enginecache.host.devices.cuda import read_cuda
from enginecache.host.devices.device import Device
from enginecache.host.devices.nvml import NvmlGpu, read_nvml
from enginecache.host.devices.visible import complete, hides_all, in_cuda_order, visible_entries


def list_devices(
    environ: Mapping[str, str] | None = None,
    nvml: Callable[[], tuple[NvmlGpu, ...]] = read_nvml,
    cuda: Callable[[], tuple[Device, ...]] = read_cuda,
) -> tuple[Device, ...]:
    """Return the GPUs that CUDA shows to this process, in CUDA's order; at least one.

    Equal GPUs are in the order of the PCI bus, which need not be CUDA's; then only their UUIDs can be confused.

    Args:
        environ: Environment with ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``; by default the process's.
        nvml: Describes all GPUs of the host.
        cuda: Describes the GPUs that CUDA shows; called only if NVML is not enough.

    Raises:
        NoDeviceError: There is none, or the GPUs are unknown.
    """
    environ = os.environ if environ is None else environ
    entries = visible_entries(environ)
    gpus: tuple[NvmlGpu, ...] = ()
    try:
        gpus = nvml()
        devices = in_cuda_order(gpus, entries, environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST"))
    except NoDeviceError as doubt:
        devices = complete(_asked(cuda, doubt), gpus, entries)
    if not devices:
        raise hides_all(environ)
    return devices


def find_device(ordinal: int | None = None, devices: Callable[[], tuple[Device, ...]] = list_devices) -> Device:
    """Return the GPU that CUDA calls ``ordinal``; by default the one that CUDA would use.

    Raises:
        NoDeviceError: There is no such GPU, or none, or the GPUs are unknown.
    """
    found = devices()
    wanted = ordinal or 0
    if 0 <= wanted < len(found):
        return found[wanted]
    lines = "\n".join(f"  {d.ordinal}: {d.name} ({d.compute_capability.sm})" for d in found)
    raise NoDeviceError(f"there is no device {wanted}", f"Choose one of these with --device:\n{lines}")


def _asked(cuda: Callable[[], tuple[Device, ...]], doubt: NoDeviceError) -> tuple[Device, ...]:
    try:
        return cuda()
    except NoDeviceError as error:
        raise NoDeviceError(f"{doubt.what} ({error.what})", doubt.fix) from error
