"""Would a file load here, as far as its header and this host say: a refusal is sure, a yes is never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from enginecache.errors import NoDeviceError
from enginecache.exchange.foreign import DAMAGE, ForeignFile, Note
from enginecache.exchange.headers import PlanHeader
from enginecache.files.os_errors import shell_path
from enginecache.host.devices import Device, current_device
from enginecache.host.targets import AMPERE
from enginecache.host.toolchain import PRODUCTS, Toolchain, ToolchainFinding, inspect_toolchains

Verdict = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Loadability:
    """Verdict on whether a file would load here.

    Attributes:
        verdict: ``no`` where the file or this host rules it out; ``yes`` only where a load here is on record.
        reasons: Why; each with its code and text.
    """

    verdict: Verdict
    reasons: tuple[Note, ...]


@dataclass(frozen=True)
class Host:
    """TensorRT and the GPU of this host.

    Attributes:
        findings: What is installed of each flavour.
        device: The GPU; None where there is none.
        no_device: Why there is none.
    """

    findings: tuple[ToolchainFinding, ...]
    device: Device | None
    no_device: str = ""

    @classmethod
    def here(cls, cuda_major: int | None = None) -> Host:
        """Look at this host; imports nothing of TensorRT.

        Args:
            cuda_major: CUDA major version, for a TensorRT whose packages do not tell it.
        """
        try:
            return cls(inspect_toolchains(cuda_major), current_device())
        except NoDeviceError as error:
            return cls(inspect_toolchains(cuda_major), None, error.what)

    def finding(self, flavour: str) -> ToolchainFinding:
        """Return what is installed of a flavour."""
        return next(found for found in self.findings if found.flavour == flavour)


def judge_file(found: ForeignFile, host: Host, loaded: Sequence[Note] = ()) -> Loadability:
    """Decide whether a file would load here.

    Args:
        found: The file.
        host: What it would be loaded with.
        loaded: What is on record of loading exactly these bytes here: code ``loaded``, ``refused`` or ``bad``.
    """
    sure = [*_damage(found), *_kind_refusals(found)]
    doubts: list[Note] = []
    if found.header is not None:
        refused, doubts = judge_header(found.header, host)
        sure += refused
    elif not sure:
        doubts.append(Note("layout", "it has no header that is known"))
    if found.kind == "ep_context":
        doubts.append(Note("onnxruntime", "ONNX Runtime loads it, with the execution provider that made it"))
    sure += [note for note in loaded if note.code != "loaded"]
    if sure:
        return Loadability("no", tuple(sure))
    good = tuple(note for note in loaded if note.code == "loaded")
    if good:
        return Loadability("yes", good)
    tried = Note("not_tried", "the header rules nothing out; only a load on the GPU shows whether it works")
    return Loadability("unknown", (*doubts, tried))


def judge_header(header: PlanHeader, host: Host) -> tuple[list[Note], list[Note]]:
    """Compare a plan's header with the host; return what rules a load out, and what is in doubt."""
    refused, doubts = _toolchain_notes(header, host.finding(header.flavour))
    if header.doubt:
        doubts.append(Note("layout", header.doubt))
    if host.device is None:
        refused.append(Note("no_device", f"there is no GPU here: {host.no_device}"))
    else:
        one, other = _device_notes(header, host.device)
        refused += one
        doubts += other
    return refused, doubts


def is_same_release(header_version: str, version: str) -> bool:
    """Return whether two versions are of one release; one of them may lack the build number.

    TensorRT 8.6.0's Python package says 8.6.0, and its plans 8.6.0.12.
    """
    one, other = header_version.split("."), version.split(".")
    length = min(len(one), len(other))
    return length >= 3 and one[:length] == other[:length]


def strip_command(found: ForeignFile) -> str:
    """Return the command that writes the plan in a wrapper to a file of its own; empty where it is not known how."""
    if found.wrapper is None or found.plan_offset is None:
        return ""
    head = f" | head -c {found.wrapper.size_bytes}" if found.wrapper.size_bytes is not None else ""
    return f"tail -c +{found.plan_offset + 1} {shell_path(found.path)}{head} > stripped.plan"


def _damage(found: ForeignFile) -> list[Note]:
    return [note for note in found.notes if note.code in DAMAGE]


def _kind_refusals(found: ForeignFile) -> list[Note]:
    if found.wrapper is not None:
        how = strip_command(found)
        text = f"TensorRT does not load the file of {found.wrapper.program}"
        return [Note("wrapper", f"{text}; the plan alone: {how}" if how else text)]
    if found.kind == "plan":
        return []
    if found.kind == "onnx":
        how = f"`enginecache get {shell_path(found.path)}` builds an engine of it"
        return [Note("not_a_plan", f"it is a model, not an engine: {how}")]
    if found.kind == "ep_context":
        # What it holds may be a plan that would load; the file itself is ONNX Runtime's.
        if any(one.header is not None for one in found.contexts):
            return []
        return [Note("not_a_plan", "its EPContext nodes hold no plan of TensorRT that could be read")]
    what = "a timing cache" if found.kind == "timing_cache" else "not a plan of TensorRT"
    return [Note("not_a_plan", f"it is {what}")]


def _toolchain_notes(header: PlanHeader, finding: ToolchainFinding) -> tuple[list[Note], list[Note]]:
    product = PRODUCTS[header.flavour]
    toolchain = finding.toolchain
    if toolchain is None:
        return [Note("no_toolchain", f"it needs {product}: {finding.problem}")], []
    if header.tensorrt_version is None:
        return [], []
    if not is_same_release(header.tensorrt_version, toolchain.version):
        text = f"{product} {header.tensorrt_version} built it, and {toolchain.version} is installed"
        if _may_be_version_compatible(header, toolchain):
            more = "it loads only if it was built version-compatible, which its header does not say"
            return [], [Note("version", f"{text}: {more}")]
        return [Note("version", text)], []
    if header.cuda_version is not None and header.cuda_version.partition(".")[0] != str(toolchain.cuda_major):
        text = f"it was built for CUDA {header.cuda_version}, and the {product} here is for CUDA {toolchain.cuda_major}"
        return [], [Note("cuda", text)]
    return [], []


def _may_be_version_compatible(header: PlanHeader, toolchain: Toolchain) -> bool:
    """Return whether a version-compatible plan would load: in a later release of the same major version.

    Since TensorRT 8.6; TensorRT-RTX has none. Source: NVIDIA, TensorRT documentation, "Version Compatibility", 2026-11.
    """
    if header.flavour != "tensorrt":
        return False
    built, here = _numbers(header.tensorrt_version or ""), _numbers(toolchain.version)
    return built >= (8, 6) and built[:1] == here[:1] and built[:3] < here[:3]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _device_notes(header: PlanHeader, device: Device) -> tuple[list[Note], list[Note]]:
    here = f"{device.name} has compute capability {device.compute_capability}"
    if header.reach is not None:
        is_reached = header.reach.covers_one(device.compute_capability)
        text = f"it runs on compute capability {header.reach}, and {here}"
        return [] if is_reached else [Note("compute_capability", text)], []
    built = header.built_on
    if built is None:
        return [], [Note("compute_capability", "the GPUs that it runs on are not in its header as it is known")]
    if built.compute_capability == device.compute_capability:
        text = f"it was tuned for a GPU with {built.sm_count} SMs, and {device.name} has {device.sm_count}"
        return [], [] if built.sm_count == device.sm_count else [Note("device", text)]
    text = f"it was built on compute capability {built.compute_capability}, and {here}"
    if min(built.compute_capability, device.compute_capability) < AMPERE:
        return [Note("compute_capability", text)], []
    more = "it loads only if it was built for Ampere and later, which its header does not say"
    return [], [Note("compute_capability", f"{text}: {more}")]
