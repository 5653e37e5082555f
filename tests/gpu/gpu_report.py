"""Report what NVML and CUDA say of this host's GPUs, as JSON on standard output. Run it by hand; needs no pytest.

    python tests/gpu/gpu_report.py > report.json

Every answer comes from a process of its own, as CUDA reads its variables once. Where pycuda is missing, NVML and the
doctor are asked alone, and the report says so. Exits with 1 where NVML with enginecache's rules and CUDA disagree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# An installed enginecache comes first; a bare checkout will do.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from enginecache.errors import NoDeviceError
from enginecache.host.devices import Device, current_device, find_device, list_devices, read_cuda, read_nvml

_SELECTORS = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


def main() -> int:
    """Print the report."""
    found = report()
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")
    rows = found["visible"] + found["visible_in_pci_order"]
    return 1 if any(row["verdict"] == "DIFFER" for row in rows) else 0


def report() -> dict[str, Any]:
    """Everything, as plain JSON values."""
    nvml = ask("nvml")
    gpus = nvml.get("devices", [])
    uuids = [gpu["uuid"] for gpu in sorted(gpus, key=lambda gpu: gpu["pci_bus_id"])]
    return {
        "python": sys.version,
        "environment": {name: os.environ.get(name) for name in _SELECTORS},
        "doctor": doctor(),
        "nvml": nvml,
        "cuda": ask("cuda"),
        "visible": [compare(value) for value in visible_values(uuids)],
        "visible_in_pci_order": [compare(value, "PCI_BUS_ID") for value in visible_values(uuids)],
        "visible_undocumented": [compare(value) for value in undocumented_values(uuids)],
        "current": ask("current"),
        "alone": [alone(ordinal) for ordinal in range(len(gpus))],
    }


def visible_values(uuids: list[str]) -> list[str | None]:
    """Values of ``CUDA_VISIBLE_DEVICES`` to try on a host with these GPUs; None leaves it unset."""
    count = len(uuids)
    indices = [str(index) for index in range(count)]
    values = [None, *indices, ",".join(indices[::-1]), *uuids, *(uuid[:12] for uuid in uuids), ",".join(uuids[::-1])]
    values += ["", "-1", "0,0", " 0", "0 ", "nope", "0,nope", str(count), f"0,{count}", "0,-1"]
    if uuids:
        values += [f"{uuids[0]},0", f"0,{uuids[0]}"]
    return list(dict.fromkeys(values))


def undocumented_values(uuids: list[str]) -> list[str]:
    """Values of which enginecache claims nothing: a difference is only worth knowing."""
    doubled = [f"{uuid},{uuid}" for uuid in uuids[-1:]]
    return ["0gpu2", "1gpu", "+0", "00", "GPU-", *(uuid.upper() for uuid in uuids[:1]), *doubled]


def compare(visible: str | None, order: str | None = None) -> dict[str, Any]:
    """Return the reading of a value by enginecache's rules alone, and that by CUDA."""
    environ = dict(zip(_SELECTORS, (visible, order), strict=True))
    ours, cuda = ask("rules", environ), ask("cuda", environ)
    return {
        "value": visible,
        "rules": _bus_ids(ours),
        "rules_error": ours.get("error", ""),
        "cuda": _bus_ids(cuda),
        "cuda_error": cuda.get("error", ""),
        "verdict": verdict(ours, cuda),
    }


def verdict(ours: dict[str, Any], cuda: dict[str, Any]) -> str:
    """Return whether two answers agree."""
    if cuda.get("error", "").startswith("pycuda"):
        return f"not compared: {cuda['error']}"
    if "only CUDA" in ours.get("error", ""):
        return "left to CUDA"
    if _bus_ids(ours) == _bus_ids(cuda):
        return "agree"
    same_models = [d["device_class"] for d in ours.get("devices", [])] == [
        d["device_class"] for d in cuda.get("devices", [])
    ]
    return "agree on the models, in another order of equal cards" if same_models else "DIFFER"


def _bus_ids(answer: dict[str, Any]) -> list[str]:
    return [device["pci_bus_id"] for device in answer.get("devices", [])]


def alone(ordinal: int) -> dict[str, Any]:
    """Return whether CUDA shows a child with ``Device.visible_as`` of a GPU that GPU alone."""
    chosen = ask("find", {}, str(ordinal))
    if "error" in chosen:
        return {"ordinal": ordinal, **chosen}
    (device,) = chosen["devices"]
    shown = ask("cuda", {"CUDA_VISIBLE_DEVICES": device["visible_as"]} if device["visible_as"] else {})
    found = _bus_ids(shown)
    return {
        "ordinal": ordinal,
        "visible_as": device["visible_as"],
        "expected": [device["pci_bus_id"]],
        "shown": found,
        "error": shown.get("error", ""),
        "is_right": found == [device["pci_bus_id"]],
    }


def doctor() -> dict[str, Any]:
    """Return the output of ``enginecache doctor --json`` for a folder that does not exist."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "enginecache", "doctor", "--json", "--dir", f"{folder}/cache"]
        start = time.perf_counter()
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment({}))
    checks = json.loads(ran.stdout) if ran.stdout else []
    return {
        "exit_code": ran.returncode,
        "seconds": time.perf_counter() - start,
        "checks": checks,
        "errors": ran.stderr[-2000:],
    }


def ask(question: str, environ: Mapping[str, str | None] | None = None, ordinal: str = "") -> dict[str, Any]:
    """One of the questions below, in a process of its own, with these changes to its environment."""
    command = [sys.executable, __file__, question, ordinal]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_environment(environ or {}), timeout=120
    )
    if ran.returncode:
        return {"error": f"exit {ran.returncode}: {ran.stderr[-2000:]}"}
    return dict(json.loads(ran.stdout))


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment, changed; None takes a variable out."""
    merged = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **changes}
    return {name: value for name, value in merged.items() if value is not None}


def _timed(read: Callable[[], Any]) -> dict[str, Any]:
    """The devices that ``read`` gives, asked twice."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        try:
            devices = read()
        except NoDeviceError as error:
            return {"error": error.what, "fix": error.fix, "first_s": time.perf_counter() - start}
        seconds.append(time.perf_counter() - start)
    return {"devices": [device.to_json() for device in devices], "first_s": seconds[0], "again_s": seconds[1]}


def _no_cuda() -> tuple[Device, ...]:
    raise NoDeviceError("CUDA was not asked")


def _current() -> dict[str, Any]:
    """The current GPU without CUDA, and with a context on the last GPU and on the first."""
    try:
        found: dict[str, Any] = {"without_cuda": current_device().pci_bus_id}
    except NoDeviceError as error:
        return {"error": error.what}
    try:
        devices = read_cuda()
    except NoDeviceError as error:
        return found | {"error": error.what}
    import pycuda.driver as cuda

    found["without_context"] = current_device().pci_bus_id
    found["in_a_context"] = []
    for device in dict.fromkeys((devices[-1], devices[0])):
        context = cuda.Device(device.ordinal).make_context()
        try:
            found["in_a_context"].append({"expected": device.pci_bus_id, "found": current_device().pci_bus_id})
        finally:
            context.pop()
    found["is_right"] = all(row["expected"] == row["found"] for row in found["in_a_context"])
    return found


def _answer(question: str, ordinal: str) -> dict[str, Any]:
    questions: dict[str, Callable[[], dict[str, Any]]] = {
        "nvml": lambda: _timed(lambda: [gpu.device for gpu in read_nvml()]),
        "rules": lambda: _timed(lambda: list_devices(cuda=_no_cuda)),
        "cuda": lambda: _timed(read_cuda),
        "find": lambda: _timed(lambda: [find_device(int(ordinal))]),
        "current": _current,
    }
    return questions[question]()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        json.dump(_answer(*sys.argv[1:]), sys.stdout)
    else:
        sys.exit(main())
