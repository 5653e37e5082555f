"""Forks a child for each case, puts strace on it, lets it go, and says how it ended.

One warm parent, because a fresh Python needs 0.7 s for its imports and a fork 6 ms with strace attached (measured
2026-11). Reads one JSON object a line: what to do, in which folder, with which of strace's options.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  # loaded here once, and not by each child
from crash_folders import cache_in
from crash_operations import OPERATIONS

from enginecache.errors import EngineCacheError
from enginecache.files import digest
from enginecache.maintenance.inspect import StoredEngines

# What is installed is read from files whose number may change between two runs.
StoredEngines._usability = lambda _: lambda _: True
# What a crash leaves half made is open to nobody else.
os.umask(0o077)
# Buffers for plans of 4 KiB.
digest.BUFFER_BYTES = 64 << 10

LIMIT_S = 60
_SAID_BYTES = 64 << 10
_PR_SET_PTRACER = 0x59616D61
_ANYONE = ctypes.c_ulong(-1)


def serve() -> None:
    """Until the input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(**asked) if "log" in asked else warm(**asked)), flush=True)


def warm(operation: str, folder: str) -> dict[str, Any]:
    """Do it here, so that the children find the SQL compiled."""
    cache_in.cache_clear()
    OPERATIONS[operation].act(Path(folder))
    return {}


def run(operation: str, folder: str, log: str, options: list[str], *, again: bool) -> dict[str, Any]:
    """One case; how it ended, and what it said: ``done`` or an error for each time that it was done.

    Args:
        operation: Its name.
        folder: The folder that it works in.
        log: Where strace writes.
        options: What strace injects.
        again: Whether the same process does it once more after an error.
    """
    said = mmap.mmap(-1, _SAID_BYTES)
    waiting, gate = os.pipe()
    # Opened here: the child may make no call that strace would count, or not, as it comes to see it.
    errors = os.open(f"{log}.errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    pid = os.fork()
    if not pid:
        _child(operation, Path(folder), said, waiting, errors, again)
    os.close(waiting)
    os.close(errors)
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "0", "-o", log, *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    first = tracer.stderr.readline()
    os.write(gate, b"x" if "attached" in first else b"-")
    os.close(gate)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tracer.communicate()
    lines = said[:].rstrip(b"\0").decode().splitlines()
    return {"pid": pid, "status": status, "said": lines, "tracer": first, "stderr": Path(f"{log}.errors").read_text()}


def _child(operation: str, folder: Path, said: mmap.mmap, gate: int, errors: int, again: bool) -> None:
    # Where Yama allows tracing of descendants alone: strace is a sibling.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYONE, 0, 0, 0)
    # One processor: BLAKE3 starts no threads, whose calls strace would count apart.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.dup2(errors, 2)
    ctypes.CDLL(None).alarm(LIMIT_S)
    try:
        if os.read(gate, 1) == b"x":
            for _ in range(1 + again):
                # Memory that is shared, and no pipe: no system call of the harness is there to be failed.
                line = _attempt(operation, folder)
                said.write(line.encode() + b"\n")
                if line == "done":
                    break
    finally:
        os._exit(0)


def _attempt(operation: str, folder: Path) -> str:
    try:
        OPERATIONS[operation].act(folder)
    except EngineCacheError as error:
        return f"{type(error).__name__}: {error.what}".replace("\n", " ")
    except BaseException:  # noqa: BLE001  # the other process shows it
        return "bad: " + traceback.format_exc().replace("\n", " | ")
    return "done"


if __name__ == "__main__":
    serve()
