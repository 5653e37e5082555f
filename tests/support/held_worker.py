"""The real builder's child process, which stops in the middle of TensorRT's build: ``python -m held_worker``.

A test can so act during a build however fast or slow the machine is. :func:`go_on` lets it finish.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "held_worker"
HELD = "held"
GO_ON = signal.SIGUSR1

COMMAND = (
    f"from enginecache.trt.build import process; process.WORKER = {NAME!r}; "
    "from enginecache.cli.fast_path import main; main()"
)
"""The command line, for ``python -c``, with builders that stop."""


@contextlib.contextmanager
def builders_that_stop() -> Iterator[None]:
    """Have this process start such builders."""
    from enginecache.trt.build import process as child

    genuine, child.WORKER = child.WORKER, NAME
    try:
        yield
    finally:
        child.WORKER = genuine


def held_workers(parent: int | None = None) -> list[int]:
    """Process numbers of a process's builders (default: of this process)."""
    found = []
    for path in Path(f"/proc/{parent or os.getpid()}/task").glob("*/children"):
        try:
            pids = path.read_text(encoding="ascii").split()
        except OSError:  # the thread has ended meanwhile
            continue
        found += [int(pid) for pid in pids if _is_held_worker(pid)]
    return found


def _is_held_worker(pid: str) -> bool:
    try:
        return NAME.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def is_held(worker: int) -> bool:
    """Return whether the builder has stopped."""
    try:
        return Path(f"/proc/{worker}/comm").read_text(encoding="ascii") == f"{HELD}\n"
    except OSError:
        return False


def go_on(worker: int) -> None:
    """Let a builder that has reported a step of TensorRT's finish."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, GO_ON)


class Held:
    """The worker's way to its parent, which stops it at the first step that TensorRT reports, once it has passed it on.

    Other threads run meanwhile: the one that watches the parent, too.
    """

    def __init__(self, reports: Any) -> None:
        self._reports = reports
        self._is_held = False

    def send(self, report: dict[str, Any]) -> None:
        self._reports.send(report)
        if report["event"] == "progress" and report["step"] is not None and not self._is_held:
            self._is_held = True
            Path("/proc/self/comm").write_text(HELD, encoding="ascii")  # the first thread's, and so the process's
            signal.sigwait([GO_ON])


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [GO_ON])  # before any other thread is started

    from enginecache.trt.build import worker

    receive = worker.receive_request

    def receive_request() -> tuple[dict[str, Any], Any]:
        request, reports = receive()
        return request, Held(reports)

    worker.receive_request = receive_request
    worker.main()


if __name__ == "__main__":
    main()
