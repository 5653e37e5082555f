"""Deserialization of a plan in this process; of the modules here the only one that touches TensorRT.

TensorRT must be the very release that built the plan, so the version is compared before TensorRT sees a byte. The
header check of TensorRT-RTX never decides by itself: it looks at 64 bytes, and calls changed data valid.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from enginecache.errors import IntegrityError, OptionError, ToolchainError
from enginecache.files.digest import digest_of
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.os_errors import describe_os_error
from enginecache.host.toolchain import PRODUCTS, Flavour
from enginecache.key.options import PluginLibrary
from enginecache.trt.load.logs import Kept, LoadLog, make_logger
from enginecache.trt.load.request import Failure, Loaded, LoadRequest
from enginecache.trt.loaded_version import agree, library_version, load_module
from enginecache.trt.plugin_libraries import register

_REPAIR = "Run `enginecache verify --deep --repair --yes`, then ask again."
_RUNTIMES: dict[Flavour, _Runtime] = {}
_VERIFIED: dict[str, Fingerprint] = {}
"""Files that this process has compared with their digests."""

_GUARD = threading.Lock()
"""One loading at a time: NVIDIA asks that calls on one object are serialized, and whether host code may run is a
property of the runtime. Source: NVIDIA TensorRT documentation, "Threading", 10.x.
"""


def _begin_anew() -> None:
    """Start anew in a forked child: another thread's loading did not come along, and its lock must not either."""
    global _GUARD, _RUNTIMES  # noqa: PLW0603
    _GUARD = threading.Lock()
    _LEFT_BEHIND.append(_RUNTIMES)  # kept, since a destructor would call a CUDA that is not there
    _RUNTIMES = {}


_LEFT_BEHIND: list[dict[Flavour, _Runtime]] = []
os.register_at_fork(after_in_child=_begin_anew)


def deserialize(
    request: LoadRequest, *, echo: TextIO | None = None, before: Callable[[], None] = lambda: None
) -> Loaded | Failure:
    """Load the plan on the CUDA device that is current. Blocks while another thread loads.

    The digest is verified on the very bytes that TensorRT is given: the file is mapped once, hashed, and handed over.
    A file that this process has verified is not hashed again while its fingerprint is the same.

    Args:
        request: The plan.
        echo: Where each line of TensorRT's is written at once, for a process that may not live to hand them over. Only
            a process's first loading can choose it.
        before: Called when all else is done, and TensorRT is about to receive the plan.

    Raises:
        IntegrityError: The bytes do not have the digest.
    """
    with _verified("engine", request.path, request.digest) as plan, _GUARD:
        try:
            runtime = _runtime(request, echo)
        except ToolchainError as error:
            return Failure("toolchain", what=error.what)
        return runtime if isinstance(runtime, Failure) else runtime.load(request, plan, before)


@contextlib.contextmanager
def _verified(noun: str, path: Path, digest: str) -> Iterator[mmap.mmap]:
    now_ns = time.time_ns()
    try:
        with path.open("rb") as file:
            before = Fingerprint.of_descriptor(file.fileno())
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # nothing to map
        raise IntegrityError(f"the {noun} {path} is empty", _REPAIR) from error
    except OSError as error:
        what, fix = describe_os_error(error, f"the {noun} {path} cannot be read", path, otherwise=_REPAIR)
        raise IntegrityError(what, fix) from error
    with content:
        if _VERIFIED.get(digest) != before:
            found = digest_of(content)
            if found != digest:
                raise IntegrityError(f"the {noun} {path} has the digest {found[:12]}, not {digest[:12]}", _REPAIR)
            if before.is_conclusive(now_ns):
                _VERIFIED[digest] = before
        yield content


def _runtime(request: LoadRequest, echo: TextIO | None) -> _Runtime | Failure:
    """Return the one runtime of a flavour and process: it and its logger must outlive every engine."""
    trt = load_module(request.flavour)
    version = library_version(request.flavour) or str(trt.__version__)
    if not agree(version, request.version):
        product = PRODUCTS[request.flavour]
        return Failure("version", what=f"it was built by {product} {request.version}, and {version} is here")
    if request.flavour not in _RUNTIMES:
        log = LoadLog(echo)
        with log.collecting() as kept:
            try:
                _RUNTIMES[request.flavour] = _Runtime(trt, log)
            except (TypeError, RuntimeError) as error:
                # pybind11 turns the null pointer of a failed factory into a TypeError.
                return kept.failure("toolchain", f"TensorRT gave no runtime: {error}")
    return _RUNTIMES[request.flavour]


class _Runtime:
    """TensorRT's runtime. Every method is called under the guard."""

    def __init__(self, trt: Any, log: LoadLog) -> None:
        self._trt = trt
        self._log = log
        self._logger = make_logger(trt, log)
        self._runtime = trt.Runtime(self._logger)
        self._plugins: set[str] = set()
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")

    def load(self, request: LoadRequest, plan: mmap.mmap, before: Callable[[], None]) -> Loaded | Failure:
        """Hand the mapped plan to TensorRT, which reads the mapping itself: there is no copy."""
        with self._log.collecting() as kept:
            problem = self._load_plugins(request.plugins)
            if problem:
                return kept.failure("plugin", problem)
            diagnostics = self._check_header(plan, kept)
            before()
            self._runtime.engine_host_code_allowed = request.allows_host_code
            try:
                engine = self._runtime.deserialize_cuda_engine(plan)
            except MemoryError as error:  # pybind11's word for std::bad_alloc
                return kept.failure("memory", str(error), diagnostics)
            except Exception as error:  # noqa: BLE001  # pybind11 passes on whatever C++ throws
                return kept.failure("exception", f"{type(error).__name__}: {error}", diagnostics)
            finally:
                self._runtime.engine_host_code_allowed = False
            if engine is None:
                return kept.failure("no_engine", diagnostics=diagnostics)
            return Loaded(engine, kept.lines)

    def _load_plugins(self, plugins: tuple[PluginLibrary, ...]) -> str:
        """Load libraries that this runtime does not have yet; return why one cannot be, or an empty string.

        What TensorRT says of one is kept and does not end the loading: it also refuses a library whose plugins the
        program has registered already. Whether a plugin is missing it says when it reads the plan.
        """
        for library in plugins:
            if library.digest in self._plugins:
                continue
            try:
                register(self._trt, self._runtime.get_plugin_registry(), library)
            except OptionError as error:
                return error.what
            self._plugins.add(library.digest)
        return ""

    def _check_header(self, plan: mmap.mmap, kept: Kept) -> tuple[str, ...]:
        """Return what the header check finds wrong, by name; nothing where the release has no such check."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return ()
        with self._log.collecting():  # deserializing says the same again
            try:
                return self._diagnostics(plan, kept)
            except Exception as error:  # noqa: BLE001  # it only adds words, so it may not end the loading
                kept.add(f"the header check failed: {type(error).__name__}: {error}", is_error=False)
                return ()

    def _diagnostics(self, plan: mmap.mmap, kept: Kept) -> tuple[str, ...]:
        validity, mask = self._runtime.get_engine_validity(plan[: self._runtime.engine_header_size])
        members = self._trt.EngineInvalidityDiagnostics.__members__
        found = tuple(name for name, member in members.items() if int(mask) & int(member.value))
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            why = f" ({', '.join(found)})" if found else ""
            kept.add(f"the header check calls the engine suboptimal on this GPU{why}", is_error=False)
        # Without a driver it is invalid for no reason (TensorRT-RTX 1.7.1, 2026-11).
        return (found or ("INVALID",)) if validity == self._trt.EngineValidity.INVALID else ()
