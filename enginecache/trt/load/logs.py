"""TensorRT's lines while it loads a plan, and while engines run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, TextIO

from enginecache.trt.load.request import Failure, FailureKind

MAX_LINES = 100
"""Lines kept of one loading: a plan that is not one can make TensorRT repeat itself."""

_LOGGER = logging.getLogger("enginecache")


class Kept:
    """Errors and warnings of one loading, each line once."""

    def __init__(self) -> None:
        self._errors: dict[str, None] = {}
        self._warnings: dict[str, None] = {}

    def add(self, text: str, *, is_error: bool) -> None:
        """Keep a line."""
        lines = self._errors if is_error else self._warnings
        if len(lines) < MAX_LINES:
            lines[text] = None

    @property
    def lines(self) -> tuple[str, ...]:
        """Return all of them: TensorRT may call an error what it then works around."""
        return (*self._errors, *self._warnings)

    def failure(self, kind: FailureKind, what: str = "", diagnostics: tuple[str, ...] = ()) -> Failure:
        """Return a failure with the errors."""
        return Failure(kind, tuple(self._errors), diagnostics, what)


class LoadLog:
    """A runtime's log: lines go to the loading that is under way, else to Python's log.

    TensorRT logs from threads of its own, so only the time shows which loading a line belongs to. Engines log through
    their runtime's logger for as long as they run.

    Args:
        echo: Where each line is also written at once.
    """

    def __init__(self, echo: TextIO | None = None) -> None:
        self._echo = echo
        self._kept: Kept | None = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Kept]:
        """Keep the lines from here on. May be nested; one thread at a time."""
        outer, self._kept = self._kept, Kept()
        try:
            yield self._kept
        finally:
            self._kept = outer

    def write(self, text: str, *, is_error: bool) -> None:
        """Take a line. Safe from several threads."""
        kept = self._kept
        if self._echo is not None:
            print(text, file=self._echo, flush=True)
        if kept is not None:
            kept.add(text, is_error=is_error)
        else:
            _LOGGER.log(logging.ERROR if is_error else logging.WARNING, "TensorRT: %s", text)


def make_logger(trt: Any, log: LoadLog) -> Any:
    """Return an ``ILogger`` of the module ``trt`` that hands errors and warnings to ``log``.

    It must outlive every runtime and engine: TensorRT keeps the first one of a process forever.
    """
    is_error = {trt.ILogger.INTERNAL_ERROR: True, trt.ILogger.ERROR: True, trt.ILogger.WARNING: False}

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            # pybind11 refuses a subclass that does not call the base's __init__ by its own name.
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in is_error:
                log.write(msg.strip(), is_error=is_error[severity])

    return Logger()
