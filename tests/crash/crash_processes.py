"""Processes to be killed: the command line in the middle of a real build, and what there is to see of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import held_worker
from held_worker import go_on, held_workers, is_held
from waiting import LIMIT_S, wait_for

SEARCH_PATH = {"PYTHONPATH": os.pathsep.join([str(Path(held_worker.__file__).parent), *sys.path])}


def environment(folder: Path) -> dict[str, str]:
    """This process's variables, with the cache in ``folder``."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("ENGINECACHE_")}
    return found | {"ENGINECACHE_DIR": str(folder), "XDG_CONFIG_HOME": str(folder / "no-settings")}


def start(*arguments: str | Path, folder: Path, is_held: bool = False) -> subprocess.Popen[str]:
    """The command line in a process of its own, which SIGINT interrupts even where this one ignores it.

    Args:
        arguments: The command line's.
        folder: The cache.
        is_held: Whether a builder stops in the middle of its build, see :mod:`held_worker`.
    """
    program = ["-c", held_worker.COMMAND] if is_held else ["-m", "enginecache"]
    command = [sys.executable, *program, *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            env=environment(folder) | (SEARCH_PATH if is_held else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    process = start(*arguments, folder=folder)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class Building:
    """``enginecache get`` in a process of its own, whose builder has stopped in the middle. Use as a context manager.

    Attributes:
        process: The command line.
        worker: Number of the builder's process.
        log: The builder's log.
    """

    def __init__(self, *arguments: str | Path, folder: Path) -> None:
        self.process = start("get", *arguments, folder=folder, is_held=True)
        known = set((folder / "logs").glob("*.log"))

        def begun() -> Path | None:
            assert self.process.poll() is None, self.process.communicate()
            logs = set((folder / "logs").glob("*.log")) - known
            workers = held_workers(self.process.pid)
            return next(iter(logs), None) if any(map(is_held, workers)) else None

        try:
            self.log = wait_for(begun)
            (self.worker,) = held_workers(self.process.pid)
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

    def go_on(self) -> None:
        """Let the builder finish."""
        go_on(self.worker)

    def end(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error, when it has ended by itself."""
        output, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, output, errors
