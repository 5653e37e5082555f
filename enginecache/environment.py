"""Environment variables: which of them a builder is given, and which of those are in the key.

A builder is not given its caller's environment. It is given the variables that a rule lets through, and those that the
setting ``pass_environment`` names. What can change a plan is part of the key while it is set, so the key of a request
without such variables is the same whatever rules there are: a new rule needs no new key version.

Loads nothing but what every Python has loaded: the fast path of the command line reads these rules.

Sources of the rules:
    traced: names that TensorRT-RTX 1.7.1.116 asks for while it builds, on a CPU, 2026-11. A test records them again.
    cuda: CUDA programming guide 13, "CUDA Environment Variables".
    cudnn: cuDNN 9 developer guide, "Logging" and "Environment Variables".
    cublas: cuBLAS 13 documentation, "Environment Variables", "Logging" and "Results Reproducibility".
    tensorrt: TensorRT 10 and 11 documentation, "Environment Variables" and "Troubleshooting".
    container: NVIDIA container toolkit and NGC images.
    glibc: manual pages ``environ(7)``, ``ld.so(8)``, ``mallopt(3)``.
    python: Python 3.12, "Command line and environment".
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # see enginecache/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping

PASSED = "passed"
"""The builder is given it, and it cannot change a plan, or what it selects is checked in another way."""

KEYED = "keyed"
"""The builder is given it, and it is part of the key while it is set."""

REMOVED = "removed"
"""The builder is not given it, and the user is warned: it may have been set to change something."""

UNUSED = "unused"
"""The builder is not given it, and nobody misses it there."""

RULES: tuple[tuple[str, str, str, str], ...] = (
    # CUDA: which GPU, and how its driver works
    ("CUDA_VISIBLE_DEVICES", PASSED, "names the GPU, which the key has", "cuda"),
    ("CUDA_DEVICE_ORDER", PASSED, "names the GPU, which the key has", "cuda"),
    ("CUDA_CACHE_*", PASSED, "the driver's cache of compiled kernels has what the driver would compile", "cuda"),
    ("CUDA_MODULE_LOADING", PASSED, "says when kernels are loaded, and not which", "cuda"),
    ("CUDA_MODULE_DATA_LOADING", PASSED, "says when data is loaded, and not which", "cuda"),
    ("CUDA_MPS_PIPE_DIRECTORY", PASSED, "leads to the MPS server", "cuda"),
    ("CUDA_MPS_LOG_DIRECTORY", PASSED, "logs", "cuda"),
    ("CUDA_LOG_FILE", PASSED, "logs", "cuda"),
    ("CUDA_VERSION", UNUSED, "a label of container images", "container"),
    ("CUDA_DRIVER_VERSION", UNUSED, "a label of container images", "container"),
    ("CUDA_PKG_VERSION", UNUSED, "a label of container images", "container"),
    ("CUDA_COMPONENT_LIST", UNUSED, "a label of container images", "container"),
    ("CUDA_ARCH_LIST", UNUSED, "for compiling CUDA programs", "container"),
    ("CUDA_HOME", UNUSED, "for compiling CUDA programs", "container"),
    ("CUDA_PATH*", UNUSED, "for compiling CUDA programs", "container"),
    ("CUDA_ROOT", UNUSED, "for compiling CUDA programs", "container"),
    ("CUDA_INJECTION*", REMOVED, "it loads a profiler into the builder", "cuda"),
    ("CUDA_*", KEYED, "the driver may compile, load or run other kernels", "cuda"),
    # TensorRT and the libraries that it builds with
    ("NVIDIA_TF32_OVERRIDE", KEYED, "forbids TF32 in TensorRT, cuBLAS and cuDNN", "traced, cublas"),
    ("__*NOWUD", KEYED, "switches of TensorRT's compiler, published as ways round faults", "traced"),
    ("TRT_VERSION", UNUSED, "a label of container images", "container"),
    ("TRT_*", KEYED, "options of TensorRT that no flag has", "traced"),
    ("TENSORRT_VERSION", UNUSED, "a label of container images", "container"),
    ("TENSORRT_*", KEYED, "options of TensorRT that no flag has", "tensorrt"),
    ("MYELIN_*", KEYED, "options of TensorRT's compiler", "traced"),
    ("NVRTC_*", KEYED, "options of the compiler of kernels", "traced"),
    ("LIBNVVM_*", KEYED, "options of the compiler of kernels", "traced"),
    ("NVVM_*", KEYED, "options of the compiler of kernels", "traced"),
    ("NV_NVVM_VERSION", KEYED, "the form of what the compiler of kernels makes", "traced"),
    ("LLVM_OVERRIDE_PRODUCER", KEYED, "an option of the compiler of kernels", "traced"),
    ("CUDNN_VERSION", UNUSED, "a label of container images", "container"),
    ("CUDNN_FRONTEND_VERSION", UNUSED, "a label of container images", "container"),
    ("CUDNN_*", KEYED, "options of cuDNN, whose kernels TensorRT may take", "traced, cudnn"),
    ("CUBLAS_VERSION", UNUSED, "a label of container images", "container"),
    ("CUBLAS_*", KEYED, "options of cuBLAS, whose kernels TensorRT may take", "cublas"),
    ("CUBLASLT_*", KEYED, "options of cuBLASLt, whose kernels TensorRT may take", "cublas"),
    # Containers
    ("NVIDIA_VISIBLE_DEVICES", PASSED, "read by the container runtime before a process starts", "container"),
    ("NVIDIA_DRIVER_CAPABILITIES", PASSED, "read by the container runtime before a process starts", "container"),
    # What is loaded into a process from outside
    ("NVTX_INJECTION64_PATH", REMOVED, "it loads a profiler into the builder", "traced"),
    ("NVTX_INJECTION32_PATH", REMOVED, "it loads a profiler into the builder", "traced"),
    ("LD_LIBRARY_PATH", PASSED, "selects libraries; the loaded TensorRT is compared with the key", "glibc"),
    ("LD_PRELOAD", REMOVED, "it loads a library into the builder, which may change anything", "glibc"),
    ("LD_AUDIT", REMOVED, "it loads a library into the builder, which may change anything", "glibc"),
)
"""Pattern, kind, why, and how it is known. A name is more than a pattern; of two patterns the first counts.

A variable without a rule is not given to the builder.
"""

_NAMES = {pattern: kind for pattern, kind, _, _ in RULES if "*" not in pattern}
_PATTERNS = tuple((*pattern.split("*"), kind) for pattern, kind, _, _ in RULES if "*" in pattern)
_PREFIXES = tuple(prefix for prefix, _, _ in _PATTERNS)

_DECIDING = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH"})
"""Passed, and they decide which GPU and which libraries are found here."""


def kind_of(name: str) -> str | None:
    """The kind that the rules give to a variable; None where none of them knows it."""
    kind = _NAMES.get(name)
    if kind is None and name.startswith(_PREFIXES) and name.isascii():
        for prefix, suffix, kind_ in _PATTERNS:
            if name.startswith(prefix) and name.endswith(suffix) and len(name) >= len(prefix) + len(suffix):
                return kind_
    return kind


def keyed(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables that are part of a key, sorted by name."""
    return tuple(sorted((name, value) for name, value in environ.items() if kind_of(name) == KEYED))


def is_keyed(name: str) -> bool:
    """Whether a variable is part of the key while it is set."""
    return kind_of(name) == KEYED


def snapshot() -> dict[str, str]:
    """This process's environment at one moment, which other threads may be changing."""
    return {os.fsdecode(name): os.fsdecode(value) for name, value in _bytes().copy().items()}


def deciding() -> tuple[tuple[str, str], ...]:
    """The variables that decide which engine a request gets, as they are now.

    Costs under a microsecond where no variable has changed since the last call.
    """
    global _last  # noqa: PLW0603  # one assignment, of a pair that belongs together
    found = _bytes()
    before, values = _last
    if found != before:
        now = snapshot()
        values = tuple(sorted((n, v) for n, v in now.items() if n in _DECIDING or kind_of(n) == KEYED))
        _last = {os.fsencode(name): os.fsencode(value) for name, value in now.items()}, values
    return values


_last: tuple[dict[bytes, bytes], tuple[tuple[str, str], ...]] = ({}, ())


def _bytes() -> dict[bytes, bytes]:
    """The mapping behind ``os.environ``, which copies at one moment, and compares without decoding."""
    found: dict[bytes, bytes] | None = getattr(os.environ, "_data", None)
    return dict(os.environb) if found is None else found
