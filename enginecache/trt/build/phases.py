"""TensorRT's nested build phases as one phase and its steps: the innermost that counts more than one.

The steps say nothing of time, and the number of phases is not known before the end, so there is no fraction of a whole
build. Those of the innermost phase move while TensorRT works.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

REPORT_INTERVAL_S = 0.1
REPORTS_PER_PHASE = 100
"""A report with each new phase, every 0.1 s, and every hundredth of a phase. Time alone would leave an old step shown:
of the 6,358 callbacks of light_densenet121 nearly all come in the first 0.5 s, with 6 s of silence after them
(TensorRT-RTX 1.7.1, 2026-11)."""

Report = Callable[[str, "int | None", "int | None"], None]
"""Called with a phase's name, the step of it that runs (from 1), and how many it has; None where it does not count."""


class PhaseReporter:
    """Follows the phases by their events and reports the innermost that counts, now and then.

    Safe from several threads: TensorRT may call a progress monitor from any.
    """

    def __init__(self, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._running: dict[str, tuple[int, int]] = {}
        """Steps done and steps in all of the running phases, in the order in which they began."""
        self._lock = threading.Lock()
        self._last = ("", 0, float("-inf"))

    def start(self, name: str, step_count: int) -> None:
        """Take notice that a phase begins, inside those that run."""
        with self._lock:
            self._running[name] = (0, step_count)
            self._send()

    def complete_step(self, name: str, step: int) -> None:
        """Take notice that step ``step`` (from 0) of a phase is done."""
        with self._lock:
            done, count = self._running.get(name, (0, 0))
            if count:
                self._running[name] = (max(done, step + 1), count)
                self._send()

    def finish(self, name: str) -> None:
        """Take notice that a phase ends, with all its steps or before."""
        with self._lock:
            self._running.pop(name, None)
            self._send()

    def _send(self) -> None:
        counting = [name for name, (_, count) in self._running.items() if count > 1]
        if not self._running:
            return
        name = (counting or list(self._running))[-1]
        done, count = self._running[name]
        phase, reported, then = self._last
        now = self._clock()
        if name != phase or (done - reported) * REPORTS_PER_PHASE >= count or now - then >= REPORT_INTERVAL_S:
            self._last = (name, done, now)
            self._report(name, *((min(done + 1, count), count) if counting else (None, None)))


def make_monitor(trt: Any, reporter: PhaseReporter) -> Any:
    """Return an ``IProgressMonitor`` of the module ``trt``; only for a release that has one (10.0 and later)."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            reporter.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            reporter.complete_step(phase_name, step)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            reporter.finish(phase_name)

    return Monitor()
