"""What the processes of ``test_timing_herd`` do. Loads little: there are many of them.

TensorRT is not here to merge, so a timing cache is a JSON mapping of updates, and merging joins two.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from enginecache.pipeline import timing_caches
from enginecache.pipeline.timing_caches import TimingCaches, TimingSlot
from enginecache.storage.folder import Root
from enginecache.storage.locks import LocalKeyLocks

SLOT = TimingSlot("5" * 64, "tensorrt", None)  # type: ignore[arg-type]  # no GPU merges here


def join(_slot: TimingSlot, current: bytes, ours: bytes) -> bytes:
    return json.dumps(json.loads(current) | json.loads(ours)).encode()


def open_caches(folder: str | Path, merge=join) -> TimingCaches:
    root = Root.open(Path(folder))
    return TimingCaches(root, LocalKeyLocks(root), merge)


def work(folder: str, name: str, rounds: str) -> None:
    """In each round a build, which adds one update; says each update that was kept."""
    caches = open_caches(folder)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(rounds)):
        start = caches.begin(SLOT)
        update = f"{name}-{number}"
        time.sleep(random.Random(update).uniform(0, 0.01))  # a build
        updates = json.loads(start.data or b"{}") | {update: 1}
        if caches.keep(start, json.dumps(updates).encode()) == ():
            print(update, flush=True)


def work_and_die(folder: str, call: str, count: str) -> None:
    """Is killed at the ``count``-th call of a function of ``os``."""
    left = int(count)
    original = getattr(os, call)

    def called(*arguments):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, call, called)
    work(folder, "p", "1")


def merge_in_a_child(folder: str, merger: str) -> None:
    """Has another build keep one meanwhile, so that the child has to merge."""
    timing_caches.MERGER = merger
    caches = open_caches(folder, None)
    start = caches.begin(SLOT)
    caches.keep(start, b"{}")
    caches.keep(start, b'{"lost": 1}')


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
