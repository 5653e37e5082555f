"""Looking at processes, for the builders' tests."""

from __future__ import annotations

import contextlib
import os
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
