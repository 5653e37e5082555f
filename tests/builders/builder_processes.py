"""Looking at processes, for the builders' tests."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from enginecache.trt.build.process import ProcessBuilder

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


@contextlib.contextmanager
def modules_first(folder):
    """Let children find the modules of a folder before all others."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class BuilderWithModules(ProcessBuilder):
    """Builds in a child process that finds the modules of a folder before all others."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def build(self, request, progress=None):
        with modules_first(self.folder):
            return super().build(request, progress)
