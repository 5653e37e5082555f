"""Progress of a build: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from enginecache.cli.output import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from typing_extensions import Self

    from enginecache.storage.locks import Waiting
    from enginecache.trt.build.request import BuildProgress

LINE_EVERY_S = 10.0


class BuildDisplay:
    """Shows waiting and building on standard error. Use as a context manager.

    Args:
        name: The model's name.
        is_quiet: Show nothing.
    """

    def __init__(self, name: str, *, is_quiet: bool = False) -> None:
        self._name = name
        self._is_quiet = is_quiet
        self._said_at = float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, step: BuildProgress) -> None:
        """Show a step of the build."""
        if self._is_quiet:
            return
        if sys.stderr.isatty():
            self._move_bar(step)
        elif self._is_time():
            count = "" if step.step is None else f", step {step.step} of {step.step_count}"
            say(f"building {self._name}: {step.phase}{count}, {step.elapsed_seconds:.0f} s")

    def waiting(self, wait: Waiting) -> None:
        """Show that another process builds."""
        if not self._is_quiet and self._is_time():
            from enginecache.storage.locks import describe_age, describe_holder

            who = describe_holder(wait.holder)
            what = f"be done with {wait.device}" if wait.device else f"build {self._name}"
            say(f"waiting for {who} to {what}{describe_age(wait.holder)}: {wait.waited_seconds:.0f} s so far")

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._said_at < LINE_EVERY_S:
            return False
        self._said_at = now
        return True

    def _move_bar(self, step: BuildProgress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"building {self._name}", total=None)
            self._bar.start()
        if self._task is not None:
            # The bar is that of the phase; it moves to and fro where nothing is counted.
            done = 0 if step.step is None else step.step - 1
            self._bar.update(self._task, total=step.step_count, completed=done, description=step.phase)
