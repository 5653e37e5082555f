"""A limit for the memory of a process, so that it fails by itself before the kernel ends others for it.

Where a container is over its limit, the kernel may end all its processes at once (``memory.oom.group``, which
Kubernetes sets since 1.28): the caller of a check too.

Source: Linux, setrlimit(2), RLIMIT_DATA since 4.7; cgroups(7); Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

SHARE = 0.9
"""Of the memory that is available; the rest is for the caller, and what it does meanwhile."""


def give_way() -> None:
    """Make this process the one that has no memory where memory runs out: by itself, else by the kernel's choice."""
    limit_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def limit_memory(root: Path = Path("/")) -> int | None:
    """Limit the private memory of this process to what is available now; return the limit, None where it is unknown."""
    available = available_bytes(root)
    if available is None:
        return None
    limit = int(available * SHARE)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that may be taken without ending anything: of the host, and of each cgroup around this process.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    found = [*_of_host(root), *_of_cgroups(root)]
    return max(min(found), 0) if found else None


def _of_host(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _of_cgroups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "file")
        elif controllers == "memory":
            top, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
            )
        else:
            continue
        folder = top / path.lstrip("/")
        # In a container the path may be that of the host; its own files are then at the top.
        for group in (folder, *folder.parents):
            yield from _of_cgroup(group, *names)
            if group == top:
                break


def _of_cgroup(folder: Path, limit_name: str, used_name: str, cache_name: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit_name, used_name))
        # Pages of files count as used, and are given up when memory is wanted.
        cached = [line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith(f"{cache_name} ")]
        yield limit - used + int(next(iter(cached), 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
