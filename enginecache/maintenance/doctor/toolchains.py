"""Checks of the installed TensorRT flavours: the GPUs that they serve, and the precisions that they build."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from enginecache.config import Config
from enginecache.environment import keyed, warnings
from enginecache.errors import InterpreterError, ToolchainError
from enginecache.host.devices import Device, driver_problem
from enginecache.host.toolchain import PRODUCTS, Toolchain, ToolchainFinding, supported_targets
from enginecache.key.precision import CONVERTERS, is_strongly_typed
from enginecache.maintenance.findings import Check
from enginecache.trt.interpreter import interpreters


def check_toolchains(findings: Sequence[ToolchainFinding], devices: Sequence[Device]) -> Iterator[Check]:
    """Yield a line for each flavour, and one more where nothing can be built."""
    usable = [finding.toolchain for finding in findings if finding.toolchain is not None]
    for finding in findings:
        if finding.toolchain is None:
            facts = {"flavour": finding.flavour, "version": None}
            yield Check(finding.flavour, "warning", finding.problem, finding.fix, facts=facts)
        else:
            yield _check_toolchain(finding.toolchain, devices)
    if not usable:
        fix = "Install one: pip install tensorrt-rtx-cu13 nvidia-ml-py (any machine), or tensorrt (GPU host)."
        yield Check("building", "warning", "no TensorRT is usable here: only stored engines can be inspected", fix)
    elif devices and not any(_builds(toolchain, devices) for toolchain in usable):
        text = f"nothing can be built here: {_obstacle(usable[0], devices[0])}"
        yield Check("building", "problem", text, _fix(usable[0], devices[0]), ToolchainError.exit_code)


def check_builder(config: Config, environ: Mapping[str, str]) -> Check:
    """Check the Python that runs a builder, and the variables that change its plans or are kept from it."""
    also = config.pass_environment
    conditions, left_out = keyed(environ, also), warnings(environ, also)
    facts: dict[str, Any] = {"python": None, "environment": dict(conditions), "removed": list(left_out)}
    try:
        facts["python"] = interpreters(config.python)[0].path
    except InterpreterError as error:
        return Check("builder", "problem", error.what, error.fix, error.exit_code, facts)
    text = f"runs with {facts['python']}"
    if conditions:
        text += f"; in the key: {', '.join(f'{name}={value}' for name, value in conditions)}"
    return Check("builder", "warning" if left_out else "ok", text, "\n".join(left_out), facts=facts)


def _check_toolchain(toolchain: Toolchain, devices: Sequence[Device]) -> Check:
    text = f"{toolchain.version} for CUDA {toolchain.cuda_major} on {toolchain.os} {toolchain.cpu}; "
    text += _what_it_builds(toolchain)
    obstacles = {device: _obstacle(toolchain, device) for device in devices}
    served = [device for device in devices if not obstacles[device]]
    refused = [device for device in devices if obstacles[device]]
    if served:
        text += f"; serves {_numbers(served)}"
    if refused:
        reasons = dict.fromkeys(obstacles[device] for device in refused)
        text += f"; cannot serve {_numbers(refused)}: {'; '.join(reasons)}"
    facts = _facts(toolchain) | {"devices": [{"ordinal": d.ordinal, "problem": obstacles[d]} for d in devices]}
    fix = "\n".join(dict.fromkeys(_fix(toolchain, device) for device in refused))
    if toolchain.flavour == "tensorrt" and not devices:
        fix = "Use a GPU host, or TensorRT-RTX, which builds for a named target without a GPU."
    return Check(toolchain.flavour, "warning" if fix else "ok", text, fix, facts=facts)


def _what_it_builds(toolchain: Toolchain) -> str:
    if toolchain.flavour == "tensorrt":
        return "builds on the GPU that it builds for"
    supported = supported_targets(toolchain)
    names = "" if supported is None else ": " + ", ".join(capability.sm for capability in sorted(supported))
    return f"builds for named targets without a GPU{names}"


def _obstacle(toolchain: Toolchain, device: Device) -> str:
    """Return why no plan of this TensorRT runs on the device; an empty string where one does, as far as is known."""
    supported = supported_targets(toolchain)
    if supported is not None and device.compute_capability not in supported:
        product = f"{PRODUCTS[toolchain.flavour]} {toolchain.version}"
        return f"{product} does not support compute capability {device.compute_capability}"
    return driver_problem(device, toolchain.cuda_major)


def _fix(toolchain: Toolchain, device: Device) -> str:
    if driver_problem(device, toolchain.cuda_major):
        return (
            f"Update the NVIDIA driver to one for CUDA {toolchain.cuda_major}, or install a TensorRT for CUDA "
            f"{device.cuda_driver_version[0]}; data-centre GPUs can also use NVIDIA's cuda-compat package."
        )
    return (
        "For this GPU install TensorRT: pip install tensorrt nvidia-ml-py, on a host that reaches NVIDIA's package "
        "index; for others name the target, such as --target sm_89."
    )


def _builds(toolchain: Toolchain, devices: Sequence[Device]) -> bool:
    """Return whether it builds anything here: TensorRT-RTX also builds for GPUs of other hosts."""
    return toolchain.flavour == "tensorrt-rtx" or not all(_obstacle(toolchain, device) for device in devices)


def _numbers(devices: Sequence[Device]) -> str:
    word = "device" if len(devices) == 1 else "devices"
    return f"{word} {', '.join(str(device.ordinal) for device in devices)}"


def _facts(toolchain: Toolchain) -> dict[str, Any]:
    supported = supported_targets(toolchain)
    return {**vars(toolchain), "targets": None if supported is None else [str(c) for c in sorted(supported)]}


def check_precision(findings: Sequence[ToolchainFinding], version: Callable[[str], str | None]) -> Check:
    """Check that --fp16 and --bf16 are available where the graph decides the precision.

    A warning only where such a TensorRT is here and no converter is.
    """
    typed = [is_strongly_typed(finding.toolchain) for finding in findings if finding.toolchain is not None]
    versions = {converter: version(converter) for converter, _ in CONVERTERS.values()}
    texts = [_converted(precision, versions) for precision in CONVERTERS]
    if not all(typed):
        texts.append("TensorRT here takes both as builder flags")
    facts = {"converters": versions}
    if any(typed) and not any(versions.values()):
        fix = "\n".join(f"For --{precision}: {install}" for precision, (_, install) in CONVERTERS.items())
        return Check("precision", "warning", "; ".join(texts), fix, facts=facts)
    return Check("precision", "ok", "; ".join(texts), facts=facts)


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _converted(precision: str, versions: dict[str, str | None]) -> str:
    converter, _ = CONVERTERS[precision]
    if versions[converter]:
        return f"--{precision} by converting the graph with {converter} {versions[converter]}"
    return f"--{precision} by converting the graph needs {converter}"
