"""Many processes that ask for one engine at once, forked from one that has loaded everything; and who watches them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waiting import LIMIT_S, is_running, wait_for

SCRIPT = Path(__file__)
SUPPORT = SCRIPT.parents[1] / "support"


class Herd:
    """Processes that each make one ``get``. Use as a context manager; nothing of it outlives the block.

    Args:
        script: A new folder, through which the builders receive commands.
        folder: The cache.
        model: What all ask for.
        asks: Further keywords of each request.

    Attributes:
        members: Their process numbers, in the order of ``asks``.
    """

    def __init__(self, script: Path, folder: Path, model: Path, asks: Sequence[dict[str, Any]]) -> None:
        (script / "builds").mkdir(parents=True)
        (script / "results").mkdir()
        (script / "waiting").mkdir()
        self._script = script
        self._parent = subprocess.Popen(
            [sys.executable, SCRIPT, script, folder, model, json.dumps(asks)],
            env=os.environ | {"HERD": str(script), "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.members: list[int] = []

    def __enter__(self):
        self.members = json.loads(self._line())
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self.members, *(pid for build in self.builds() for pid in build)):
            if pid in self.members or is_running(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._parent.kill()
        self._parent.communicate()

    def _line(self) -> str:
        line = self._parent.stdout.readline()
        assert line, f"the herd ended with status {self._parent.wait()}"
        return line

    def start(self) -> None:
        """Let all of them ask, at once."""
        self._parent.stdin.write("start\n")
        self._parent.stdin.flush()

    def let_build(self) -> None:
        """Let builders go on to their end; until then they wait in the middle."""
        (self._script / "go").touch()

    def refuse(self) -> None:
        """Let builders end with TensorRT's refusal."""
        (self._script / "refuse").touch()

    def builds(self) -> list[tuple[int, int]]:
        """The builders that have begun, first to last: their process, and the member that waits for it."""
        paths = sorted((self._script / "builds").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
        return [tuple(json.loads(path.read_text(encoding="ascii"))) for path in paths]

    def new_build(self, known: int) -> tuple[int, int]:
        """The builder that begins after so many others."""
        return wait_for(lambda: self.builds()[known:])[0]

    def waiters(self, count: int) -> list[int]:
        """So many members that wait for a builder, when there are as many."""
        found = wait_for(lambda: len(paths := list((self._script / "waiting").iterdir())) >= count and paths)
        return sorted(int(path.name) for path in found)

    def end(self, limit_s: float = LIMIT_S) -> list[dict[str, Any] | None]:
        """Return the result of each member, in their order, when all have ended; None for one that was killed."""
        output, _ = self._parent.communicate(timeout=limit_s)
        assert self._parent.returncode == 0
        ended = dict(json.loads(output))
        assert sorted(ended) == sorted(self.members)
        return [self._result(pid, ended[pid]) for pid in self.members]

    def _result(self, pid: int, status: int) -> dict[str, Any] | None:
        path = self._script / "results" / str(pid)
        if not path.exists():
            assert status == -signal.SIGKILL, status
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def assert_no_orphan(self) -> None:
        """No builder is left, a moment after all members have ended."""
        wait_for(lambda: not any(is_running(worker) for worker, _ in self.builds()))


# The herd itself


def main(script: str, folder: str, model: str, asks: str) -> None:
    from fakes import fake_place

    from enginecache.cache import EngineCache
    from enginecache.config import Config
    from enginecache.trt.build import process as child

    child.WORKER = "scripted_worker"
    cache = EngineCache(Config(dir=Path(folder), pass_environment=("HERD",)), place=fake_place)
    cache.explain(model, dims={"batch": (1, 2, 4)})  # so that all is loaded
    begin, go = os.pipe()
    members = [_fork(cache, Path(script), model, ask, (begin, go)) for ask in json.loads(asks)]
    print(json.dumps(members), flush=True)
    sys.stdin.readline()
    os.close(go)
    ended = [os.wait() for _ in members]
    print(json.dumps([(pid, os.waitstatus_to_exitcode(status)) for pid, status in ended]))


def _fork(cache: Any, script: Path, model: str, ask: dict[str, Any], together: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        begin, go = together
        os.close(go)
        os.read(begin, 1)
        started = time.monotonic()
        mark = script / "waiting" / str(os.getpid())
        result = _get(cache, model, {**ask, "waiting": lambda _: mark.touch()})
        result["seconds"] = time.monotonic() - started
        (script / "results" / str(os.getpid())).write_text(json.dumps(result), encoding="utf-8")
    finally:
        os._exit(0)


def _get(cache: Any, model: str, ask: dict[str, Any]) -> dict[str, Any]:
    try:
        entry = cache.get(model, dims={"batch": (1, 2, 4)}, **ask)
    except BaseException as error:  # noqa: BLE001  # the test looks at it
        return {"outcome": type(error).__name__, "text": str(error)}
    return {"outcome": entry.outcome, "path": str(entry.path)}


if __name__ == "__main__":
    main(*sys.argv[1:])
