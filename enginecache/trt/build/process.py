"""Builds in a child process, so that a crash of TensorRT fails one build and does not end the caller."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from enginecache.errors import (
    BuilderCrashError,
    BuilderKilledError,
    EngineCacheError,
    ResourceError,
    StoreError,
    ToolchainError,
)
from enginecache.files.os_errors import RESOURCES, describe_os_error, explain_full_disk, explain_threads, free_inodes
from enginecache.files.plain import from_plain
from enginecache.files.units import format_size
from enginecache.host.targets import Reach
from enginecache.trt.build.codec import MODEL_NAME, PLAN_NAME, TIMING_CACHE_NAME, decode_error, encode_request
from enginecache.trt.build.request import BuildProgress, BuildRequest, BuiltPlan, ProgressCallback
from enginecache.trt.child import (
    Worker,
    child_environment,
    describe_status,
    is_from_outside,
    is_out_of_memory,
    is_out_of_threads,
    memory_limit_bytes,
    running_worker,
    tail_of,
)
from enginecache.trt.interpreter import Interpreter, environment_for, interpreters, run_with

WORKER = "enginecache.trt.build.worker"
EXIT_GRACE_S = 10.0

STALL_S = 20.0
"""Without any computing: TensorRT then waits for a thread that had no room for its stack, and never ends.

Only looked for where the address space is limited. Seen at 520 and 580 MB of it with TensorRT-RTX 1.7.1, 2026-12.
"""
_IDLE_TICKS = 5
"""So little computing in that time counts as none: a thread checks once a second whether the parent lives."""

_RAISE_LIMIT = "Raise the limit of its address space (`ulimit -v`), and try again."

FULL_BELOW_BYTES = 64 << 10
"""A file system with less room than that is full: a log's next line may fail."""


class ProcessBuilder:
    """A :class:`~enginecache.trt.build.request.Builder` that runs each build in a process of its own.

    Safe to call from several threads at once, and from several processes. When its parent dies, the child
    ends too, within about a second. The child is in a session of its own, so that Ctrl-C reaches the
    parent alone, which then kills the child.

    Args:
        python: The interpreter; default: this one, see :mod:`enginecache.trt.interpreter`.
    """

    def __init__(self, python: str | None = None) -> None:
        self._python = python

    def build(self, request: BuildRequest, progress: ProgressCallback | None = None) -> BuiltPlan:
        """Build the plan; see :meth:`enginecache.trt.build.request.Builder.build`.

        Any exception in ``progress``, and an interrupt here, kills the child and waits for its end before it goes on.

        Raises:
            InterpreterError: There is no Python to run the child with; nothing was started, or it could not run it.
            StoreError: The log or the model's bytes cannot be written, or the disk is full.
        """
        interpreters(self._python)  # before a file is written
        with _files_of(request) as log:
            environment = _environment(request)
            return run_with(self._python, lambda python: _build(request, progress, python, environment, log))


def _build(
    request: BuildRequest,
    progress: ProgressCallback | None,
    interpreter: Interpreter,
    environment: dict[str, str],
    log: IO[bytes],
) -> BuiltPlan:
    started_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        running = running_worker(
            WORKER,
            encode_request(request),
            python=interpreter.path,
            environment=environment_for(interpreter, environment),
            folder=request.work_dir,
            log=log,
        )
        try:
            worker = stack.enter_context(running)
        except OSError as error:
            what, fix = describe_os_error(error, "the builder process cannot be started")
            raise (ResourceError if error.errno in RESOURCES else StoreError)(what, fix) from error
        return _listen(worker, request, progress, started_s)


def _environment(request: BuildRequest) -> dict[str, str]:
    environment = child_environment(request.device, request.environment)
    if request.options.plugins and request.toolchain.flavour == "tensorrt-rtx":
        _name_library_for_parser(request.work_dir, environment)
    return environment


def _name_library_for_parser(folder: Path, environment: dict[str, str]) -> None:
    """Let TensorRT-RTX's parser find the library that it opens where a model has plugins.

    It opens ``libtensorrt_rtx.so``; the packages have ``libtensorrt_rtx.so.1`` alone, and the parser then ends the
    process. Source: TensorRT-RTX 1.7.1.116, 2026-11.
    """
    spec = find_spec("tensorrt_rtx_libs")
    found = sorted(Path(spec.origin).parent.glob("libtensorrt_rtx.so.*")) if spec and spec.origin else []
    if found:
        (folder / "libtensorrt_rtx.so").symlink_to(found[0])
        paths = (str(folder), environment.get("LD_LIBRARY_PATH", ""))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))


def _files_of(request: BuildRequest) -> IO[bytes]:
    """Write the files of the build's folder that the child reads, and return the log, opened."""
    try:
        log = _create(request.log_path)
    except OSError as error:
        raise _unwritable(error) from error
    try:
        for name, data in ((MODEL_NAME, request.source.data), (TIMING_CACHE_NAME, request.timing_cache)):
            if data is not None:
                with _create(request.work_dir / name) as file:
                    file.write(data)
    except OSError as error:
        log.close()
        raise _unwritable(error) from error
    return log


def _unwritable(error: OSError) -> StoreError:
    return StoreError(*describe_os_error(error, "the build's files cannot be written", in_cache=True))


def _create(path: Path) -> IO[bytes]:
    """Make a file that only this user may read, and return it opened for appending."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def _listen(worker: Worker, request: BuildRequest, progress: ProgressCallback | None, started_s: float) -> BuiltPlan:
    """Pass progress on until the result arrives; raise the worker's error.

    Without news the last step is passed on again with the time that has passed: TensorRT tries tactics for minutes in
    silence.
    """
    step: tuple[str, int | None, int | None] = ("Starting", None, None)
    has_model = False
    stall = _Stall(worker, request.log_path)
    for report in worker.reports():
        stall.check(has_model=has_model)
        if report is not None:
            if report["event"] == "opened":
                has_model = True
                continue
            if report["event"] == "done":
                return _plan(worker, request, report, time.monotonic() - started_s)
            if report["event"] == "error":
                raise decode_error(report, request.log_path)
            step = (report["phase"], report["step"], report["step_count"])
        if progress is not None:
            progress(BuildProgress(*step, time.monotonic() - started_s))
    status = worker.wait()
    if _is_full(request.work_dir):
        # Whatever it died of, it is no fault of the model, and must not be remembered as one.
        why, fix = explain_full_disk(request.work_dir)
        raise StoreError(f"the builder ended {describe_status(status)}: {why}", fix)
    raise worker.not_ready(status, log_tail(request.log_path)) or _death(status, request.log_path, has_model=has_model)


class _Stall:
    """A watch over a builder that may hang because it lacks address space."""

    def __init__(self, worker: Worker, log_path: Path) -> None:
        self._worker = worker
        self._log = str(log_path)
        self._limit = memory_limit_bytes()
        self._ticks = 0
        self._since_s = time.monotonic()

    def check(self, *, has_model: bool) -> None:
        """Raise the error of a builder that has its model and has computed almost nothing for :data:`STALL_S`."""
        if self._limit is None:
            return
        ticks, now_s = self._worker.cpu_ticks(), time.monotonic()
        if ticks > self._ticks + _IDLE_TICKS or not has_model:
            self._ticks, self._since_s = ticks, now_s
        elif now_s - self._since_s >= STALL_S:
            what = f"the builder hangs because it lacks memory: its limit is {format_size(self._limit)}"
            raise BuilderKilledError(what, _RAISE_LIMIT, self._log)


def _is_full(folder: Path) -> bool:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize < FULL_BELOW_BYTES or free_inodes(folder) == 0


def _plan(worker: Worker, request: BuildRequest, report: dict[str, Any], build_seconds: float) -> BuiltPlan:
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(EXIT_GRACE_S)  # so that nobody holds a writable descriptor of the plan
    return BuiltPlan(
        plan_path=request.work_dir / PLAN_NAME,
        build_seconds=build_seconds,
        reach=from_plain(Reach, report["reach"]),
        loaded_version=report["loaded_version"],
        warnings=tuple(report["warnings"]),
        timing_cache=None if request.timing_cache is None else (request.work_dir / TIMING_CACHE_NAME).read_bytes(),
        took_timing_cache=report["took_timing_cache"],
    )


def _death(status: int, log_path: Path, *, has_model: bool = True) -> EngineCacheError:
    """Return the error for a worker that ended without a result; ``has_model`` if TensorRT had received the model."""
    tail = log_tail(log_path)
    what, advice = _cause(status, tail)
    if is_out_of_memory(tail) or is_out_of_threads(tail):
        return BuilderKilledError(what, advice, str(log_path))  # the log has a traceback, which says no more
    last = "\n".join(["The log's last lines:", *(f"  {line}" for line in tail)]) if tail else "The log is empty."
    if not has_model and not is_from_outside(status, tail):
        what = f"the builder process ended {describe_status(status)} before it had opened the model"
        advice = "Python or TensorRT could not be loaded; `enginecache doctor` checks the installation."
        return ToolchainError(what, f"{advice}\n{last}\nThe builder's log: {log_path}")
    # A process that ends with a status does not say that the model is to blame.
    is_verdict = status < 0 and not is_from_outside(status, tail) and memory_limit_bytes() is None
    kind = BuilderCrashError if is_verdict else BuilderKilledError
    return kind(what, f"{advice}\n{last}", str(log_path))


def _cause(status: int, tail: Sequence[str]) -> tuple[str, str]:
    """Return what happened, and what to do."""
    if is_out_of_memory(tail):
        return "the builder ran out of memory and died", "Free memory, or raise the container's limit, and try again."
    if is_out_of_threads(tail):
        return "the builder could not start a thread and died", explain_threads()[1]
    return _ending(status, tail)


def _ending(status: int, tail: Sequence[str]) -> tuple[str, str]:
    """Return the same for a process whose log names no resource that it lacked."""
    if status >= 0:
        what = f"the builder process ended with status {status} and no result"
        return what, "The log says more; `enginecache doctor` checks the installation."
    if -status == signal.SIGKILL:
        what = "the builder was killed (SIGKILL): out of memory?"
        return what, "Look in the kernel's log and at the container's memory limit; give the build more memory."
    if is_from_outside(status, tail):
        return f"the builder was ended {describe_status(status)}", "Something outside ended it; run it again."
    return _crash(status)


def _crash(status: int) -> tuple[str, str]:
    what = f"the builder crashed: it was ended {describe_status(status)}"
    limit = memory_limit_bytes()
    if limit is None:
        return what, "TensorRT crashed on this model: try another release of it, or fold the model's constants first."
    # Protobuf and TensorRT do not look at every pointer that the allocator gives.
    what += f", perhaps because it lacks memory: its limit is {format_size(limit)}"
    return what, _RAISE_LIMIT


def log_tail(path: Path) -> list[str]:
    """Return the last lines of a log, without its empty ones; reads a few KiB from its end."""
    try:
        with path.open("rb") as file:
            return tail_of(file)
    except OSError:
        return []
