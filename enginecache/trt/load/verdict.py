"""The verdict on a plan that was not loaded: bad, or good and in the wrong place.

A bad plan is set aside for every host and built anew. A plan that the GPU, the driver, the memory, the TensorRT here or
a missing plugin keeps from loading is refused, and stays. A needless "bad" costs one build; a needless "refused" waits
for a person. So a crash on the plan, or no engine from it, is bad where version and reach are right and the device was
found, unless TensorRT says one of the few things below, which real libraries were seen to say of good plans.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from enginecache.files.os_errors import is_about_memory, is_about_threads
from enginecache.host.devices import Device
from enginecache.trt.load.request import Failure, FailureKind, LoadRequest
from enginecache.trt.messages import clean_line

MAX_REASON_CHARACTERS = 600
"""The registry keeps every line; a message shows so much of them."""


@dataclass(frozen=True)
class LoadVerdict:
    """The meaning of a failure.

    Attributes:
        outcome: ``bad``: the plan is set aside. ``refused``: it stays.
        is_lasting: Whether the same plan, class of GPU, toolchain and driver will fail again, so that it need not be
            tried.
        reason: Why, with TensorRT's own words.
        fix: What to do.
    """

    outcome: Literal["refused", "bad"]
    is_lasting: bool
    reason: str
    fix: str


class _Refusal(NamedTuple):
    why: str
    fix: str
    is_lasting: bool = False


def judge(request: LoadRequest, device: Device | None, failure: Failure, *, has_loaded: bool = False) -> LoadVerdict:
    """Decide what a failure means. Pure.

    Args:
        request: What was to be loaded.
        device: The GPU that it was to be loaded on; None where none is known.
        failure: What came of it.
        has_loaded: Whether the same bytes were loaded by this toolchain, on this class of GPU, under this driver.
    """
    refusal = (
        _KINDS.get(failure.kind)
        or _wrong_device(request, device)
        or _trouble_here(failure)
        or _missing_plugin(failure)
        or _untrusted_code(request, failure)
        or (_WORKS_ELSEWHERE if has_loaded else None)
    )
    if refusal is None:
        return LoadVerdict("bad", is_lasting=True, reason=_reason(failure.what or _NO_ENGINE, failure), fix=_REBUILD)
    return LoadVerdict("refused", refusal.is_lasting, _reason(refusal.why or failure.what, failure), refusal.fix)


def _reason(why: str, failure: Failure) -> str:
    header = (f"the header check says {', '.join(failure.diagnostics)}",) if failure.diagnostics else ()
    own = (failure.what,) if failure.what not in why else ()
    lines = dict.fromkeys(map(clean_line, failure.lines))
    text = "; ".join((*own, *header, *lines)) or "TensorRT gave no reason"
    return f"{why}: {text}"[:MAX_REASON_CHARACTERS]


def _wrong_device(request: LoadRequest, device: Device | None) -> _Refusal | None:
    if device is None:
        return _Refusal("no usable GPU was found here", _SEE_DOCTOR)
    capability = device.compute_capability
    if not request.reach.covers_one(capability):
        why = f"it was built for compute capability {request.reach}, and {device.name} here has {capability}"
        fix = f"Ask on this host without a --target, or with --target {capability.sm}: that is another key."
        return _Refusal(why, fix, is_lasting=True)
    if request.tuned_for not in {None, device.device_class}:
        why = f"it was tuned for {request.tuned_for}, and {device.device_class} is here"
        return _Refusal(why, "Ask with accept exact, which builds one for this GPU.", is_lasting=True)
    return None


def _trouble_here(failure: Failure) -> _Refusal | None:
    texts, found = (*failure.lines, failure.what), set(failure.diagnostics)
    if "INSUFFICIENT_GPU_MEMORY" in found or any(map(_is_about_memory, texts)):
        return _NO_MEMORY
    if any(map(is_about_threads, texts)):
        return _Refusal("no thread could be started", "Raise the limit of threads here; the engine is kept.")
    if found & {"CUDA_ERROR", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"} or any(map(_DRIVER.search, texts)):
        return _Refusal("CUDA or its driver failed", _SEE_DOCTOR)
    return None


def _is_about_memory(text: str) -> bool:
    return is_about_memory(text) or _GPU_MEMORY.search(text) is not None


def _missing_plugin(failure: Failure) -> _Refusal | None:
    found = [match for line in failure.lines if (match := _PLUGIN.search(line))]
    if not found:
        return None
    names = dict.fromkeys(f"{match['name']} version {match['version']}" for match in found if match["name"])
    fix = "Load it with plugins=[...], naming the libraries that the model was built with."
    return _Refusal(f"it needs the plugin {', '.join(names) or 'of a library'} that is not loaded", fix)


def _untrusted_code(request: LoadRequest, failure: Failure) -> _Refusal | None:
    if not request.is_version_compatible or request.allows_host_code or failure.kind == "crash":
        return None
    fix = "Pass trusted=True if you trust where it comes from: code in it runs in this process."
    return _Refusal("it is version-compatible, and its host code is not allowed to run", fix)


_REBUILD = "It was set aside: ask again, which builds it anew."
_NO_ENGINE = "it covers this GPU and this TensorRT, and was not taken"
_SEE_DOCTOR = "`enginecache doctor` shows the driver, the GPUs and what each TensorRT needs; the engine is kept."
_NO_MEMORY = _Refusal(
    "there was not enough memory", "Free memory on this host and its GPU, and load it again; the engine is kept."
)
_WORKS_ELSEWHERE = _Refusal(
    "another process loaded it on such a GPU, so this process must be to blame",
    "Load it with trial='always' to see whether it still loads in a process of its own; the engine is kept.",
)

_KINDS: dict[FailureKind, _Refusal] = {
    "not_started": _Refusal(
        "", "Name a Python with ENGINECACHE_PYTHON, or load with trial='never'; the engine is kept."
    ),
    "toolchain": _Refusal("", "`enginecache doctor` checks the installation; the engine is kept."),
    "version": _Refusal("", "Ask again, which builds one for the TensorRT here; this one is kept for its own."),
    "plugin": _Refusal("", "Give plugins=[...] the very libraries that the model was built with."),
    "memory": _NO_MEMORY,
    "killed": _Refusal("", "Look at the container's memory limit, and load it again; the engine is kept."),
    "timeout": _Refusal("", "Is the GPU busy? Load it again, or with trial='never'; the engine is kept."),
}
"""Failures that say nothing of the plan, whatever TensorRT said meanwhile."""

_GPU_MEMORY = re.compile(
    r"out of memory|OutOfMemory|OUT_OF_MEMORY|cudaErrorMemoryAllocation|cudaError 2\b", re.IGNORECASE
)
"""Source: TensorRT-RTX 1.7.1 on builds that lacked memory, 2026-11."""

_DRIVER = re.compile(
    r"cudaError|CUDA_ERROR|CUDA error|CUDA initiali[sz]ation fail|CUDA driver|no CUDA-capable device|libcuda\b",
    re.IGNORECASE,
)
"""CUDA's errors by number or name. Not those of a kernel that ran (``illegal memory access``): that may be the plan's.

Source: TensorRT 8.6.0 and TensorRT-RTX 1.7.1 on machines without a driver, 2026-11.
"""

_PLUGIN = re.compile(
    r"(?:not|cannot) find plugin:? (?P<name>[^\s,]+),? version:? ?(?P<version>[\w.]*\w)|PluginCreator not found",
    re.IGNORECASE,
)
"""8.6: ``getPluginCreator could not find plugin: RoIAlign version: 1``; 10: ``Cannot find plugin: EfficientNMS_TRT,
version: 1, namespace:.``; both then ``corresponding IPluginCreator not found in Plugin Registry``.

Source: NVIDIA/TensorRT issues 955 and 1913, laugh12321/TensorRT-YOLO 118.
"""
