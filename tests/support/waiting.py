"""Wait for other threads and processes, with a limit that only a hang reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

LIMIT_S = 120.0
"""Longer than anything takes, on a busy machine and under coverage too. A guard, and never what a test is about."""

Found = TypeVar("Found")


def wait_for(find: Callable[[], Found], limit_s: float = LIMIT_S) -> Found:
    """The first true value that ``find`` gives."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = find()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"nothing was found within {limit_s} s")


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
