"""Environment inputs of an answer: settings, packages, GPUs, and whether a change to them is detectable.

A key depends on the model's files and on this machine. An answer may be reused until one of these inputs looks
different, provided that every change makes a visible difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from enginecache.config import config_path
from enginecache.files.fingerprint import Fingerprint, has_kernel_times
from enginecache.host.evidence import gpu_things
from enginecache.host.toolchain import DPKG_STATUS

Things = list[tuple[str, str]]
"""Pairs of a kind of look and the thing's name; see :func:`enginecache.host.evidence.look`."""


def surroundings(root: Path) -> Things:
    """Return the things that a key depends on besides the request and the model, and the cache folder itself."""
    stats = [root, config_path() or root, DPKG_STATUS, *(folder or Path.cwd() for folder in sys.path)]
    marker = ("content", f"{root}/CACHEDIR.TAG")  # without it, or with that of a later format, the folder is refused
    return [*(("stat", path) for path in dict.fromkeys(map(str, stats))), marker, *gpu_things()]


def are_telling(things: Things, files: Iterable[str] = (), *, since_ns: int) -> bool:
    """Return whether the ``stat`` results are reliable: equal results mean equal content, and a change will show.

    Each existing file or folder must be older than the resolution of its times, on a file system whose ctime the kernel
    sets.

    Args:
        things: From :func:`surroundings`.
        files: Further files.
        since_ns: When the first of them was read, nanoseconds since the epoch.
    """
    kept: dict[tuple[int, int], bool] = {}
    for path in [*(thing for how, thing in things if how == "stat"), *files]:
        try:
            found = Fingerprint.of_path(path)
        except OSError:
            continue  # that it is missing is part of the snapshot too
        place = found.device, found.mount
        if place not in kept:
            kept[place] = has_kernel_times(found)
        if not found.is_settled(since_ns) or not kept[place]:
            return False
    return True
