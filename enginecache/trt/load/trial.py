"""A plan's first loading on a host, in a child process: a plan that crashes TensorRT takes no server with it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from typing import IO

from enginecache.environment import passed, snapshot
from enginecache.errors import IntegrityError, InterpreterError
from enginecache.files.os_errors import describe_os_error
from enginecache.files.plain import from_plain, to_plain
from enginecache.host.devices import Device
from enginecache.trt.child import (
    Worker,
    child_environment,
    describe_status,
    is_from_outside,
    is_out_of_memory,
    running_worker,
    tail_of,
)
from enginecache.trt.interpreter import Interpreter, environment_for, run_with
from enginecache.trt.load.request import Failure, LoadRequest

WORKER = "enginecache.trt.load.worker"
TIMEOUT_S = 300.0

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
"""Signals that native code ends itself by. A plan is not to blame for any other end."""


class ProcessTrial:
    """A :data:`~enginecache.trt.load.request.Trial` in a process of its own, which leaves nothing behind.

    The child sees one GPU. It needs as much memory there as the engine itself, and gives it back before this returns.
    Safe to call from several threads at once.

    Args:
        python: The interpreter; default: this one, see :mod:`enginecache.trt.interpreter`.
        also: Names of further variables that it is given.
    """

    def __init__(self, python: str | None = None, also: Collection[str] = ()) -> None:
        self._python = python
        self._also = also

    def __call__(self, request: LoadRequest, device: Device | None) -> Failure | None:
        """Load the plan in a child; return None for success.

        Raises:
            IntegrityError: The plan's bytes do not have its digest.
        """
        environment = child_environment(device, passed(snapshot(), self._also))
        try:
            return run_with(self._python, lambda python: self._try(request, python, environment))
        except InterpreterError as error:
            return Failure("not_started", what=error.what)

    def _try(self, request: LoadRequest, interpreter: Interpreter, environment: dict[str, str]) -> Failure | None:
        deadline = time.monotonic() + TIMEOUT_S
        # In memory, since a disk may be full or read-only.
        with contextlib.ExitStack() as stack:
            try:
                log = stack.enter_context(os.fdopen(os.memfd_create("trial", os.MFD_CLOEXEC), "w+b", buffering=0))
                running = running_worker(
                    WORKER,
                    to_plain(request),
                    python=interpreter.path,
                    environment=environment_for(interpreter, environment),
                    folder="/",  # where no model lies, and no module next to it
                    log=log,
                )
                worker = stack.enter_context(running)
            except OSError as error:
                what, _ = describe_os_error(error, "a child process to try it in cannot be started")
                return Failure("not_started", what=what)
            return self._outcome(worker, log, deadline)

    def _outcome(self, worker: Worker, log: IO[bytes], deadline: float) -> Failure | None:
        has_plan = False
        for report in worker.reports():
            event = None if report is None else report["event"]
            if report is None and time.monotonic() > deadline:
                lines = tuple(tail_of(log))
                return Failure("timeout", lines, what=f"it took longer than {TIMEOUT_S:.0f} s")
            if event == "deserializing":
                has_plan = True
            elif event == "loaded":
                return None
            elif report is not None and event == "damaged":
                raise IntegrityError(report["what"], report["fix"])
            elif report is not None:
                return from_plain(Failure, report["failure"])
        status, tail = worker.wait(), tail_of(log)
        not_ready = worker.not_ready(status, tail)
        if not_ready is not None:
            raise not_ready
        return _death(status, tail, has_plan=has_plan)


def _death(status: int, tail: list[str], *, has_plan: bool) -> Failure:
    """Return the failure of a child that ended without an outcome."""
    what = f"the process that tried it ended {describe_status(status)}"
    if is_out_of_memory(tail):
        return Failure("memory", tuple(tail), what=f"{what}, out of memory")
    if is_from_outside(status, tail):
        return Failure("killed", tuple(tail), what=what)
    if has_plan and -status in _CRASHES:
        return Failure("crash", tuple(tail), what=what)
    when = "" if has_plan else " before TensorRT had the plan"
    return Failure("toolchain", tuple(tail), what=f"{what}{when}")
