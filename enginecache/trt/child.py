"""Child processes: how one is started, what it receives and reports, and what its death means.

A child reads one line of JSON on standard input; after it comes nothing until end-of-file, which means that the parent
has died. It reports in lines of JSON on a descriptor of its own. Standard output and error are its log, so that what a
native library prints is kept and is never taken for a report.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from enginecache.environment import Pairs, passed, snapshot
from enginecache.errors import InterpreterError
from enginecache.files.os_errors import is_about_memory, is_about_threads
from enginecache.host.devices import Device
from enginecache.trt.interpreter import NAME_ONE

READY = "ready"
"""The first report of every child."""

START_TIMEOUT_S = 120.0
"""Python may have to be read from a slow network; what has not reported itself by then does something else."""

POLL_S = 0.5
TAIL_LINES = 20
TAIL_BYTES = 8192
_SHOWN_BYTES = 40
"""Of a line that is no report."""

VERSION: str = sys.modules["enginecache"].__version__
"""Of enginecache: what this process and its children must have in common."""

STDIN = 0
PARENT_CHECK_S = 1.0
PARENT_GONE = 75
"""Exit status when the parent died: only strace shows it."""

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
"""Signals that a process brings upon itself by what it does; all others come from outside."""

_NO_PROGRAM = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.ENOTDIR, errno.ELOOP, errno.EISDIR}
"""Errors of starting a program that are about its file."""


def child_environment(device: Device | None, variables: Pairs | None = None) -> dict[str, str]:
    """Return the environment of a child that is to find the same modules as this process, and one GPU.

    Args:
        device: The chosen GPU, which is device 0 there: TensorRT takes the current device, and has no other switch.
            None leaves ``CUDA_VISIBLE_DEVICES`` as it is.
        variables: All others that it is given; default: those that the rules let through now.
    """
    environment = dict(passed(snapshot()) if variables is None else variables)
    environment["PYTHONPATH"] = os.pathsep.join(module_search_path())
    only = "" if device is None else device.visible_as or device.uuid
    if only:
        # Empty for a GPU that CUDA shows alone here: it shows the child the same one.
        environment["CUDA_VISIBLE_DEVICES"] = only
    return environment


def module_search_path() -> list[str]:
    """Return this process's ``sys.path`` for a child, so that both find the same TensorRT and enginecache.

    Without the current folder, which ``python -m`` and ``python -c`` put in front: a ``tensorrt.py`` next to a model
    must not be run. It stays where PYTHONPATH names it, or where enginecache itself is imported from it.
    """
    package_root = str(Path(__file__).absolute().parents[2])
    named = {_absolute(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = _absolute("")
    path = [_absolute(entry) for entry in sys.path if entry]
    path = [entry for entry in path if entry != here or entry in named or entry == package_root]
    return path if package_root in path else [package_root, *path]


def _absolute(entry: str) -> str:
    """Return an entry of a search path, absolute; as it is where the current folder has been removed."""
    try:
        return os.path.abspath(entry)  # noqa: PTH100  # Path.resolve would follow links, and the entries must match
    except FileNotFoundError:
        return entry


# The parent's side


@contextlib.contextmanager
def running_worker(
    module: str,
    request: dict[str, Any],
    *,
    python: str,
    environment: dict[str, str],
    folder: str | os.PathLike[str],
    log: IO[bytes],
) -> Iterator[Worker]:
    """Yield a running child that has its request; it is dead and reaped afterwards, whatever happens.

    It is in a session of its own, so that Ctrl-C reaches the parent alone.

    Args:
        module: What ``python -m`` runs.
        request: Plain JSON values; ``event_fd`` and ``parent_pid`` are added.
        python: The interpreter itself, no script that starts one.
        environment: All of the child's.
        folder: Its current folder, which ``python -m`` puts first in the search path before Python 3.11.
        log: Where its standard output and error go.

    Raises:
        InterpreterError: The interpreter is not a program that can be started.
        OSError: It cannot be started for want of something.
    """
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            bufsize=0,
            cwd=folder,
            env={**environment, "PYTHONSAFEPATH": "1"},
            pass_fds=(writer,),
            close_fds=True,
            start_new_session=True,
        )
    except BaseException as error:
        os.close(reader)
        os.close(writer)
        if isinstance(error, OSError) and error.errno in _NO_PROGRAM and error.filename == python:
            raise InterpreterError(f"{python} cannot be started: {error.strerror}", NAME_ONE) from error
        raise
    worker = Worker(process, reader, python)
    try:
        os.close(writer)
        worker.send({**request, "event_fd": writer, "parent_pid": os.getpid()})
        yield worker
    finally:
        worker.end()


class Worker:
    """One running child and the pipe that it reports on."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, python: str) -> None:
        self._process = process
        self._reader = reader
        self._python = python
        self._started_s = time.monotonic()
        self.is_ready = False
        """Set once it has reported that it is a Python with this enginecache, and has its request."""

    def send(self, request: dict[str, Any]) -> None:
        """Write the request. Its pipe stays open: end-of-file would mean that this process died."""
        line = json.dumps(request).encode() + b"\n"
        # A child that died at once leaves a broken pipe; what killed it is found out by wait().
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._stdin.fileno(), line) :]

    @property
    def _stdin(self) -> IO[bytes]:
        if self._process.stdin is None:
            raise RuntimeError("the worker was started without a pipe")
        return self._process.stdin

    def reports(self) -> Iterator[dict[str, Any] | None]:
        """Yield its reports until its pipe or the process ends; None for every half second of silence.

        Not until end-of-file alone: a process that this one forks meanwhile without exec keeps a copy of the pipe's
        other end. ``poll`` and not ``select``, which fails on descriptors of 1024 and above.

        Raises:
            InterpreterError: It has another enginecache, does not report itself, or writes what is no report.
        """
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        rest = b""
        while True:
            is_over = self._process.poll() is not None  # asked first: what it wrote before its end is then all there
            if poll.poll(0 if is_over else POLL_S * 1000):
                part = os.read(self._reader, 1 << 16)
                if not part:
                    return
                *lines, rest = (rest + part).split(b"\n")
                for report in map(self._report_in, lines):
                    if report["event"] == READY:
                        self._accept(report.get("enginecache"))
                    else:
                        yield report
            elif is_over:
                return
            elif not self.is_ready and time.monotonic() - self._started_s > START_TIMEOUT_S:
                raise InterpreterError(f"{self._python} has not run a child within {START_TIMEOUT_S:.0f} s", NAME_ONE)
            else:
                yield None

    def _report_in(self, line: bytes) -> dict[str, Any]:
        """Return the report in one line; a module that Python loads when it starts may write another."""
        with contextlib.suppress(ValueError, RecursionError):
            report = json.loads(line)
            if isinstance(report, dict) and "event" in report:
                return report
        shown = line[:_SHOWN_BYTES].decode(errors="backslashreplace")
        message = f"{self._python} wrote {shown!r} to a file descriptor that is not its own, where reports are expected"
        raise InterpreterError(
            message, f"Look at what it loads when it starts (sitecustomize, .pth files), or change it. {NAME_ONE}"
        )

    def _accept(self, version: object) -> None:
        if version != VERSION:
            message = f"{self._python} has enginecache {version}, and this process has {VERSION}"
            raise InterpreterError(message, f"Install the same version for both. {NAME_ONE}")
        self.is_ready = True

    def cpu_ticks(self) -> int:
        """Return how much computing all its threads have done, in ticks of the clock; 0 once it has ended."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return 0
        user, system = text.rpartition(")")[2].split()[11:13]  # the name before it may hold anything
        return int(user) + int(system)

    def not_ready(self, status: int, tail: Sequence[str]) -> InterpreterError | None:
        """Return the error for a child that ended before it reported itself; None if it did, or if others ended it.

        Args:
            status: As :meth:`wait` gives it.
            tail: The last lines of its log.
        """
        if self.is_ready or is_from_outside(status, tail):
            return None
        if status == PARENT_GONE:
            message = f"{self._python} starts Python as a process of its own"
            return InterpreterError(message, "Name the interpreter itself, or let the script start it with `exec`.")
        why = f": {tail[-1].strip()}" if tail else ""
        message = f"{self._python} is not a Python that can run enginecache: it ended {describe_status(status)}{why}"
        return InterpreterError(message, NAME_ONE)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end and return its status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        return self._process.wait(timeout_s)

    def end(self) -> None:
        """Kill what still runs of its session, reap it, close the pipes. Safe to call twice."""
        if self._process.poll() is None:
            # Not yet reaped, so the number is still this child's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdin.close()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1


def is_from_outside(status: int, tail: Sequence[str]) -> bool:
    """Return whether a child that ended without a result was killed, or lacked memory or threads: not by its own work.

    Args:
        status: As :meth:`Worker.wait` gives it.
        tail: The last lines of its log.
    """
    return is_out_of_memory(tail) or is_out_of_threads(tail) or (status < 0 and -status not in _CRASHES)


def is_out_of_memory(tail: Sequence[str]) -> bool:
    """Return whether the last lines of a log say that memory ran out."""
    return any(map(is_about_memory, tail))


def is_out_of_threads(tail: Sequence[str]) -> bool:
    """Return whether the last lines of a log say that no thread could be started."""
    return any(map(is_about_threads, tail))


def memory_limit_bytes() -> int | None:
    """Return how much address space a child may use, None for any: without it native code crashes without saying so."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def describe_status(status: int) -> str:
    """Return how a process ended, as in "it ended ...": ``by SIGSEGV`` or ``with status 1``."""
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"by signal {-status}"


def tail_of(log: IO[bytes]) -> list[str]:
    """Return the last lines of an open log, without its empty ones; reads a few KiB from its end."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
    text = log.read(TAIL_BYTES).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]


# The child's side


def receive_request() -> tuple[dict[str, Any], Reports]:
    """Read the request, and end this process from then on when its parent has died."""
    request = json.loads(_read_line(STDIN))
    if os.getppid() != request["parent_pid"]:
        os._exit(PARENT_GONE)  # dead already, or this process was started by another than the one that is to watch it
    os.set_inheritable(request["event_fd"], False)  # noqa: FBT003  # positional-only
    threading.Thread(target=_watch_parent, args=(request["parent_pid"],), daemon=True).start()
    reports = Reports(request["event_fd"])
    reports.send({"event": READY, "enginecache": VERSION})
    return request, reports


def _read_line(descriptor: int) -> bytes:
    """Return one line, without a buffer that would read on: what follows belongs to the watching thread."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(descriptor, 1 << 16)
        if not part:
            os._exit(PARENT_GONE)
        line += part
    return line


def _watch_parent(parent_pid: int) -> None:
    """End the process when the parent has died, also during a long native call (TensorRT releases the GIL there).

    End-of-file shows it at once. A sibling that the parent forked without exec (multiprocessing, a pre-forking server)
    may hold the pipe's other end, so the parent's number is looked at as well, every second.
    """
    poll = select.poll()
    poll.register(STDIN, select.POLLIN)
    while os.getppid() == parent_pid:
        if poll.poll(PARENT_CHECK_S * 1000) and not os.read(STDIN, 1 << 16):
            break
    os._exit(PARENT_GONE)


class Reports:
    """The child's way to its parent: whole lines. Safe from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, report: dict[str, Any]) -> None:
        """Write one line. Never raises: it is called from TensorRT's callbacks, which cannot pass an exception on."""
        line = json.dumps(report).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                os._exit(PARENT_GONE)


def end_process(status: int) -> None:
    """End this process without destructors: a crash in a native one would turn a result into a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
