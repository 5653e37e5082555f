"""The GPUs, what selects them, and whether NVML and CUDA tell the same of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from enginecache.errors import NoDeviceError
from enginecache.files.units import format_size
from enginecache.host.devices import Device, NvmlGpu
from enginecache.maintenance.findings import Check

_Found = TypeVar("_Found")
_COMPARED = {"name": "name", "compute_capability": "compute capability", "sm_count": "SM count"}


@dataclass(frozen=True)
class Gpus:
    """The answers of each source; where one failed, its error is set and its tuple is empty.

    Attributes:
        devices: The GPUs that a ``get`` chooses from: those that CUDA shows, in CUDA's order.
        nvml: All GPUs of the host.
        cuda: The GPUs that CUDA itself lists.
    """

    devices: tuple[Device, ...]
    problem: NoDeviceError | None
    nvml: tuple[NvmlGpu, ...]
    nvml_problem: NoDeviceError | None
    cuda: tuple[Device, ...]
    cuda_problem: NoDeviceError | None


def look(
    find_devices: Callable[[], tuple[Device, ...]],
    nvml: Callable[[], tuple[NvmlGpu, ...]],
    cuda: Callable[[], tuple[Device, ...]],
) -> Gpus:
    """Ask all three, and add to the devices what only CUDA knows."""
    devices, problem = _answer(find_devices)
    gpus, nvml_problem = _answer(nvml)
    shown, cuda_problem = _answer(cuda)
    l2_bytes = {device.pci_bus_id: device.l2_bytes for device in shown}
    devices = tuple(replace(d, l2_bytes=d.l2_bytes or l2_bytes.get(d.pci_bus_id)) for d in devices)
    return Gpus(devices, problem, gpus, nvml_problem, shown, cuda_problem)


def _answer(ask: Callable[[], tuple[_Found, ...]]) -> tuple[tuple[_Found, ...], NoDeviceError | None]:
    try:
        return ask(), None
    except NoDeviceError as error:
        return (), error


def check_gpus(gpus: Gpus, environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield a line for each GPU, and one for each thing that decides which GPUs there are."""
    if gpus.problem is not None:
        yield Check("gpu", "warning", gpus.problem.what, gpus.problem.fix)
    for device in gpus.devices:
        yield Check("gpu", "ok", _description(device), facts=device.to_json())
    yield from _check_variables(gpus, environ)
    yield from _check_mig(gpus.nvml)
    yield from _check_sources(gpus)


def _description(device: Device) -> str:
    facts = device.to_json()
    parts = (
        device.name,
        f"compute capability {device.compute_capability}",
        f"{device.sm_count} SMs",
        format_size(device.memory_bytes),
        f"L2 {format_size(device.l2_bytes)}" if device.l2_bytes else "",
        f"driver {device.driver_version or 'not known'}",
        f"CUDA {facts['cuda_driver_version']}",
        device.pci_bus_id,
        device.uuid,
    )
    return f"device {device.ordinal}: {', '.join(part for part in parts if part)}"


def _check_variables(gpus: Gpus, environ: Mapping[str, str]) -> Iterator[Check]:
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    values = {name: environ[name] for name in names if name in environ}
    if not values:
        return
    said = " and ".join(f"{name}={value}" for name, value in values.items())
    of_all = f" of the {len(gpus.nvml)} of this host" if gpus.nvml else ""
    text = f"{said} {'shows' if len(values) == 1 else 'show'} {_count(gpus.devices)}{of_all}"
    entries = values.get("CUDA_VISIBLE_DEVICES", "").split(",")
    facts: dict[str, Any] = {**dict.fromkeys(names), **values, "shown": len(gpus.devices), "of": len(gpus.nvml)}
    if "CUDA_VISIBLE_DEVICES" in values and len(gpus.devices) < len(entries):
        fix = "Name each GPU once, by its index or its UUID from nvidia-smi -L: a name of no GPU ends the list."
        yield Check("visible", "warning", f"{text}, and it has {len(entries)} entries", fix, facts=facts)
    else:
        yield Check("visible", "ok", text, facts=facts)


def _check_mig(gpus: Sequence[NvmlGpu]) -> Iterator[Check]:
    split = [gpu.device for gpu in gpus if gpu.has_mig]
    if split:
        names = ", ".join(f"{device.name} at {device.pci_bus_id}" for device in split)
        facts = {"pci_bus_ids": [device.pci_bus_id for device in split]}
        yield Check("mig", "ok", f"split into MIG instances, of which CUDA shows a process one: {names}", facts=facts)


def _check_sources(gpus: Gpus) -> Iterator[Check]:
    """Check that NVML and CUDA can be asked, and give the same answer."""
    if not gpus.nvml and not gpus.cuda:
        return
    if gpus.nvml_problem is not None:
        text = f"CUDA was asked, as NVML cannot be: {gpus.nvml_problem.what}"
        yield Check("gpu sources", "warning", text, gpus.nvml_problem.fix, facts=_sources(gpus))
    elif gpus.cuda_problem is None:
        yield _compared(gpus)
    elif _is_not_there(gpus.cuda_problem):
        text = f"NVML was asked; CUDA, which numbers GPUs that differ, cannot be: {gpus.cuda_problem.what}"
        yield Check("gpu sources", "ok", text, facts=_sources(gpus))
    elif gpus.devices:
        text = f"NVML shows {_count(gpus.devices)}, and CUDA does not start: {gpus.cuda_problem.what}"
        fix = "See what nvidia-smi says; in a container, whether it was started with its GPUs and their libraries."
        yield Check("gpu sources", "problem", text, fix, NoDeviceError.exit_code, _sources(gpus))


def _is_not_there(error: NoDeviceError) -> bool:
    """Return whether pycuda is missing or broken, which says nothing about CUDA."""
    return error.__cause__ is None or isinstance(error.__cause__, ImportError)


def _compared(gpus: Gpus) -> Check:
    differences = _differences(gpus)
    facts = _sources(gpus) | {"differences": differences}
    if differences:
        text = f"NVML and CUDA disagree: {'; '.join(differences)}"
        fix = "Write CUDA_VISIBLE_DEVICES as indices or whole UUIDs; if that does not help, report this."
        return Check("gpu sources", "problem", text, fix, NoDeviceError.exit_code, facts)
    if [d.pci_bus_id for d in gpus.devices] != [d.pci_bus_id for d in gpus.cuda]:
        text = "CUDA numbers these equal GPUs in another order than that of the PCI bus"
        fix = "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, if it matters which of them is used."
        return Check("gpu sources", "warning", text, fix, facts=facts)
    return Check("gpu sources", "ok", f"NVML and CUDA agree on {_count(gpus.cuda)}", facts=facts)


def _differences(gpus: Gpus) -> list[str]:
    known = {gpu.device.pci_bus_id: gpu for gpu in gpus.nvml}
    found = []
    for device in gpus.cuda:
        gpu = known.get(device.pci_bus_id)
        if gpu is None:
            found.append(f"CUDA shows {device.pci_bus_id}, and NVML does not")
        elif not gpu.has_mig:
            # A MIG instance is smaller than its card.
            found += _differing_fields(gpu.device, device)
    if [device.model for device in gpus.devices] != [device.model for device in gpus.cuda]:
        found.append(f"CUDA shows {_listed(gpus.cuda)}, where {_listed(gpus.devices)} was expected")
    return found


def _differing_fields(nvml: Device, cuda: Device) -> Iterator[str]:
    for field, word in _COMPARED.items():
        first, second = getattr(nvml, field), getattr(cuda, field)
        if first != second:
            yield f"{cuda.pci_bus_id} has {word} {first} by NVML and {second} by CUDA"


def _listed(devices: Sequence[Device]) -> str:
    return ", ".join(device.device_class for device in devices) or "no GPU"


def _count(devices: Sequence[Device]) -> str:
    return f"{len(devices)} GPU" if len(devices) == 1 else f"{len(devices)} GPUs"


def _sources(gpus: Gpus) -> dict[str, Any]:
    problems = {"nvml": gpus.nvml_problem, "cuda": gpus.cuda_problem}
    return {source: "" if problem is None else problem.what for source, problem in problems.items()}
