"""Whether a plan that was not loaded is bad, or good and in the wrong place.

A bad plan is set aside for every host, so it must be beyond doubt: anything that this GPU, its driver, its memory, the
TensorRT here or a plugin may be to blame for is a refusal, and the plan stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from enginecache.host.devices import Device
from enginecache.trt.load.request import Failure, FailureKind, LoadRequest
from enginecache.trt.messages import clean_line

MAX_REASON_LETTERS = 600
"""The registry keeps every line; a message shows so much of them."""


@dataclass(frozen=True)
class LoadVerdict:
    """What a failure means.

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


class _Case(NamedTuple):
    request: LoadRequest
    device: Device | None
    failure: Failure
    has_loaded: bool

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.failure.lines, self.failure.what)

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return next((found for text in self.texts if (found := pattern.search(text))), None)

    def finds(self, *diagnostics: str) -> bool:
        """Whether the header check names one of these members of ``EngineInvalidityDiagnostics``."""
        return any(name in self.failure.diagnostics for name in diagnostics)


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
    case = _Case(request, device, failure, has_loaded)
    for rule in _RULES:
        refusal = rule(case)
        if refusal is not None:
            reason = _reason(refusal.why or failure.what, failure)
            return LoadVerdict("refused", refusal.is_lasting, reason, refusal.fix)
    return LoadVerdict("bad", is_lasting=True, reason=_reason(failure.what or _NO_ENGINE, failure), fix=_REBUILD)


def _reason(why: str, failure: Failure) -> str:
    header = (f"the header check says {', '.join(failure.diagnostics)}",) if failure.diagnostics else ()
    own = (failure.what,) if failure.what not in why else ()
    lines = dict.fromkeys(map(clean_line, failure.lines))
    text = "; ".join((*own, *header, *lines)) or "TensorRT gave no reason"
    return f"{why}: {text}"[:MAX_REASON_LETTERS]


def _by_kind(case: _Case) -> _Refusal | None:
    return _KINDS.get(case.failure.kind)


def _out_of_memory(case: _Case) -> _Refusal | None:
    if case.search(_MEMORY) or case.finds("INSUFFICIENT_GPU_MEMORY"):
        return _Refusal("there was not enough memory", _FREE_MEMORY)
    return None


def _no_device(case: _Case) -> _Refusal | None:
    if case.device is None:
        return _Refusal("no usable GPU was found here", _SEE_DOCTOR)
    return None


def _not_covered(case: _Case) -> _Refusal | None:
    device, reach = case.device, case.request.reach
    if device is None or reach.covers_one(device.compute_capability):
        return None
    here = f"{device.name} here has {device.compute_capability}"
    fix = f"Ask on this host without a --target, or with --target {device.compute_capability.sm}: that is another key."
    return _Refusal(f"it was built for compute capability {reach}, and {here}", fix, is_lasting=True)


def _other_device(case: _Case) -> _Refusal | None:
    tuned_for = case.request.tuned_for
    if case.device is None or tuned_for in {None, case.device.device_class}:
        return None
    why = f"it was tuned for {tuned_for}, and {case.device.device_class} is here"
    return _Refusal(why, "Ask with accept exact, which builds one for this GPU.", is_lasting=True)


def _driver_trouble(case: _Case) -> _Refusal | None:
    if case.search(_CUDA) or case.finds("CUDA_ERROR", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"):
        return _Refusal("CUDA or its driver failed", _SEE_DOCTOR)
    return None


def _host_trouble(case: _Case) -> _Refusal | None:
    if case.search(_HOST):
        return _Refusal(
            "this host lacks something", "Look at the limits and the disks of this host; the engine is kept."
        )
    return None


def _no_reason(case: _Case) -> _Refusal | None:
    # An application's own logger may have had the lines: TensorRT keeps the first one that a process gives it.
    if case.failure.kind == "no_engine" and not case.failure.lines and not case.failure.diagnostics:
        return _Refusal("TensorRT gave no engine and no reason", _TRY_ALONE)
    return None


def _other_place(case: _Case) -> _Refusal | None:
    # Said although device and version are the recorded ones: what is recorded, or found here, must be wrong.
    if case.search(_PLACE) or case.finds("UNSUPPORTED_CC", "VERSION_MISMATCH"):
        return _Refusal("TensorRT takes it for the plan of another GPU or version", _SEE_DOCTOR)
    return None


def _missing_plugin(case: _Case) -> _Refusal | None:
    if not case.search(_PLUGIN):
        return None
    names = dict.fromkeys(
        f"{found['name']} version {found['version']}" for text in case.texts for found in _PLUGIN_NAME.finditer(text)
    )
    fix = "Load it with plugins=[...], naming the libraries that the model was built with."
    return _Refusal(f"it needs the plugin {', '.join(names) or 'of a library'} that is not loaded", fix)


def _host_code(case: _Case) -> _Refusal | None:
    request = case.request
    if not request.is_version_compatible or request.allows_host_code or case.failure.kind == "crash":
        return None
    fix = "Pass trusted=True if you trust where it comes from: code in it runs in this process."
    return _Refusal("it is version-compatible, and its host code is not allowed to run", fix)


def _works_elsewhere(case: _Case) -> _Refusal | None:
    if not case.has_loaded:
        return None
    return _Refusal("another process loaded it on such a GPU, so this process must be to blame", _TRY_ALONE)


_REBUILD = "It was set aside: ask again, which builds it anew."
_NO_ENGINE = "it covers this GPU and this TensorRT, and was not taken"
_SEE_DOCTOR = "`enginecache doctor` shows the driver, the GPUs and what each TensorRT needs; the engine is kept."
_TRY_ALONE = "Load it with trial='always' to see whether it still loads in a process of its own; the engine is kept."
_FREE_MEMORY = "Free memory on this host and its GPU, and load it again; the engine is kept."

_KINDS: dict[FailureKind, _Refusal] = {
    "not_started": _Refusal(
        "", "Name a Python with ENGINECACHE_PYTHON, or load with trial='never'; the engine is kept."
    ),
    "toolchain": _Refusal("", "`enginecache doctor` checks the installation; the engine is kept."),
    "version": _Refusal("", "Ask again, which builds one for the TensorRT here; this one is kept for its own."),
    "plugin": _Refusal("", "Give plugins=[...] the very libraries that the model was built with."),
    "memory": _Refusal("there was not enough memory", _FREE_MEMORY),
    "killed": _Refusal("", "Look at the container's memory limit, and load it again; the engine is kept."),
    "timeout": _Refusal("", "Is the GPU busy? Load it again, or with trial='never'; the engine is kept."),
}
"""Failures that tell nothing of the plan, whatever was said meanwhile."""

_MEMORY = re.compile(
    r"out of memory|OutOfMemory|OUT_OF_MEMORY|bad_alloc|MemoryError|cudaErrorMemoryAllocation|cudaError 2:"
    r"|Cannot allocate memory|failed to map segment|MEM_ALLOC_FAILED|could not be allocated|No free memory"
    r"|insufficient memory|not enough memory",
    re.IGNORECASE,
)
_CUDA = re.compile(
    r"cudaError|CUDA_ERROR|CUDA error|Cuda (?:Runtime|Driver) \(|CUDA initiali[sz]ation fail|CUDA driver|libcuda\b"
    r"|no CUDA-capable device|mismatch of \w+ version|cannot open shared object file|Cuda failure|launch failure"
    r"|illegal memory access|device-side assert|GPU is lost|fallen off the bus|CUBLAS_STATUS|cublasStatus|CUDNN_STATUS"
    r"|initialize cu(?:dnn|blas)|NVRTC|Unable to load library|undefined symbol",
    re.IGNORECASE,
)
"""Source: TensorRT 8.4 to RTX 1.7 as quoted in issues and seen on machines without a driver, 2026-11."""
_PLACE = re.compile(
    r"Version tag does not match|expecting library version|not compatible with this version|expecting compute"
    r"|compute capability|incompatible device|platform specific tag|GPU SM \d+ is not supported",
    re.IGNORECASE,
)
_HOST = re.compile(
    r"std::system_error|Resource temporarily unavailable|Too many open files|No space left|Read-only file system"
    r"|Operation not permitted|Permission denied|Input/output error",
    re.IGNORECASE,
)
_PLUGIN = re.compile(
    r"Plugin ?Creator.*not found|(?:not|Cannot) find plugin|no plugin (?:creator|factory)", re.IGNORECASE
)
_PLUGIN_NAME = re.compile(
    r"(?:not|cannot) find plugin:? (?P<name>[^\s,]+),? version:? ?(?P<version>[\w.]*\w)", re.IGNORECASE
)
"""8.6: ``getPluginCreator could not find plugin: RoIAlign version: 1``; 10: ``Cannot find plugin: EfficientNMS_TRT,
version: 1, namespace:.``; both then ``corresponding IPluginCreator not found in Plugin Registry``.

Source: NVIDIA/TensorRT issues 955 and 1913, zhangcheng828/TensorRT-Plugin 4, laugh12321/TensorRT-YOLO 118.
"""

_RULES: tuple[Callable[[_Case], _Refusal | None], ...] = (
    _by_kind,
    _out_of_memory,
    _no_device,
    _not_covered,
    _other_device,
    _driver_trouble,
    _host_trouble,
    _other_place,
    _missing_plugin,
    _host_code,
    _works_elsewhere,
    _no_reason,
)
"""In order: the first that applies names the reason. What none applies to is bad."""
