"""The builder's child process: ``python -m enginecache.builders.worker``.

Standard input: one JSON request; after it, nothing until end-of-file, which means that the parent is gone. Standard
output and error: the build's log. A descriptor of its own, named in the request: JSON lines of progress, then one
result.

The process ends through ``os._exit``: a crash in a native destructor after the plan is written would otherwise turn a
finished build into a failed one.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import select
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from enginecache.builders.adapter import build_plan
from enginecache.builders.base import BuildRequest
from enginecache.builders.loaded import check_loaded, library_version, load_module
from enginecache.builders.logs import BuildLog
from enginecache.builders.pinning import pinned
from enginecache.builders.wire import PLAN_NAME, decode_request, encode_done, encode_error, encode_progress
from enginecache.errors import BuilderKilledError, BuildError, EngineCacheError, StoreError

STDIN = 0
PARENT_CHECK_S = 1.0
PARENT_GONE = 75
"""Exit status when the parent died: nobody reads it but a person with strace."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main() -> None:
    """Read the request, build, report, and end the process."""
    faulthandler.enable(all_threads=False)  # a native crash names the Python line in the log
    record = json.loads(_read_line(STDIN))
    event_fd = record["event_fd"]
    os.set_inheritable(event_fd, False)  # noqa: FBT003  # positional-only
    threading.Thread(target=_watch_parent, args=(record["parent_pid"],), daemon=True).start()
    status = run(record, _Events(event_fd))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _read_line(descriptor: int) -> bytes:
    """One line, without a buffer that would read on: what follows belongs to the watching thread."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(descriptor, 1 << 16)
        if not part:
            os._exit(PARENT_GONE)
        line += part
    return line


def _watch_parent(parent_pid: int) -> None:
    """End the process when the parent has died, also during a long native call (TensorRT releases the GIL there).

    End-of-file tells at once. A sibling that the parent forked without exec (multiprocessing, a pre-forking server) may
    hold the pipe's other end, so the parent's number is looked at as well, every second.
    """
    poll = select.poll()
    poll.register(STDIN, select.POLLIN)
    while os.getppid() == parent_pid:
        if poll.poll(PARENT_CHECK_S * 1000) and not os.read(STDIN, 1 << 16):
            break
    os._exit(PARENT_GONE)


class _Events:
    """Writes whole lines to the parent; safe from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, line: bytes) -> None:
        """Write one line. Never raises: it is called from TensorRT's callbacks, which cannot pass an exception on."""
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                os._exit(PARENT_GONE)


def run(record: dict[str, Any], events: _Events) -> int:
    """Build what the request says, and send exactly one result. Gives the exit status."""
    try:
        with _translated():
            line = _build(decode_request(record), events)
    except EngineCacheError as error:
        events.send(encode_error(error))
        return 1
    events.send(line)
    return 0


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Every exception as an error of ours; what was not foreseen leaves its traceback in the log."""
    try:
        yield
    except EngineCacheError:
        raise
    except MemoryError as error:
        # pybind11 makes a MemoryError of std::bad_alloc.
        message = "the builder ran out of memory"
        raise BuilderKilledError(message, "Free memory, or raise the container's limit, and try again.") from error
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StoreError(
                f"the build's folder is full: {error}", "Free space, or run `enginecache prune`."
            ) from error
        message = f"the builder failed in an unforeseen way: {type(error).__name__}: {error}"
        raise BuildError(message, "The log has the traceback; please report it.") from error


def _build(request: BuildRequest, events: _Events) -> bytes:
    trt = load_module(request.toolchain.flavour)
    version = check_loaded(trt, request.toolchain, library_version(request.toolchain.flavour))
    log = BuildLog(sys.stderr)
    log.write("I", f"{trt.__name__} {trt.__version__}, library {version}: {request.source.name} for {request.target}")
    with pinned(request) as model:
        plan = build_plan(
            trt,
            model.request,
            log,
            report=lambda phase, fraction: events.send(encode_progress(phase, fraction)),
            after_parsing=model.check,
        )
    _write_plan(request, plan.memory)
    return encode_done(plan.compute_capabilities, version, plan.warnings)


def _write_plan(request: BuildRequest, memory: Any) -> None:
    """The plan's bytes into a new file of the build's folder, closed when this returns. Not durable: the store is."""
    path = request.work_dir / PLAN_NAME
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(memoryview(memory))


if __name__ == "__main__":
    main()
