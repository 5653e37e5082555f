"""Faults at system calls: which calls an operation makes that change the file system, and how each is made to fail.

strace counts the calls of each name from the moment it is attached, wherever they go; so a first run, without faults,
says which of them go to the case's folder.

Source: strace(1), "Tampering", version 6.1.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waiting import LIMIT_S

SERVER = Path(__file__).with_name("crash_server.py")
SUPPORT = Path(__file__).parents[1] / "support"

SPACE_CALLS = ("write", "pwrite64", "writev", "pwritev", "mkdir", "mkdirat", "mknod", "mknodat", "fallocate", "symlink")
"""Calls that need room: all of them fail on a full disk, and deleting still works."""
NAME_CALLS = ("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir")
STATUS_CALLS = ("ftruncate", "truncate", "chmod", "fchmod", "fchmodat", "utimensat")
SYNC_CALLS = ("fsync", "fdatasync", "sync_file_range")
CALLS = (*SPACE_CALLS, *NAME_CALLS, *STATUS_CALLS, *SYNC_CALLS, "openat")

LASTING = {
    "ENOSPC": (*SPACE_CALLS, *SYNC_CALLS),
    "EIO": (*SPACE_CALLS, *NAME_CALLS, *STATUS_CALLS, *SYNC_CALLS),
    "EROFS": (*SPACE_CALLS, *NAME_CALLS, *STATUS_CALLS),
}
"""Calls that keep failing if a fault is permanent. Not ``openat``: Python's modules could not be read either."""

_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_RESULT = re.compile(r"\) += (-?\d+|\?)")
_OPENS_FOR_WRITING = re.compile(r"O_(CREAT|WRONLY|RDWR)")
_RANDOM = re.compile(r"[0-9a-f]{12,}|-[a-z0-9_]{8}\b|\d{5,}")


@dataclass(frozen=True)
class Call:
    """One call that strace saw.

    Attributes:
        name: The system call.
        number: It is the thread's so-manieth of that name, from 1.
        place: What it is done to, without what is random in names; empty outside the case's folder.
        before: How many calls of each name the thread had made.
    """

    name: str
    number: int
    place: str
    before: dict[str, int]


@dataclass(frozen=True)
class Fault:
    """Fault at a call.

    Attributes:
        what: ``KILL``, or the error's name.
        is_lasting: Whether everything of the kind fails from then on.
    """

    what: str
    is_lasting: bool = False

    def __str__(self) -> str:
        return f"{self.what} for good" if self.is_lasting else self.what

    def options(self, call: Call) -> list[str]:
        """For strace."""
        if self.what == "KILL":
            return [f"--inject={call.name}:signal=KILL:when={call.number}"]
        chosen = {call.name: f"{call.number}"}
        if self.is_lasting:
            chosen |= {name: f"{call.before.get(name, 0) + 1}+" for name in LASTING[self.what]}
        return [f"--inject={name}:error={self.what}:when={when}" for name, when in chosen.items()]


FAULTS = (
    Fault("KILL"),
    *(Fault(error, is_lasting) for error in LASTING for is_lasting in (False, True)),
)


@dataclass(frozen=True)
class Ended:
    """Result of one case.

    Attributes:
        status: Exit status, or the negative of the signal.
        said: ``done``, or the error, for each time that the operation was done.
        stderr: What it wrote there.
        calls: All that strace saw of the main thread.
    """

    status: int
    said: tuple[str, ...]
    stderr: str
    calls: tuple[Call, ...]

    @property
    def is_acknowledged(self) -> bool:
        return self.said[-1:] == ("done",)


class Tracer:
    """Runs operations under strace. Use as a context manager.

    Attributes:
        folder: A folder in memory where there is one: a case costs a third of what it does on a disk.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="enginecache-crash-", dir=memory if memory.is_dir() else None))
        path = {"PYTHONPATH": ":".join([str(SUPPORT), *sys.path]), "PYTHONHASHSEED": "0"}
        self._server = subprocess.Popen(
            [sys.executable, SERVER],
            env={**_environment(), **path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(LIMIT_S)
        self._server.stdout.close()
        shutil.rmtree(self.folder)

    def warm(self, operation: str, case: Path) -> None:
        """Do an operation without strace, in the process that the later ones are forked from."""
        self._ask(operation=operation, folder=str(case))

    def _ask(self, **asked: Any) -> dict[str, Any]:
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def run(self, operation: str, case: Path, options: Sequence[str] = (), *, again: bool = False) -> Ended:
        """Do an operation in the folder ``case``, with strace's options."""
        log = self.folder / "log"
        options = [f"--trace={','.join(CALLS)}", *options]
        asked = {"operation": operation, "folder": str(case), "log": str(log), "options": options, "again": again}
        found = self._ask(**asked)
        if "attached" not in found["tracer"]:
            raise PermissionError(found["tracer"].strip())
        calls = tuple(_calls(log.read_text(errors="replace"), found["pid"], case))
        return Ended(found["status"], tuple(found["said"]), found["stderr"], calls)


def _environment() -> dict[str, str]:
    from crash_processes import environment

    return environment(Path("/nowhere"))


def _calls(log: str, pid: int, case: Path) -> Iterator[Call]:
    seen: Counter[str] = Counter()
    for line in log.splitlines():
        found = _CALL.match(line)
        if found is None or int(found[1]) != pid:
            continue
        name, rest = found[2], found[3]
        before = dict(seen)
        seen[name] += 1
        yield Call(name, seen[name], _place(name, rest, str(case)), before)


def _place(name: str, rest: str, case: str) -> str:
    result = _RESULT.search(rest)
    has_failed = result is not None and result[1].startswith("-") and "INJECTED" not in rest
    if case not in rest or has_failed or (name == "openat" and not _OPENS_FOR_WRITING.search(rest)):
        return ""
    path = re.split(r'[">]', rest[rest.index(case) + len(case) :], maxsplit=1)[0]
    return _RANDOM.sub("*", path) or "/"


def points(calls: Sequence[Call]) -> list[Call]:
    """The calls that change what is in the case's folder, or open a file there for it."""
    return [call for call in calls if call.place]
