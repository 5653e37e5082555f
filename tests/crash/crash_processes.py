"""Processes to be killed: the command line in the middle of a real build, and what there is to see of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from waiting import LIMIT_S, wait_for


def environment(folder: Path) -> dict[str, str]:
    """This process's variables, with the cache in ``folder``."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("ENGINECACHE_")}
    return found | {"ENGINECACHE_DIR": str(folder), "XDG_CONFIG_HOME": str(folder / "no-settings")}


def start(*arguments: str | Path, folder: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, which SIGINT interrupts even where this one ignores it."""
    command = [sys.executable, "-m", "enginecache", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    process = start(*arguments, folder=folder)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def children(pid: int) -> list[int]:
    """Child processes of ``pid``, of all its threads."""
    lines = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for line in lines for child in line.split()]


class Building:
    """``enginecache get`` in a process of its own, when its builder has begun. Use as a context manager.

    Attributes:
        process: The command line.
        worker: Number of the builder's process.
        log: The builder's log.
    """

    def __init__(self, *arguments: str | Path, folder: Path) -> None:
        self.process = start("get", *arguments, folder=folder)
        known = set((folder / "logs").glob("*.log"))

        def begun() -> Path | None:
            assert self.process.poll() is None, self.process.communicate()
            logs = set((folder / "logs").glob("*.log")) - known
            return next((log for log in logs if "library" in log.read_text()), None)

        try:
            self.log = wait_for(begun)
            (self.worker,) = children(self.process.pid)
        except BaseException:
            self.process.kill()
            self.process.communicate()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def signal(self, number: int) -> None:
        """Send a signal to the command line."""
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error, when it has ended by itself."""
        output, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, output, errors
