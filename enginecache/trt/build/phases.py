"""TensorRT's nested build phases as one fraction that never falls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REPORT_INTERVAL_S = 0.1
REPORT_STEP = 0.01
"""A report every 0.1 s or every hundredth. Time alone would leave a stale fraction standing: of the 6,358 callbacks of
light_densenet121 nearly all come in the first 0.5 s, with 6 s of silence after them (TensorRT-RTX 1.7.1, 2026-11)."""

Report = Callable[[str, float], None]
"""Called with the outermost phase's name and the fraction, 0 to 1."""


@dataclass
class _Phase:
    """One running phase: its share of the whole, from ``low`` to ``high``, and how far it got."""

    parent: _Phase | None
    low: float
    high: float
    step_count: int
    reached: float
    steps_done: int = 0

    @property
    def step_end(self) -> float:
        """Where the running step ends."""
        return self.low + (self.high - self.low) * min(self.steps_done + 1, self.step_count) / self.step_count

    def advance(self, to: float) -> None:
        """Move this phase, and those around it, forward; never back."""
        phase: _Phase | None = self
        while phase is not None:
            phase.reached = max(phase.reached, min(to, phase.high))
            phase = phase.parent


class PhaseTree:
    """Follows phases by their events.

    The fraction counts steps, not seconds: TensorRT says nothing of time. A phase inside another phase's step gets half
    of what is left of that step, because nothing says how many siblings will follow it in the same step; the step's own
    end takes the rest.

    Attributes:
        outermost: Name of the outermost running phase; empty before the first.
        fraction: From 0 to 1; never falls.
    """

    def __init__(self) -> None:
        self._running: dict[str, _Phase] = {}
        self.outermost = ""
        self.fraction = 0.0

    def start(self, name: str, parent: str | None, step_count: int) -> None:
        """A phase begins, inside the phase named ``parent`` where there is one."""
        around = self._running.get(parent) if parent is not None else None
        if around is None:
            self.outermost = name
            low, high = self.fraction, 1.0
        else:
            low = around.reached
            high = low + (around.step_end - low) / 2
        self._running[name] = _Phase(around, low, max(low, high), max(1, step_count), low)

    def complete_step(self, name: str, step: int) -> None:
        """Step ``step`` (from 0) of a phase is done."""
        phase = self._running.get(name)
        if phase is not None:
            end = phase.low + (phase.high - phase.low) * min(step + 1, phase.step_count) / phase.step_count
            phase.steps_done = max(phase.steps_done, step + 1)
            self._advance(phase, end)

    def finish(self, name: str) -> None:
        """A phase ends, with all its steps or before.

        The end of an outermost phase moves nothing: a build that fails ends its phases too.
        """
        phase = self._running.pop(name, None)
        if phase is not None and phase.parent is not None:
            self._advance(phase, phase.high)

    def complete(self) -> None:
        """The plan is there."""
        self.fraction = 1.0

    def _advance(self, phase: _Phase, to: float) -> None:
        phase.advance(to)
        self.fraction = max(self.fraction, min(to, 1.0))  # sums of shares may pass 1 by a rounding


class PhaseReporter:
    """Feeds a :class:`PhaseTree` and reports it, now and then.

    Safe from several threads: TensorRT may call a progress monitor from any.
    """

    def __init__(self, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._tree = PhaseTree()
        self._lock = threading.Lock()
        self._last = ("", 0.0, float("-inf"))

    def start(self, name: str, parent: str | None, step_count: int) -> None:
        """See :meth:`PhaseTree.start`."""
        with self._lock:
            self._tree.start(name, parent, step_count)
            self._tell()

    def complete_step(self, name: str, step: int) -> None:
        """See :meth:`PhaseTree.complete_step`."""
        with self._lock:
            self._tree.complete_step(name, step)
            self._tell()

    def finish(self, name: str) -> None:
        """See :meth:`PhaseTree.finish`."""
        with self._lock:
            self._tree.finish(name)
            self._tell()

    def complete(self) -> None:
        """See :meth:`PhaseTree.complete`; reported at once."""
        with self._lock:
            self._tree.complete()
            self._tell(at_once=True)

    def _tell(self, *, at_once: bool = False) -> None:
        phase, fraction, then = self._last
        now = self._clock()
        is_news = phase != self._tree.outermost or self._tree.fraction - fraction >= REPORT_STEP
        if at_once or is_news or now - then >= REPORT_INTERVAL_S:
            self._last = (self._tree.outermost, self._tree.fraction, now)
            self._report(self._tree.outermost, self._tree.fraction)


def make_monitor(trt: Any, reporter: PhaseReporter) -> Any:
    """An ``IProgressMonitor`` of the module ``trt``; only for a release that has one (10.0 and later)."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            reporter.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            reporter.complete_step(phase_name, step)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            reporter.finish(phase_name)

    return Monitor()
