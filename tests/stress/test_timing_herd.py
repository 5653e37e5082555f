"""Many builds that keep one timing cache at once, some of them killed: what was kept is never lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from timing_processes import SLOT, open_caches
from waiting import LIMIT_S, wait_for

SCRIPT = Path(__file__).with_name("timing_processes.py")
PROCESSES = 8
ROUNDS = 6


def spawn(what: str, *arguments: str | Path, path: str | Path = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, what, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_herd(folder: Path, rounds: int) -> list[subprocess.Popen[str]]:
    """Processes that begin together."""
    herd = [spawn("work", folder, f"p{number}", str(rounds)) for number in range(PROCESSES)]
    for process in herd:
        assert process.stdout.readline() == "ready\n"
    for process in herd:
        process.stdin.write("go\n")
        process.stdin.flush()
    return herd


def kept_updates(folder: Path) -> set[str]:
    caches = open_caches(folder)
    assert list(caches._artefacts.check()) == []
    return set(json.loads(caches.begin(SLOT).data or b"{}"))


def test_no_update_of_concurrent_processes_is_lost(tmp_path):
    folder = tmp_path / "cache"
    herd = start_herd(folder, ROUNDS)
    said = [process.communicate(timeout=LIMIT_S)[0].split() for process in herd]
    assert [process.returncode for process in herd] == [0] * PROCESSES
    everything = {f"p{name}-{number}" for name in range(PROCESSES) for number in range(ROUNDS)}
    assert {update for updates in said for update in updates} == everything
    assert kept_updates(folder) == everything
    assert list((folder / "tmp").iterdir()) == []


def test_no_update_that_was_kept_is_lost_when_processes_are_killed(tmp_path):
    folder = tmp_path / "cache"
    herd = start_herd(folder, 1000)
    dice = random.Random(7)
    acknowledged = {process.stdout.readline().strip() for process in herd}
    for process in dice.sample(herd, PROCESSES):
        time.sleep(dice.uniform(0.02, 0.15))
        process.kill()
    assert len(acknowledged) == PROCESSES
    for process in herd:
        with process:  # not by communicate(), which passes over what readline() has taken from the pipe already
            acknowledged.update(process.stdout.read().split())
    assert {process.returncode for process in herd} == {-signal.SIGKILL}
    kept = kept_updates(folder)
    assert acknowledged <= kept
    assert len(kept - acknowledged) <= PROCESSES  # killed between keeping and saying so


@pytest.mark.parametrize(
    ("call", "count", "expected"),
    [
        ("fchmod", "1", {"old"}),  # the lock is held
        ("fsync", "1", {"old"}),  # the new bytes are written, and not durable
        ("fsync", "2", {"old", "p-0"}),  # the new file has its name
    ],
)
def test_who_is_killed_within_a_replacement_leaves_the_old_or_the_new_one(tmp_path, call, count, expected):
    folder = tmp_path / "cache"
    caches = open_caches(folder)
    caches.keep(caches.begin(SLOT), b'{"old": 1}')
    process = spawn("work_and_die", folder, call, count)
    said, _ = process.communicate("go\n", timeout=LIMIT_S)
    assert (process.returncode, said.split()) == (-signal.SIGKILL, ["ready"])
    assert kept_updates(folder) == expected
    start = caches.begin(SLOT)
    assert caches.keep(start, start.data[:-1] + b', "next": 1}') == ()
    assert kept_updates(folder) == {*expected, "next"}


def test_who_dies_while_tensorrt_merges_keeps_nobody_waiting(tmp_path):
    """The child of the dead process may go on for a while; it has no part of the lock."""
    folder, note = tmp_path / "cache", tmp_path / "note"
    merger = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    (tmp_path / "slow_merger.py").write_text(merger, encoding="utf-8")
    process = spawn("merge_in_a_child", folder, "slow_merger", path=tmp_path)
    wait_for(lambda: process.poll() is not None or (note.exists() and note.read_text()))
    assert process.poll() is None
    try:
        process.kill()
        process.communicate(timeout=LIMIT_S)
        caches = open_caches(folder)
        # A lock that it had would be a warning, after a while.
        assert caches.keep(caches.begin(SLOT), b'{"mine": 1}') == ()
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)
    assert kept_updates(folder) == {"mine"}
