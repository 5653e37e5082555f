"""Files in the cache folder that no row names: what crashes and damage leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
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
    for path, what, limit_s in _candidates(root, is_named, grace_s, folders):
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            # ctime moves with the rename that gave a blob its name, mtime does not; an mtime that is ahead is no time.
            changed_s = status.st_ctime if status.st_mtime > now else max(status.st_mtime, status.st_ctime)
            is_past = now - changed_s >= limit_s
            if is_past or limit_s == grace_s:
                (past if is_past else young).append(Garbage(Path(path), _size_bytes(Path(path)), what))
    return sorted(past, key=_path), sorted(young, key=_path)


def _path(item: Garbage) -> Path:
    return item.path


def _candidates(
    root: Root, is_named: Callable[[str], bool], grace_s: float, running: tuple[str, ...]
) -> Iterator[tuple[str, str, float]]:
    for path, what in _unnamed(root, is_named):
        yield path, what, grace_s
    for path, name in _files(root.tmp):
        if not name.startswith(running):
            yield path, "a temporary file", grace_s
    for path, name in _files(root.quarantine):
        if not name.startswith("registry."):  # a registry that was set aside is for people to delete
            yield path, "a quarantined engine", KEPT_FOR_S
    for path, _ in _files(root.logs):
        yield path, "a builder's log", KEPT_FOR_S
    for kind in get_args(ArtefactKind):
        for path, _ in _files(root.artefacts(kind)):
            yield path, f"one of the {kind.replace('-', ' ')}, long unused", ARTEFACTS_KEPT_FOR_S


def _unnamed(root: Root, is_named: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """What should not be among the blobs; a record goes with its blob."""
    for folder, prefix in _files(root.engines):
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            yield folder, "a stray file"
            continue
        for path, name in _files(folder):
            digest, dot, suffix = name.rpartition(".")
            if dot + suffix not in {".engine", ".json"} or digest[:2] != prefix:
                yield path, "a stray file"
            elif is_named(digest):
                continue
            elif suffix == "engine":
                yield path, "a stored engine without a row"
            elif not os.path.lexists(f"{folder}/{digest}.engine"):
                yield path, "a repair record without an engine"


def _files(folder: Path | str) -> Iterator[tuple[str, str]]:
    """Path and name of each; none where they cannot be listed, which a check of the folders says."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208
            yield f"{folder}/{name}", name


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
