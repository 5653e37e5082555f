"""What an answer rests on beside the request, and whether a change of it would be seen.

A key is made of the model's files and of what is here: settings, installed packages, GPUs. What was found out from
these may stand until one of them looks different, if a difference always shows.
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
"""How to look at each thing, and its name; see :func:`enginecache.host.evidence.look`."""


def surroundings(root: Path) -> Things:
    """What decides a key beside the request and the model, and the cache folder itself."""
    stats = [root, config_path() or root, DPKG_STATUS, *(folder or Path.cwd() for folder in sys.path)]
    marker = ("content", f"{root}/CACHEDIR.TAG")  # without it, or with that of a later format, the folder is refused
    return [*(("stat", path) for path in dict.fromkeys(map(str, stats))), marker, *gpu_things()]


def are_telling(things: Things, files: Iterable[str] = (), *, since_ns: int) -> bool:
    """Whether what ``stat`` says of each file or folder that is there stands for what it held, and will tell a change.

    Each must have been old enough for a change to move its times, on a file system that moves them.

    Args:
        things: What is looked at.
        files: Further files.
        since_ns: When the first of them was read, nanoseconds since the epoch.
    """
    kept: dict[tuple[int, int], bool] = {}
    for path in [*(thing for how, thing in things if how == "stat"), *files]:
        try:
            found = Fingerprint.of_path(path)
        except OSError:
            continue  # that it is not there is seen too
        place = found.device, found.mount
        if place not in kept:
            kept[place] = has_kernel_times(found)
        if not found.is_settled(since_ns) or not kept[place]:
            return False
    return True
