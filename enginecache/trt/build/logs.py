"""The log of a build: every line goes to the file; errors and warnings are kept for the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TextIO

MAX_KEPT = 500
"""Lines kept in memory of each severity; the log has them all."""

MAX_SHOWN = 20
"""Warnings handed to the user; one detector gave several hundred that differed in a node's name alone."""


class BuildLog:
    """The build's log, and the lines of it that matter for the result.

    Safe from several threads: TensorRT may log from threads of its own, and each line is one ``write``.

    Attributes:
        errors: Lines of severity error and internal error, in order.
        warnings: Lines of severity warning, in order, without duplicates.
        refused_nodes: Names of the nodes at which the parser stopped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.refused_nodes: list[str] = []

    def write(self, letter: str, text: str) -> None:
        """Add one line; ``letter`` is its severity: F, E, W or I."""
        # TensorRT calls this in the middle of its work, and an exception would end the process. A full disk is
        # reported by what writes the plan.
        with contextlib.suppress(OSError):
            self._stream.write(f"[{letter}] {text}\n")
            self._stream.flush()
        if letter in "FE" and len(self.errors) < MAX_KEPT:
            self.errors.append(text)
        elif letter == "W" and len(self.warnings) < MAX_KEPT and text not in self.warnings:
            self.warnings.append(text)


def make_logger(trt: Any, log: BuildLog) -> Any:
    """Return an ``ILogger`` of the module ``trt`` that writes to ``log``.

    VERBOSE is dropped before any formatting: light_densenet121 logs 60,766 such lines and 23 others (TensorRT-RTX
    1.7.1, 2026-11). ``Logger(min_severity)`` would drop them in C++, but writes to standard output and keeps nothing.
    """
    initials = {
        trt.ILogger.INTERNAL_ERROR: "F",
        trt.ILogger.ERROR: "E",
        trt.ILogger.WARNING: "W",
        trt.ILogger.INFO: "I",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            # pybind11 refuses a subclass that does not call the base's __init__ by its own name.
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            letter = initials.get(severity)
            if letter is not None:
                log.write(letter, msg)

    return Logger()


def shown_warnings(warnings: Sequence[str]) -> tuple[str, ...]:
    """Return the warnings that fit a terminal, and how many more the log has."""
    if len(warnings) <= MAX_SHOWN:
        return tuple(warnings)
    return (*warnings[:MAX_SHOWN], f"... and {len(warnings) - MAX_SHOWN} more warnings in the builder's log")
