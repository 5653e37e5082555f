"""Builds in a child process, so that a crash of TensorRT is an error of one build and not the end of the caller."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from enginecache.builders.base import BuildProgress, BuildRequest, BuiltPlan, ProgressCallback
from enginecache.builders.wire import MODEL_NAME, PLAN_NAME, decode_error, encode_request
from enginecache.devices import Device
from enginecache.errors import BuilderCrashError, BuilderKilledError, BuildError, StoreError
from enginecache.targets import ComputeCapability

WORKER = "enginecache.builders.worker"
POLL_S = 0.5
EXIT_GRACE_S = 10.0
TAIL_LINES = 20
TAIL_BYTES = 8192

_KILLS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU}
"""Signals that come from outside; the others are the builder's own fault."""

_OUT_OF_MEMORY = ("bad_alloc", "MemoryError", "Cannot allocate memory", "failed to map segment")


class ProcessBuilder:
    """A :class:`~enginecache.builders.base.Builder` that runs each build in a process of its own.

    Safe to call from several threads at once, and from several processes. A build ends with its parent: when the parent
    dies, the child does too, within about a second. The child is in a session of its own, so that Ctrl-C reaches the
    parent alone, which then kills the child.

    Args:
        python: The interpreter itself, no script that starts one; default: this one.
        search_path: Where the child looks for modules; default: where this process does, without its current folder.
    """

    def __init__(self, python: str | None = None, search_path: Sequence[str] | None = None) -> None:
        self._python = python or sys.executable
        self._search_path = search_path

    def build(self, request: BuildRequest, progress: ProgressCallback | None = None) -> BuiltPlan:
        """Build the plan; see :meth:`enginecache.builders.base.Builder.build`.

        Any exception in ``progress``, and an interrupt here, kills the child and waits for its end before it goes on.

        Raises:
            StoreError: The log or the model's bytes cannot be written, or the disk is full.
        """
        with _spawned(request, self._python, self._environment(request)) as child:
            return child.listen(request, progress)

    def _environment(self, request: BuildRequest) -> dict[str, str]:
        environment = dict(os.environ)
        path = module_search_path() if self._search_path is None else list(self._search_path)
        environment["PYTHONPATH"] = os.pathsep.join(path)
        if request.device is not None:
            # The chosen GPU is device 0 there: TensorRT's builder takes the current device, and has no other switch.
            environment["CUDA_VISIBLE_DEVICES"] = _only(request.device, environment.get("CUDA_VISIBLE_DEVICES"))
        return environment


def _only(device: Device, visible: str | None) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` must be for the device to be the only one.

    Args:
        device: Its UUID is empty where NVML is missing; then its ordinal tells.
        visible: The variable as it is here, which that ordinal counts in.
    """
    if device.uuid:
        return device.uuid
    return str(device.ordinal) if visible is None else visible.split(",")[device.ordinal].strip()


def module_search_path() -> list[str]:
    """This process's ``sys.path`` for a child, in its order, so that both find the same TensorRT and enginecache.

    Without the current folder, which ``python -m`` and ``python -c`` put in front: a ``tensorrt.py`` that lies beside a
    model must not be run. It stays where PYTHONPATH names it, or where enginecache itself is imported from it.
    """
    package_root = str(Path(__file__).absolute().parent.parent.parent)
    named = {_absolute(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = _absolute("")
    path = [_absolute(entry) for entry in sys.path if entry]
    path = [entry for entry in path if entry != here or entry in named or entry == package_root]
    return path if package_root in path else [package_root, *path]


def _absolute(entry: str) -> str:
    """An entry of a search path, absolute; as it is where the current folder has been removed."""
    try:
        return os.path.abspath(entry)  # noqa: PTH100  # Path.resolve would follow links, and the entries must match
    except FileNotFoundError:
        return entry


@contextlib.contextmanager
def _spawned(request: BuildRequest, python: str, environment: dict[str, str]) -> Iterator[_Child]:
    """A running worker that has its request; dead and reaped afterwards, whatever happens."""
    try:
        log = _create(request.log_path)
        if request.source.data is not None:
            with _create(request.work_dir / MODEL_NAME) as file:
                file.write(request.source.data)
    except OSError as error:
        message = f"the build's files cannot be written: {error}"
        raise StoreError(message, "Free space, or check the cache's folder with `enginecache doctor`.") from error
    reader, writer = os.pipe()
    started_s = time.monotonic()
    try:
        with log:
            process = subprocess.Popen(
                [python, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                # `python -m` puts this folder first in the child's search path; it holds no module.
                cwd=request.work_dir,
                env=environment,
                pass_fds=(writer,),
                close_fds=True,
                start_new_session=True,
            )
    except OSError as error:
        os.close(reader)
        os.close(writer)
        message = f"the builder process cannot be started: {error}"
        raise BuildError(message, f"Is {python} an interpreter that may be run?", str(request.log_path)) from error
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    child = _Child(process, reader, started_s)
    try:
        os.close(writer)
        child.send(encode_request(request, writer, os.getpid()))
        yield child
    finally:
        child.end()


def _create(path: Path) -> IO[bytes]:
    """A new file that only this user may read, opened for appending."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


class _Child:
    """One running worker and the pipe that it reports on."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, started_s: float) -> None:
        self._process = process
        self._reader = reader
        self._started_s = started_s

    def send(self, line: bytes) -> None:
        """Write the request. Its pipe stays open: end-of-file would mean that this process died."""
        # A child that died at once leaves a broken pipe; what killed it is found out by listen().
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._stdin.fileno(), line) :]

    @property
    def _stdin(self) -> IO[bytes]:
        if self._process.stdin is None:
            raise RuntimeError("the worker was started without a pipe")
        return self._process.stdin

    def listen(self, request: BuildRequest, progress: ProgressCallback | None) -> BuiltPlan:
        """Pass progress on until the result is there; raises the worker's error.

        In silence the last step is said again with the time that has passed: TensorRT tries tactics for minutes
        without a word.
        """
        phase: str = "Starting"
        fraction: float | None = None
        for line in self._lines():
            if line is not None:
                record = json.loads(line)
                if record["event"] == "done":
                    return self._plan(request, record)
                if record["event"] == "error":
                    raise decode_error(record, request.log_path)
                phase, fraction = record["phase"], record["fraction"]
            if progress is not None:
                progress(BuildProgress(phase, fraction, self._elapsed_s()))
        raise _death(self._process.wait(), request.log_path)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _lines(self) -> Iterator[bytes | None]:
        """Whole lines, until the pipe or the process ends; None for every half second of silence.

        Not until end-of-file alone: a process that this one forks meanwhile without exec keeps a copy of the pipe's
        other end. ``poll`` and not ``select``, which fails on descriptors of 1024 and above.
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
                yield from lines
            elif is_over:
                return
            else:
                yield None

    def _plan(self, request: BuildRequest, record: dict[str, Any]) -> BuiltPlan:
        build_seconds = self._elapsed_s()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_GRACE_S)  # so that nobody holds a writable descriptor of the plan
        return BuiltPlan(
            plan_path=request.work_dir / PLAN_NAME,
            build_seconds=build_seconds,
            compute_capabilities=tuple(ComputeCapability(*numbers) for numbers in record["compute_capabilities"]),
            loaded_version=record["loaded_version"],
            warnings=tuple(record["warnings"]),
        )

    def end(self) -> None:
        """Kill what still runs of the child's session, reap it, close the pipes. Safe to call twice."""
        if self._process.poll() is None:
            # Not yet reaped, so the number is still this child's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdin.close()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1


def _death(status: int, log_path: Path) -> BuilderCrashError:
    """The error for a worker that ended without a result."""
    tail = log_tail(log_path)
    last = "\n".join(["The log's last lines:", *(f"  {line}" for line in tail)]) if tail else "The log is empty."
    if any(word in line for line in tail for word in _OUT_OF_MEMORY):
        advice = "Free memory, or raise the container's limit, and try again."
        return BuilderKilledError("the builder ran out of memory and died", f"{advice}\n{last}", str(log_path))
    if status >= 0:
        advice = "The log says more; `enginecache doctor` checks the installation."
        message = f"the builder process ended with status {status} and no result"
        return BuilderCrashError(message, f"{advice}\n{last}", str(log_path))
    number = signal.Signals(-status)
    if number == signal.SIGKILL:
        advice = (
            "Look in the kernel's log and at the container's memory limit; give the build more memory and try again."
        )
        return BuilderKilledError(
            "the builder was killed (SIGKILL): out of memory?", f"{advice}\n{last}", str(log_path)
        )
    if number in _KILLS:
        advice = "Something outside ended it; run it again."
        return BuilderKilledError(f"the builder was ended by {number.name}", f"{advice}\n{last}", str(log_path))
    advice = "TensorRT crashed on this model: try another release of it, or fold the model's constants first."
    return BuilderCrashError(f"the builder crashed with {number.name}", f"{advice}\n{last}", str(log_path))


def log_tail(path: Path) -> list[str]:
    """The last lines of a log, without its empty ones; reads a few KiB from its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]
