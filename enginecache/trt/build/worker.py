"""The builder's child process: ``python -m enginecache.trt.build.worker``.

It reports progress, then one result; see :mod:`enginecache.trt.child` for its pipes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from enginecache.errors import BuilderKilledError, EngineCacheError, StoreError
from enginecache.files.os_errors import can_start_threads, describe_os_error, explain_threads
from enginecache.key.precision import check_typing
from enginecache.trt.build.adapter import SerializedPlan, build_plan
from enginecache.trt.build.codec import (
    PLAN_NAME,
    TIMING_CACHE_NAME,
    decode_request,
    encode_done,
    encode_error,
)
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.open_files import pinned
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.child import Reports, end_process, memory_limit_bytes, receive_request
from enginecache.trt.convert.conversion import without_misread
from enginecache.trt.convert.fallback import build_converted
from enginecache.trt.loaded_version import check_loaded, library_version, load_module

NEEDED_THREADS = 8
"""TensorRT-RTX 1.7.1 starts four on two cores, and a build that may start one to three of them never ends or is
refused. Measured 2026-12 under ``ulimit -u``."""


def main() -> None:
    """Read the request, build, report, and end the process."""
    faulthandler.enable(all_threads=False)  # a native crash names the Python line in the log
    record, reports = receive_request()
    end_process(run(record, reports))


def run(record: dict[str, Any], reports: Reports) -> int:
    """Build what the request asks for, send exactly one result, and return the exit status."""
    try:
        with _translated():
            result = _build(decode_request(record), reports)
    except EngineCacheError as error:
        reports.send(encode_error(error))
        return 1
    reports.send(result)
    return 0


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise every exception as an error of the tree; an unforeseen one leaves its traceback in the log.

    That is no verdict on the model, so it is no :class:`BuildError`, which would be remembered as one.
    """
    try:
        yield
    except EngineCacheError:
        raise
    except MemoryError as error:
        # pybind11 makes a MemoryError of std::bad_alloc.
        message = "the builder ran out of memory"
        raise BuilderKilledError(message, "Free memory, or raise the container's limit, and try again.") from error
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk: what is wrong goes to the parent all the same
            traceback.print_exc()
        if isinstance(error, OSError):  # of the machine, and not of the model: not to be remembered
            where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
            doing = f"the builder could not use its files{where}"
            raise StoreError(*describe_os_error(error, doing, in_cache=True)) from error
        message = f"the builder failed in an unforeseen way: {type(error).__name__}: {error}"
        raise EngineCacheError(message, "This is a bug: please report it, with the traceback in the log.") from error


def _build(request: BuildRequest, reports: Reports) -> dict[str, Any]:
    # Threads take address space, with the heaps that they leave behind: where that is limited, TensorRT needs it more.
    if memory_limit_bytes() is None and not can_start_threads(NEEDED_THREADS):
        why, fix = explain_threads()
        raise BuilderKilledError(f"the builder needs {NEEDED_THREADS} threads: {why}", fix)
    trt = load_module(request.toolchain.flavour)
    version = check_loaded(trt, request.toolchain, library_version(request.toolchain.flavour))
    if request.options.precision:
        check_typing(trt, request.toolchain)
    log = BuildLog(sys.stderr)
    log.write("I", f"{trt.__name__} {trt.__version__}, library {version}: {request.source.name} for {request.target}")
    with pinned(request) as model:
        # TensorRT has the model from now on: only what happens after this may be the model's fault.
        reports.send({"event": "opened"})
        if request.conversion is not None:
            reports.send(_progress("Converting the graph"))

        def build(converted: BuildRequest) -> SerializedPlan:
            return build_plan(
                trt,
                converted,
                log,
                report=lambda *step: reports.send(_progress(*step)),
                after_parsing=model.compare,
            )

        plan = build_converted(without_misread(model.request, log), log, build)
    _write(request.work_dir / PLAN_NAME, plan.memory)
    if plan.timing_cache is not None:
        (request.work_dir / TIMING_CACHE_NAME).unlink()
        _write(request.work_dir / TIMING_CACHE_NAME, plan.timing_cache)
    return encode_done(plan.reach, version, plan.warnings, took_timing_cache=plan.took_timing_cache)


def _progress(phase: str, step: int | None = None, step_count: int | None = None) -> dict[str, Any]:
    return {"event": "progress", "phase": phase, "step": step, "step_count": step_count}


def _write(path: Path, content: Any) -> None:
    """Write bytes to a new file of the build's folder, closed when this returns. Not durable: the store is."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(memoryview(content))


if __name__ == "__main__":
    main()
