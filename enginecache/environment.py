"""Rules for environment variables: those that a builder receives, and those that are part of the key.

A builder does not inherit its caller's environment. It receives only the variables that a rule passes, and those that
the setting ``pass_environment`` names. A variable that can change a plan is part of the key while it is set. A request
without such variables has the same key under any rules, so a new rule needs no new key version.

Imports only modules that every Python has loaded: the fast path of the command line reads these rules.

Sources of the rules:
    traced: names that TensorRT-RTX 1.7.1.116 asks for during a build, on a CPU, 2026-11. A test records them again.
    traced on a GPU: names that TensorRT 8.6.0 and the driver 580.159.04 ask for during builds of FP32 and FP16 on an
        H200, 2026-11-30.
    cuda: CUDA programming guide 13, "CUDA Environment Variables"; MPS guide, "Environment Variables".
    cudnn: cuDNN 9 developer guide, "Error Reporting And API Logging".
    cublas: cuBLAS 13 documentation, "Environment Variables", "Logging" and "Results Reproducibility".
    container: NVIDIA container toolkit, and the images of NGC and of CUDA.
    glibc: manual pages ``environ(7)``, ``ld.so(8)``, ``mallopt(3)``.
    python: Python 3.12 documentation, "Command line and environment".
    numpy: documentation of NumPy 2 and OpenBLAS.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # see enginecache/__init__.py
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

PASSED = "passed"
"""The builder receives it. It cannot change a plan, or its effect is checked in another way."""

KEYED = "keyed"
"""The builder receives it, and it is part of the key while it is set."""

REMOVED = "removed"
"""The builder does not receive it, and the user is warned: it may have been set to change builds."""

UNUSED = "unused"
"""The builder does not receive it, without a warning: it has no use there."""

REPLACED = "replaced"
"""The builder receives a value that enginecache sets."""

_LABEL = "a label of container images"
_COMPILING = "for compiling programs"
_PROFILER = "loads a profiler into the process"
_LOGS = "says what is logged, and where"
_THREADS = "threads and kernels of NumPy's BLAS, which the conversion of a graph does not use"
_PYTHON = "settings of Python, which decide how it runs and not what it computes"
_OPENCL = "a setting of OpenCL, which TensorRT does not use"
_KERNELS = "the driver may compile, load or run other kernels"

RULES: tuple[tuple[str, str, str, str], ...] = (
    # CUDA
    ("CUDA_VISIBLE_DEVICES", PASSED, "names the GPU, which is in the key; the builder sees it alone", "cuda"),
    ("CUDA_DEVICE_ORDER", PASSED, "gives GPUs their numbers; the GPU itself is in the key", "cuda"),
    ("CUDA_CACHE_*", PASSED, "a cache of what the driver would compile", "traced, traced on a GPU, cuda"),
    ("CUDA_MODULE_LOADING", PASSED, "says when kernels are loaded, and not which", "traced on a GPU, cuda"),
    ("CUDA_MODULE_DATA_LOADING", PASSED, "says when data is loaded, and not which", "cuda"),
    ("CUDA_ENABLE_MODULE_LAZY_LOADING", PASSED, "says when kernels are loaded, and not which", "traced"),
    ("CUDA_MPS_PIPE_DIRECTORY", PASSED, "leads to the MPS server", "cuda"),
    ("CUDA_MPS_LOG_DIRECTORY", PASSED, _LOGS, "cuda"),
    ("CUDA_LOG_FILE", PASSED, _LOGS, "cuda"),
    ("CUDA_MPS_*", KEYED, "limits the part of the GPU on which tactics are measured", "cuda"),
    ("CUDA_FORCE_PTX_JIT", KEYED, _KERNELS, "traced on a GPU, cuda"),
    ("CUDA_DISABLE_PTX_JIT", KEYED, _KERNELS, "traced on a GPU, cuda"),
    ("CUDA_FORCE_JIT", KEYED, _KERNELS, "traced on a GPU, cuda"),
    ("CUDA_DISABLE_JIT", KEYED, _KERNELS, "traced on a GPU, cuda"),
    ("CUDA_LAUNCH_BLOCKING", KEYED, "changes how fast tactics are measured to be", "traced on a GPU, cuda"),
    ("CUDA_DEVICE_MAX_*", KEYED, "changes how fast tactics are measured to be", "traced on a GPU, cuda"),
    ("CUDA_SCALE_LAUNCH_QUEUES", KEYED, "changes how fast tactics are measured to be", "traced on a GPU, cuda"),
    ("CUDA_DISABLE_PERF_BOOST", KEYED, "changes how fast tactics are measured to be", "traced on a GPU, cuda"),
    ("CUDA_AUTO_BOOST", KEYED, "changes how fast tactics are measured to be", "traced on a GPU"),
    ("CUDA_PREFER_SPINLOCKS_ON_HOST", KEYED, "read by TensorRT's compiler, and not documented", "traced"),
    ("CUDA_7a3f9c2d", KEYED, "read by TensorRT's compiler, and not documented", "traced"),
    ("CUDA_INJECTION*", REMOVED, _PROFILER, "cuda"),
    ("CUDA*_VERSION", UNUSED, _LABEL, "container"),
    ("CUDA_COMPONENT_LIST", UNUSED, _LABEL, "container"),
    ("CUDA_HOME", UNUSED, _COMPILING, "traced, container"),
    ("CUDA_PATH*", UNUSED, _COMPILING, "traced, container"),
    ("CUDA_ARCH*", UNUSED, _COMPILING, "container"),
    ("CUDA_NVCC_*", UNUSED, _COMPILING, "container"),
    ("CUDA*_ROOT", UNUSED, _COMPILING, "container"),
    ("CUDA*_DIR", UNUSED, _COMPILING, "container"),
    ("CUDA*_PATH", UNUSED, _COMPILING, "container"),
    ("CUDA_*", REMOVED, "may change how kernels are chosen or run", "traced on a GPU, cuda"),
    ("__CUDA_DISABLE_FORWARD_COMPATIBILITY", KEYED, "decides which driver compiles kernels", "traced on a GPU"),
    ("FORCE_ENABLE_COOPERATIVE_LAUNCH_PATCH", KEYED, _KERNELS, "traced on a GPU"),
    ("__RM_NO_VERSION_CHECK", KEYED, "lets parts of two drivers work together", "traced on a GPU"),
    ("__RM_ENABLE_VERBOSE_OUTPUT", PASSED, _LOGS, "traced on a GPU"),
    ("CUDBG_*", UNUSED, "for debuggers of programs", "traced on a GPU"),
    ("NV_PROFILE_*", REMOVED, "is read by the driver, and not documented", "traced on a GPU"),
    ("NV_OPENCL_*", UNUSED, _OPENCL, "traced on a GPU"),
    ("NVCL_*", UNUSED, _OPENCL, "traced on a GPU"),
    # TensorRT and the libraries that it builds with
    ("NVIDIA_TF32_OVERRIDE", KEYED, "forbids TF32 in TensorRT, cuBLAS and cuDNN", "traced, cublas"),
    ("__*NOWUD", KEYED, "switches of TensorRT's compiler, published as ways round its faults", "traced"),
    ("TRT*_VERSION", UNUSED, _LABEL, "container"),
    ("TRT*_ROOT", UNUSED, _COMPILING, "container"),
    ("TRT*_PATH", UNUSED, _COMPILING, "container"),
    ("TRT*_DIR", UNUSED, _COMPILING, "container"),
    ("TRT_*", KEYED, "options of TensorRT that no flag has", "traced"),
    ("TENSORRT*_VERSION", UNUSED, _LABEL, "container"),
    ("TENSORRT*_ROOT", UNUSED, _COMPILING, "container"),
    ("TENSORRT*_PATH", UNUSED, _COMPILING, "container"),
    ("TENSORRT*_DIR", UNUSED, _COMPILING, "container"),
    ("TENSORRT_*", REMOVED, "may change how kernels are chosen or run", "container"),
    ("MYELIN_*", KEYED, "options of TensorRT's compiler", "traced"),
    ("NVRTC_*", KEYED, "options of the compiler of kernels", "traced, traced on a GPU"),
    ("LIBNVVM_*", KEYED, "options of the compiler of kernels", "traced"),
    ("NVVM_*", KEYED, "options of the compiler of kernels", "traced"),
    ("NV_NVVM_VERSION", KEYED, "the form of what the compiler of kernels makes", "traced"),
    ("LLVM_OVERRIDE_PRODUCER", KEYED, "an option of the compiler of kernels", "traced"),
    ("LLVM_IGNORED_ENV_VAR", KEYED, "read by the compiler of kernels, and not documented", "traced"),
    ("LLVM_*", UNUSED, _COMPILING, "traced"),
    ("CUDNN*_VERSION", UNUSED, _LABEL, "container"),
    ("CUDNN*_ROOT", UNUSED, _COMPILING, "container"),
    ("CUDNN*_PATH", UNUSED, _COMPILING, "container"),
    ("CUDNN*_DIR", UNUSED, _COMPILING, "container"),
    ("CUDNN_*", KEYED, "options of cuDNN, whose kernels TensorRT may take", "traced, cudnn"),
    ("CUBLAS*_VERSION", UNUSED, _LABEL, "container"),
    ("CUBLAS_*", KEYED, "options of cuBLAS, whose kernels TensorRT may take", "traced on a GPU, cublas"),
    ("CUBLASLT_*", KEYED, "options of cuBLASLt, whose kernels TensorRT may take", "traced on a GPU, cublas"),
    ("CUTENSOR_*", KEYED, "options of cuTENSOR, whose kernels TensorRT may take", "traced on a GPU"),
    ("CASK_INJECTION*", REMOVED, "loads a library into the process, which may change anything", "traced on a GPU"),
    ("CASK_LOG_*", PASSED, _LOGS, "traced on a GPU"),
    ("CASK_*", KEYED, "options of TensorRT's library of kernels", "traced on a GPU"),
    ("NVTX_INJECTION*", REMOVED, _PROFILER, "traced"),
    ("NVIDIA_*", UNUSED, "read by the container runtime before a process starts, or a label of images", "container"),
    ("AS_SECURE_LOG_FILE", UNUSED, "a log that NVIDIA's own tests ask for", "traced"),
    ("bar", UNUSED, "a name that TensorRT's library asks for by accident", "traced"),
    # The dynamic linker and the C library
    ("LD_LIBRARY_PATH", PASSED, "selects libraries; the loaded TensorRT is compared with the key", "glibc"),
    ("NIX_LD*", PASSED, "selects libraries; the loaded TensorRT is compared with the key", "glibc"),
    ("LD_PRELOAD", REMOVED, "loads a library into the process, which may change anything", "glibc"),
    ("LD_AUDIT", REMOVED, "loads a library into the process, which may change anything", "glibc"),
    ("LD_*", UNUSED, "further settings of the linker", "glibc"),
    ("GLIBC_TUNABLES", REMOVED, "selects among the C library's functions for this CPU", "glibc"),
    ("MALLOC_*", PASSED, "settings of the allocator", "glibc"),
    ("GLIBCXX_*", UNUSED, "settings of the C++ library's allocator", "glibc"),
    ("LANG", PASSED, "the locale, which decides how file names are read", "glibc"),
    ("LANGUAGE", PASSED, "the language of messages", "glibc"),
    ("LC_*", PASSED, "the locale, which decides how file names are read", "glibc"),
    ("LOCPATH", PASSED, "where locales are found", "glibc"),
    ("LOCALE_ARCHIVE*", PASSED, "where locales are found", "glibc"),
    ("GCONV_PATH", UNUSED, "where conversions of characters are found", "glibc"),
    ("NLSPATH", UNUSED, "where messages are found", "glibc"),
    ("TZ", PASSED, "the time zone of logs", "glibc"),
    ("TZDIR", PASSED, "the time zone of logs", "glibc"),
    ("PATH", PASSED, "where programs are found; the builder starts none", "glibc"),
    ("HOME", PASSED, "where the driver keeps its cache of kernels", "glibc"),
    ("USER", PASSED, "who the user is", "glibc"),
    ("LOGNAME", PASSED, "who the user is", "glibc"),
    ("TMPDIR", PASSED, "where temporary files are", "glibc"),
    ("TEMP", PASSED, "where temporary files are", "python"),
    ("TMP", PASSED, "where temporary files are", "python"),
    # Python and its packages
    ("PYTHONPATH", REPLACED, "where this process finds its modules", "python"),
    ("PYTHONSAFEPATH", REPLACED, "keeps the current folder out of the modules' path", "python"),
    ("PYTHONHOME", PASSED, "where Python's own modules are", "python"),
    ("PYTHONPLATLIBDIR", PASSED, "where Python's own modules are", "python"),
    ("PYTHONUSERBASE", PASSED, "where the user's modules are; the loaded TensorRT is compared with the key", "python"),
    ("PYTHONNOUSERSITE", PASSED, "leaves the user's modules out", "python"),
    ("PYTHONDONTWRITEBYTECODE", PASSED, _PYTHON, "python"),
    ("PYTHONPYCACHEPREFIX", PASSED, _PYTHON, "python"),
    ("PYTHONUTF8", PASSED, _PYTHON, "python"),
    ("PYTHONCOERCECLOCALE", PASSED, _PYTHON, "python"),
    ("PYTHON*", UNUSED, _PYTHON, "python"),
    ("__PYVENV_LAUNCHER__", UNUSED, _PYTHON, "python"),
    ("PROTOCOL_BUFFERS_PYTHON_*", PASSED, "which parser reads ONNX files; they read the same", "python"),
    ("OMP_*", PASSED, _THREADS, "numpy"),
    ("GOTO_NUM_THREADS", PASSED, _THREADS, "numpy"),
    ("OPENBLAS_*", PASSED, _THREADS, "numpy"),
    ("MKL_*", PASSED, _THREADS, "numpy"),
    ("NPY_*_CPU_FEATURES", PASSED, "the CPU's instructions that NumPy uses; it rounds the same by all", "numpy"),
    ("NPY_NUMPY_2_BEHAVIOR", UNUSED, "lets NumPy 1 behave as NumPy 2", "traced on a GPU"),
    ("NUMPY_*", UNUSED, "warnings of NumPy", "numpy"),
    ("GFORTRAN_*", UNUSED, "files of Fortran programs", "numpy"),
    ("OPENSSL_*", PASSED, "settings of Python's own hashes, which name nothing", "python"),
    ("RUST_*", UNUSED, "threads and messages of BLAKE3", "python"),
    ("SQLITE_TMPDIR", UNUSED, "temporary files of the registry", "python"),
    ("ENGINECACHE_*", UNUSED, "the builder is given a request", "python"),
)
"""Pattern, kind, reason, and source.

A pattern has at most one ``*``, for any characters or none. A rule without one takes precedence over all patterns, and
the first of two patterns over the second. The builder does not receive a variable without a rule; there is no warning.
"""

_NAMES = {pattern: (kind, why) for pattern, kind, why, _ in RULES if "*" not in pattern}
_PATTERNS = tuple((*pattern.partition("*")[::2], (kind, why)) for pattern, kind, why, _ in RULES if "*" in pattern)
_PREFIXES = tuple(dict.fromkeys(prefix for prefix, _, _ in _PATTERNS))

_DECIDING = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH", "NIX_LD_LIBRARY_PATH"})
"""Variables that are in no key, and decide which GPU and which libraries are found here."""

Pairs = tuple[tuple[str, str], ...]
"""Names and values, sorted by name."""


def kind_of(name: str) -> str | None:
    """Return the kind of a variable by the rules; None if no rule matches."""
    rule = _rule(name)
    return None if rule is None else rule[0]


def _rule(name: str) -> tuple[str, str] | None:
    rule = _NAMES.get(name)
    if rule is None and name.startswith(_PREFIXES) and name.isascii():
        for prefix, suffix, found in _PATTERNS:
            if name.startswith(prefix) and name.endswith(suffix) and len(name) >= len(prefix) + len(suffix):
                return found
    return rule


def is_keyed(name: str) -> bool:
    """Return whether a variable is part of the key while it is set."""
    return kind_of(name) == KEYED


def keyed(environ: Mapping[str, str], also: Collection[str] = ()) -> Pairs:
    """Return the variables that are part of a key.

    Args:
        environ: The environment of a request.
        also: Names that the user passes; part of the key unless a rule passes them anyway.
    """
    return tuple(
        sorted(
            (name, value)
            for name, value in environ.items()
            if (kind := kind_of(name)) == KEYED or (name in also and kind not in {PASSED, REPLACED})
        )
    )


def passed(environ: Mapping[str, str], also: Collection[str] = ()) -> Pairs:
    """Return the variables that a child receives, with those that its starter replaces.

    Args:
        environ: The environment of a request.
        also: Names that the user passes.
    """
    kinds = {PASSED, KEYED, REPLACED}
    return tuple(sorted(item for item in environ.items() if item[0] in also or kind_of(item[0]) in kinds))


def warnings(environ: Mapping[str, str], also: Collection[str] = ()) -> tuple[str, ...]:
    """Return warnings about variables that are not passed, though they may have been set for the builder.

    Args:
        environ: The environment of a request.
        also: Names that the user passes.
    """
    rules = {name: _rule(name) for name in sorted(environ) if name not in also}
    return tuple(
        f"{name} is set and is not passed to the builder: it {rule[1]}. "
        f"To pass it, add {name} to ENGINECACHE_PASS_ENVIRONMENT; it is then part of the key."
        for name, rule in rules.items()
        if rule is not None and rule[0] == REMOVED
    )


def snapshot() -> dict[str, str]:
    """Return a consistent copy of this process's environment, which other threads may be changing."""
    return {os.fsdecode(name): os.fsdecode(value) for name, value in _bytes().copy().items()}


def deciding(also: frozenset[str] = frozenset()) -> Pairs:
    """Return the current variables that decide which engine a request gets.

    Costs under a microsecond if no variable has changed since the last call.

    Args:
        also: Names that the user passes.
    """
    before, values = _last.get(also, ({}, ()))
    if _bytes() != before:
        now = snapshot()
        values = deciding_among(now.items(), also)
        _last[also] = {os.fsencode(name): os.fsencode(value) for name, value in now.items()}, values
    return values


def deciding_among(variables: Iterable[tuple[str, str]], also: Collection[str] = ()) -> Pairs:
    """Return those of the given variables that decide which engine a request gets, sorted by name."""
    return tuple(sorted(item for item in variables if item[0] in _DECIDING or is_keyed(item[0]) or item[0] in also))


_last: dict[frozenset[str], tuple[dict[bytes, bytes], Pairs]] = {}
"""For each set of further names, the environment at the last call and its result."""


def _bytes() -> dict[bytes, bytes]:
    """Return the mapping behind ``os.environ``, which can be copied atomically and compared without decoding."""
    found: dict[bytes, bytes] | None = getattr(os.environ, "_data", None)
    return dict(os.environb) if found is None else found
