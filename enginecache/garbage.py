"""Files in the cache folder that no row names: what crashes and damage leave behind."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import get_args

from enginecache.config import DAY_S
from enginecache.eviction import Garbage
from enginecache.store.root import ArtefactKind, Root, build_folder_prefix

KEPT_FOR_S = 30 * DAY_S
"""Quarantined engines and logs are for people, who may look weeks later."""

ARTEFACTS_KEPT_FOR_S = 90 * DAY_S
"""Since their last use. Those of a TensorRT or driver that is gone, or of a deleted engine, are not used again; to lose
another costs a slower build."""


def find_garbage(
    root: Root,
    is_named: Callable[[str], bool],
    grace_s: float,
    now: float | None = None,
    *,
    running: Collection[str] = (),
) -> tuple[list[Garbage], list[Garbage]]:
    """Files that no row names: those past their grace time, and those within it.

    A publication under way looks like garbage until its row is committed; the grace time keeps it safe.

    Args:
        root: The cache folder.
        is_named: Whether an entry names the digest.
        grace_s: Age in seconds from which orphans and temporaries may go.
        now: Seconds since the epoch; default: now.
        running: Ids of the builds under way, whose folders are no garbage, however old.
    """
    now = time.time() if now is None else now
    past: list[Garbage] = []
    young: list[Garbage] = []
    folders = tuple(map(build_folder_prefix, running))
    for path, what, limit_s in _candidates(root, is_named, grace_s):
        if path.parent == root.tmp and path.name.startswith(folders):
            continue
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            # ctime moves with the rename that gave a blob its name, mtime does not.
            age_s = now - max(status.st_mtime, status.st_ctime)
            item = Garbage(path, _size_bytes(path), what)
            if age_s >= limit_s:
                past.append(item)
            elif limit_s == grace_s:
                young.append(item)
    return past, young


def _candidates(root: Root, is_named: Callable[[str], bool], grace_s: float) -> Iterator[tuple[Path, str, float]]:
    for path, what in _unnamed(root, is_named):
        yield path, what, grace_s
    for path in sorted(root.tmp.iterdir()):
        yield path, "a temporary file", grace_s
    for path in sorted(root.quarantine.iterdir()):
        if not path.name.startswith("registry."):  # a registry that was set aside is for people to delete
            yield path, "a quarantined engine", KEPT_FOR_S
    for path in sorted(root.logs.iterdir()):
        yield path, "a builder's log", KEPT_FOR_S
    for kind in get_args(ArtefactKind):
        for path in sorted(root.artefacts(kind).iterdir()):
            yield path, f"one of the {kind.replace('-', ' ')}, long unused", ARTEFACTS_KEPT_FOR_S


def _unnamed(root: Root, is_named: Callable[[str], bool]) -> Iterator[tuple[Path, str]]:
    """What should not be among the blobs; a record goes with its blob."""
    for path in sorted(root.engines.iterdir()):
        if not path.is_dir() or path.is_symlink():
            yield path, "a stray file"
    for path in sorted(root.engines.glob("*/*")):
        if path.suffix not in {".engine", ".json"} or path.parent.name != path.stem[:2]:
            yield path, "a stray file"
        elif is_named(path.stem):
            continue
        elif path.suffix == ".engine":
            yield path, "a stored engine without a row"
        elif not path.with_suffix(".engine").exists():
            yield path, "a repair record without an engine"


def _size_bytes(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(item.lstat().st_size for item in path.rglob("*") if item.is_file())


def delete_garbage(item: Garbage) -> bool:
    """Delete one item, an engine with its repair record; False if that failed."""
    try:
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
            if item.path.suffix == ".engine":
                item.path.with_suffix(".json").unlink(missing_ok=True)
    except OSError:
        return False
    return True
