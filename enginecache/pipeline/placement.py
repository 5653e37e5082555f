"""Backend selection: choose the TensorRT that builds, the target that it builds for, and the GPU that it runs on.

One function decides it for lookup, build and explain alike. It gives its reasons in sentences, so that a user can
follow what ``auto`` chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from enginecache.config import Backend
from enginecache.errors import BackendError, NoDeviceError, TargetError, ToolchainError
from enginecache.host.devices import Device, driver_problem, find_device
from enginecache.host.targets import AMPERE, ComputeCapability, Reach, Target
from enginecache.host.toolchain import (
    PORTABLE_COMPUTE_CAPABILITIES,
    Flavour,
    Toolchain,
    ToolchainFinding,
    inspect_toolchains,
    supported_targets,
)
from enginecache.key.options import BuildOptions
from enginecache.key.support import check_options

_USE_RTX = "Build with TensorRT-RTX: --backend tensorrt-rtx"


@dataclass(frozen=True)
class Placement:
    """The TensorRT that builds a plan, and the target that it builds for.

    Attributes:
        toolchain: The TensorRT that builds.
        target: What the plan must run on, as the key has it.
        device: The GPU to build on. TensorRT-RTX needs none: there it is None unless it was looked up.
        reasons: Why this flavour and this target, in sentences.
    """

    toolchain: Toolchain
    target: Target
    device: Device | None
    reasons: tuple[str, ...]


def place(
    backend: Backend,
    target: Target | None,
    device_ordinal: int | None = None,
    *,
    options: BuildOptions | None = None,
    cuda_major: int | None = None,
    find: Callable[[int | None], Device] = find_device,
    inspect: Callable[[int | None], tuple[ToolchainFinding, ...]] = inspect_toolchains,
) -> Placement:
    """Choose the flavour and the target.

    The GPU is looked up at most once, and not at all where TensorRT-RTX is given targets and no ordinal.

    Args:
        backend: ``tensorrt``, ``tensorrt-rtx``, or ``auto``: the first of these that can.
        target: What the plan must run on; None for the GPU here.
        device_ordinal: CUDA's number of the GPU here; None for the one that CUDA would use.
        options: Builder options; their hardware compatibility widens a TensorRT plan's target, and what a flavour lacks
            rules it out.
        cuda_major: CUDA major version of a TensorRT whose packages do not say it.
        find: Finds the GPU of an ordinal.
        inspect: Finds the installed flavours, given ``cuda_major``.

    Raises:
        NoDeviceError: A GPU is needed, and there is none, or not the one of that number.
        ToolchainError: The flavour is not usable here.
        TargetError: The flavour cannot build for the target.
        UnsupportedOptionError: The flavour lacks what an option asks for.
    """
    host = _Host(device_ordinal, find, inspect(cuda_major))
    options = options or BuildOptions()
    if backend == "tensorrt":
        return _on_tensorrt(host, target, options)
    if backend == "tensorrt-rtx":
        return _on_rtx(host, target, options)
    try:
        return _on_tensorrt(host, target, options)
    except BackendError as error:
        no_tensorrt = error
    try:
        placement = _on_rtx(host, target, options)
    except BackendError as no_rtx:
        raise _neither(no_tensorrt, no_rtx) from None
    return replace(placement, reasons=(f"TensorRT was passed over: {no_tensorrt.what}.", *placement.reasons))


class _Host:
    """The TensorRT and the GPU of this host. Looks for the GPU when it is first asked for."""

    def __init__(
        self,
        device_ordinal: int | None,
        find: Callable[[int | None], Device],
        findings: Iterable[ToolchainFinding],
    ) -> None:
        self.device_ordinal = device_ordinal
        self._find = find
        self._findings = {finding.flavour: finding for finding in findings}
        self._found: Device | NoDeviceError | None = None

    def device(self) -> Device:
        if self._found is None:
            try:
                self._found = self._find(self.device_ordinal)
            except NoDeviceError as error:
                self._found = error
        if isinstance(self._found, NoDeviceError):
            raise self._found
        return self._found

    def toolchain(self, flavour: Flavour) -> Toolchain:
        finding = self._findings[flavour]
        if finding.toolchain is None:
            raise ToolchainError(finding.problem, finding.fix)
        return finding.toolchain


def required_reach(target: Target) -> Reach:
    """Return the GPUs that a target stands for."""
    return Reach(target.compute_capabilities or PORTABLE_COMPUTE_CAPABILITIES, target.and_later)


def _on_tensorrt(host: _Host, target: Target | None, options: BuildOptions) -> Placement:
    """TensorRT builds on the GPU that it builds for."""
    toolchain = host.toolchain("tensorrt")
    check_options("tensorrt", options)
    if target is not None and target.is_portable:
        raise TargetError("TensorRT has no portable target", f"{_USE_RTX}, or leave --target out.")
    if target is not None and len(target.compute_capabilities) > 1:
        raise TargetError(f"TensorRT makes a plan for one GPU, not for {target}", f"{_USE_RTX}, or name one target.")
    device = host.device()
    capability = device.compute_capability
    if target is not None and capability not in target.compute_capabilities:
        raise TargetError(
            f"TensorRT builds for the GPU it runs on, and {_named(device)} is not {target}",
            f"Choose a GPU of that kind with --device, build on a host that has one, or use --target {capability.sm}.\n"
            f"{_USE_RTX}",
        )
    _check_driver(toolchain, device)
    placed = _device_target(device, options)
    return Placement(
        toolchain, placed, device, (f"TensorRT {toolchain.version} is installed, and builds on {_named(device)}.",)
    )


def _device_target(device: Device, options: BuildOptions) -> Target:
    """Return the target of a plan that TensorRT builds on the device: as far as its hardware compatibility reaches."""
    if options.hardware_compatibility == "none":
        return Target((device.compute_capability,), device.model)
    if options.hardware_compatibility == "same_compute_capability":
        return Target((device.compute_capability,))
    if device.compute_capability < AMPERE:
        raise TargetError(
            f"hardware compatibility ampere_plus needs a GPU of compute capability 8.0 or later, and {_named(device)} "
            "is older",
            "Build on such a GPU with --device, or leave --hardware-compatibility out.",
        )
    # One key for all of them, whichever builds first.
    return Target((AMPERE,), and_later=True)


def _check_driver(toolchain: Toolchain, device: Device) -> None:
    problem = driver_problem(device, toolchain.cuda_major)
    if problem:
        raise ToolchainError(
            f"TensorRT {toolchain.version} cannot run here: {problem}",
            "Update the NVIDIA driver, or install a TensorRT for an older CUDA; see `enginecache doctor`.",
        )


def _on_rtx(host: _Host, target: Target | None, options: BuildOptions) -> Placement:
    """TensorRT-RTX builds for compute capabilities, with or without a GPU."""
    toolchain = host.toolchain("tensorrt-rtx")
    check_options("tensorrt-rtx", options)
    name = f"TensorRT-RTX {toolchain.version}"
    if target is None:
        device = host.device()
        # Without a device model: --target of the same compute capability must have the same key.
        placed = Target((device.compute_capability,))
        _check_supported(toolchain, placed, f", which {_named(device)} is")
        return Placement(toolchain, placed, device, (f"{name} builds for the GPU here, {_named(device)}.",))
    _check_supported(toolchain, target)
    asked = (f"{name} builds for {target}, as asked.",)
    if host.device_ordinal is None:
        return Placement(toolchain, target, None, asked)
    try:
        device = host.device()
    except NoDeviceError as error:
        fix = "Leave --device out: TensorRT-RTX builds for named targets without a GPU."
        raise NoDeviceError(error.what, fix) from error
    if not _reaches(toolchain, target, device.compute_capability):
        raise TargetError(
            f"{_named(device)} is not among the targets: {target}",
            "Leave --device out, as TensorRT-RTX builds for named targets without a GPU, or name its target too.",
        )
    return Placement(toolchain, target, device, asked)


def _check_supported(toolchain: Toolchain, target: Target, why: str = "") -> None:
    supported = supported_targets(toolchain)
    if supported is None or supported.issuperset(target.compute_capabilities):
        return
    missing = Target(tuple(c for c in target.compute_capabilities if c not in supported))
    raise TargetError(
        f"TensorRT-RTX {toolchain.version} cannot build for {missing}{why}; it builds for {Target(tuple(supported))}",
        "Name one of these with --target, or build with --backend tensorrt on that GPU.",
    )


def _reaches(toolchain: Toolchain, target: Target, capability: ComputeCapability) -> bool:
    if not target.is_portable:
        return capability in target.compute_capabilities
    return supported_targets(toolchain) is None or capability in PORTABLE_COMPUTE_CAPABILITIES


def _neither(no_tensorrt: BackendError, no_rtx: BackendError) -> BackendError:
    """Return one error for both flavours, of the kind and with the fix of the one that is installed."""
    if no_tensorrt.args == no_rtx.args:
        return no_rtx
    first, second = (no_tensorrt, no_rtx) if isinstance(no_rtx, ToolchainError) else (no_rtx, no_tensorrt)
    return type(first)(
        f"no TensorRT here can do this: {no_tensorrt.what}; {no_rtx.what}",
        "\n".join(dict.fromkeys(line for line in (first.fix, second.fix) if line)),
    )


def _named(device: Device) -> str:
    return f"device {device.ordinal} ({device.name}, {device.compute_capability.sm})"
