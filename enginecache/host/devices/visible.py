"""Apply ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` to NVML's GPUs, as far as their rules are documented.

Source: CUDA programming guide 13, "CUDA environment variables" (``CUDA_VISIBLE_DEVICES``, ``CUDA_DEVICE_ORDER``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from enginecache.errors import NoDeviceError
from enginecache.host.devices.device import ASK_CUDA, NAME_A_TARGET, Device
from enginecache.host.devices.nvml import NvmlGpu

_ASK_OR_NAME = f"{ASK_CUDA}, or name one whole GPU: CUDA_VISIBLE_DEVICES=GPU-... with its UUID from nvidia-smi -L."


def visible_entries(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the entries of ``CUDA_VISIBLE_DEVICES``; None if it is not set.

    Raises:
        NoDeviceError: The first entry hides every GPU.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    entries = tuple(entry.strip() for entry in visible.split(","))
    if not entries[0] or entries[0].startswith("-"):
        raise hides_all(environ)
    return entries


def hides_all(environ: Mapping[str, str]) -> NoDeviceError:
    """Return the error for a process to which CUDA shows no GPU."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return NoDeviceError(
        f"CUDA_VISIBLE_DEVICES={visible} hides every GPU", f"Unset it, or list a GPU in it. {NAME_A_TARGET}"
    )


def in_cuda_order(gpus: Sequence[NvmlGpu], entries: Sequence[str] | None, order: str) -> tuple[Device, ...]:
    """Return the GPUs that CUDA shows, in CUDA's order.

    Args:
        gpus: All GPUs of the host.
        entries: From :func:`visible_entries`.
        order: ``CUDA_DEVICE_ORDER``.

    Raises:
        NoDeviceError: There is none, or only CUDA knows.
    """
    if not gpus:
        raise NoDeviceError("the NVIDIA driver shows no GPU", NAME_A_TARGET)
    if entries is not None and any(entry.startswith("MIG-") for entry in entries):
        raise NoDeviceError("CUDA_VISIBLE_DEVICES names a MIG instance, which only CUDA can describe", _ASK_OR_NAME)
    chosen: Sequence[NvmlGpu] = sorted(gpus, key=lambda gpu: gpu.device.pci_bus_id)
    if entries is None or not all(entry.startswith("GPU-") for entry in entries):
        _require_known_order(gpus, order)
    if entries is not None:
        chosen = _visible(chosen, entries)
    if any(gpu.has_mig for gpu in chosen):
        raise NoDeviceError("the GPU is split into MIG instances, which only CUDA can describe", _ASK_OR_NAME)
    return tuple(replace(gpu.device, ordinal=ordinal) for ordinal, gpu in enumerate(chosen))


def complete(devices: Sequence[Device], gpus: Sequence[NvmlGpu], entries: Sequence[str] | None) -> tuple[Device, ...]:
    """Complete CUDA's devices: with NVML's description of the same card, and the value that shows each alone.

    Raises:
        NoDeviceError: CUDA started under another ``CUDA_VISIBLE_DEVICES``, so a child would not see the same GPUs.
    """
    if entries is not None and len(devices) > len(entries):
        raise NoDeviceError(
            f"CUDA shows {len(devices)} GPUs, and CUDA_VISIBLE_DEVICES={','.join(entries)} can name {len(entries)}",
            "Set CUDA_VISIBLE_DEVICES before the program starts, not after CUDA has started.",
        )
    known = {gpu.device.pci_bus_id: gpu for gpu in gpus}
    found = []
    for device in devices:
        named = replace(device, visible_as=_name_for_cuda(device, devices, entries))
        gpu = known.get(device.pci_bus_id)
        if gpu is not None and gpu.has_mig:
            # The card's UUID is not the instance's: with it, a child might be shown another instance.
            named = replace(named, driver_version=gpu.device.driver_version)
        elif gpu is not None:
            uuid = gpu.device.uuid
            named = replace(named, driver_version=gpu.device.driver_version, uuid=uuid, visible_as=uuid)
        found.append(named)
    return tuple(found)


def _name_for_cuda(device: Device, devices: Sequence[Device], entries: Sequence[str] | None) -> str:
    """Return the value that shows one device alone, given the variable that shows all ``devices``."""
    if entries is not None:
        return entries[device.ordinal]
    # A single device may be an instance of a card that is not the first: give no number, and CUDA picks it again.
    return str(device.ordinal) if len(devices) > 1 else ""


def _require_known_order(gpus: Sequence[NvmlGpu], order: str) -> None:
    if any(gpu.has_mig for gpu in gpus):
        raise NoDeviceError("a GPU is split into MIG instances, which only CUDA can number", _ASK_OR_NAME)
    if order != "PCI_BUS_ID" and not _all_alike(gpus):
        raise NoDeviceError(
            "the GPUs of this host differ, and only CUDA knows the order in which it numbers them",
            f"{_ASK_OR_NAME}\nOr set CUDA_DEVICE_ORDER=PCI_BUS_ID.",
        )


def _all_alike(gpus: Sequence[NvmlGpu]) -> bool:
    devices = [gpu.device for gpu in gpus]
    return len({(d.name, d.compute_capability, d.sm_count, d.memory_bytes) for d in devices}) == 1


def _visible(gpus: Sequence[NvmlGpu], entries: Sequence[str]) -> list[NvmlGpu]:
    """Return the GPUs that the entries of ``CUDA_VISIBLE_DEVICES`` name, in their order.

    An entry that names no GPU ends the list, and so does an index among UUIDs. If a GPU is named twice, CUDA shows
    none.

    Source: the guide; for repeated GPUs and mixed kinds of entries, on which it is silent, PyTorch's
    ``_parse_visible_devices`` in ``torch/cuda/__init__.py``.
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
    # A bare GPU- names none, and a UUID's case does not matter: CUDA 13.0 on an H100, 2026-11-24.
    begin = entry.removeprefix("GPU-").lower()
    matches = [gpu for gpu in gpus if begin and gpu.device.uuid.removeprefix("GPU-").lower().startswith(begin)]
    return matches[0] if len(matches) == 1 and entry.startswith("GPU-") else None
