"""Orphans: files in the cache folder that no row names, left by crashes and damage.

Only files with a name that enginecache gives, see :mod:`enginecache.storage.names`: a user's file is never an orphan.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import get_args

from enginecache.files.units import DAY_S
from enginecache.maintenance.eviction import Orphan
from enginecache.storage.folder import ArtefactKind, Root, build_folder_prefix
from enginecache.storage.names import (
    digest_of_blob,
    digest_of_record,
    files_in,
    folders_in,
    is_engines_folder,
    is_file_of,
    is_quarantined,
    is_staged,
    is_temporary_file,
    is_temporary_folder,
)

KEPT_FOR_S = 30 * DAY_S
"""Quarantined engines and logs are kept for a person, who may look weeks later."""

ARTEFACTS_KEPT_FOR_S = 90 * DAY_S
"""Since their last use. Those of a removed TensorRT or driver, or of a deleted engine, are not used again; losing
another costs a slower build."""


def find_orphans(
    root: Root,
    is_named: Callable[[str], bool],
    grace_s: float,
    now: float | None = None,
    *,
    running: Collection[str] = (),
) -> tuple[list[Orphan], list[Orphan]]:
    """Return the files that no row names: those past their grace time, and those within it.

    A publication under way looks like an orphan until its row is committed; the grace time keeps it safe.

    Args:
        root: The cache folder.
        is_named: Whether an entry names the digest.
        grace_s: Age in seconds from which orphans and temporary files may be deleted.
        now: Seconds since the epoch; default: now.
        running: Ids of the builds under way, whose folders are no orphans, however old.
    """
    now = time.time() if now is None else now
    past: list[Orphan] = []
    young: list[Orphan] = []
    folders = tuple(map(build_folder_prefix, running))
    for path, what, limit_s in _candidates(root, is_named, grace_s, folders):
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            # ctime moves with the rename that gave a blob its name, mtime does not; an mtime that is ahead is no time.
            changed_s = status.st_ctime if status.st_mtime > now else max(status.st_mtime, status.st_ctime)
            is_past = now - changed_s >= limit_s
            if is_past or limit_s == grace_s:
                (past if is_past else young).append(Orphan(Path(path), _size_bytes(Path(path)), what))
    return sorted(past, key=_path), sorted(young, key=_path)


def _path(item: Orphan) -> Path:
    return item.path


def _candidates(
    root: Root, is_named: Callable[[str], bool], grace_s: float, running: tuple[str, ...]
) -> Iterator[tuple[str, str, float]]:
    for path, what in _unnamed(root, is_named):
        yield path, what, grace_s
    for path in _temporaries(root, running):
        yield path, "a temporary file", grace_s
    for path, name in files_in(root.quarantine):
        if is_quarantined(name):  # only a person deletes a registry that was set aside
            yield path, "a quarantined engine", KEPT_FOR_S
    for path, name in files_in(root.logs):
        if is_file_of("logs", name):
            yield path, "a builder's log", KEPT_FOR_S
    for kind in get_args(ArtefactKind):
        for path, name in files_in(root.artefacts(kind)):
            if is_file_of(kind, name):
                yield path, f"one of the {kind.replace('-', ' ')}, long unused", ARTEFACTS_KEPT_FOR_S


def _temporaries(root: Root, running: tuple[str, ...]) -> Iterator[str]:
    for path, name in files_in(root.tmp):
        if is_temporary_file(name):
            yield path
    for path, name in folders_in(root.tmp):
        if (is_temporary_folder(name) and not name.startswith(running)) or is_staged(name):
            yield path
    for path, name in (*files_in(root.path), *folders_in(root.path)):
        if is_staged(name):
            yield path


def _unnamed(root: Root, is_named: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield the blobs and records that no row names; a record is deleted with its blob."""
    for folder, prefix in folders_in(root.engines):
        if not is_engines_folder(prefix):
            continue
        for path, name in files_in(folder):
            blob, record = digest_of_blob(prefix, name), digest_of_record(prefix, name)
            if blob is not None and not is_named(blob):
                yield path, "a stored engine without a row"
            elif record is not None and not is_named(record) and not os.path.lexists(f"{folder}/{record}.engine"):
                yield path, "a repair record without an engine"


def _size_bytes(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(item.lstat().st_size for item in path.rglob("*") if item.is_file())


def delete_orphan(item: Orphan) -> bool:
    """Delete one item, an engine with its repair record; False if that failed, or if its name is not an orphan's."""
    try:
        if item.path.is_dir() and not item.path.is_symlink():
            if is_staged(item.path.name):
                item.path.rmdir()  # never filled under this name
            elif is_temporary_folder(item.path.name):
                shutil.rmtree(item.path)
            else:
                return False
        else:
            item.path.unlink(missing_ok=True)
            if digest_of_blob(item.path.parent.name, item.path.name) is not None:
                record = item.path.with_suffix(".json")
                if stat.S_ISREG(record.lstat().st_mode):
                    record.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
