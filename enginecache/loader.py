"""From a stored plan to an ``ICudaEngine``."""

from __future__ import annotations

import importlib
import mmap
import threading
from pathlib import Path
from typing import Any, BinaryIO

from enginecache.digests import digest_of
from enginecache.errors import IntegrityError, LoadError, ToolchainError
from enginecache.toolchain import Flavour, module_name

_RUNTIMES: dict[str, tuple[Any, Any]] = {}
_GUARD = threading.Lock()
_REFUSED = (
    "An engine loads on a GPU of a compute capability that it was built for, under a driver for its CUDA: "
    "`enginecache show` and `enginecache doctor` tell both."
)
_REPAIR = "Run `enginecache verify --deep --repair --yes`, then ask again."


def load_engine(path: Path, digest: str, flavour: Flavour) -> Any:
    """Deserialize a plan in this process, on the CUDA device that is current.

    The digest is verified on the very bytes that TensorRT is given: the file is mapped once, hashed, and handed over.
    Not for plans from strangers: deserializing runs code.

    Args:
        path: The plan.
        digest: BLAKE3 of its bytes, 64 hex characters.
        flavour: Which TensorRT built it.

    Returns:
        The ``ICudaEngine`` of that flavour's module. It keeps its runtime alive.

    Raises:
        IntegrityError: The bytes do not have the digest.
        LoadError: TensorRT refused the plan; its own reason is in the message.
        ToolchainError: The flavour's module cannot be imported.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise IntegrityError(f"the engine {path} cannot be read: {error.strerror}", _REPAIR) from error
    with file, _mapped(file) as plan:
        found = digest_of(plan)
        if found != digest:
            message = f"the engine {path} has the digest {found[:12]}, not {digest[:12]}"
            raise IntegrityError(message, _REPAIR)
        runtime, log = _runtime(flavour)
        log.lines.clear()
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = "; ".join(log.lines) or "it gave no reason"
        message = f"TensorRT did not load the engine {path}: {reason}"
        raise LoadError(message, _REFUSED)
    return engine


def _mapped(file: BinaryIO) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # nothing to map
        raise IntegrityError(f"the engine {file.name} is empty", _REPAIR) from error


def _runtime(flavour: Flavour) -> tuple[Any, Any]:
    """One runtime and its log a flavour and process: both must outlive every engine."""
    with _GUARD:
        if flavour not in _RUNTIMES:
            try:
                trt = importlib.import_module(module_name(flavour))
            except (ImportError, OSError) as error:
                message = f"{module_name(flavour)} cannot be imported: {error}"
                raise ToolchainError(message, "Install the package, and see `enginecache doctor`.") from error
            log = _make_log(trt)
            _RUNTIMES[flavour] = (trt.Runtime(log), log)
        return _RUNTIMES[flavour]


def _make_log(trt: Any) -> Any:
    errors = {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class exists only where TensorRT does
        """Keeps what TensorRT says of errors, a list for each thread."""

        def __init__(self) -> None:
            super().__init__()
            self._local = threading.local()

        @property
        def lines(self) -> list[str]:
            if not hasattr(self._local, "lines"):
                self._local.lines = []
            lines: list[str] = self._local.lines
            return lines

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                self.lines.append(message.strip())

    return Log()
