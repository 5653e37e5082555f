"""Looking at processes, for the builders' tests."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
"""For a process of a test's own that imports enginecache from this checkout, installed or not."""


def children(pid=None):
    """Numbers of the child processes of ``pid`` (default: this process), zombies included."""
    pid = os.getpid() if pid is None else pid
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found.update(int(child) for child in (thread / "children").read_text().split())
    return found


def is_running(pid):
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def seconds_until_gone(pid, limit_s=10.0):
    """How long a process still lives; fails after ``limit_s``."""
    start = time.monotonic()
    while is_running(pid):
        assert time.monotonic() - start < limit_s, f"process {pid} still runs after {limit_s} s"
        time.sleep(0.02)
    return time.monotonic() - start
