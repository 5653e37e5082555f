"""Invariants of a cache folder after any fault of the process that wrote there: the promises, one by one."""

from __future__ import annotations

import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path

from crash_folders import cache_in, get
from crash_operations import Operation

from enginecache.cache import EngineCache
from enginecache.files.digest import digest_of
from enginecache.maintenance.orphans import find_orphans
from enginecache.storage import marker

YEAR_S = 365 * 24 * 3600
GARBAGE = {"a temporary file", "a stored engine without a row", "a repair record without an engine"}


def assert_holds(operation: Operation, case: Path, *, is_acknowledged: bool) -> None:
    """Check a folder, as the next process finds it; heals what a repair heals on the way."""
    operation.opens(case)
    if is_acknowledged:
        operation.check(case)
    cache = cache_in(case)
    assert_registry_is_sound(cache)
    found = cache.verify(deep=True)
    assert {finding.kind for finding in found.findings} <= operation.findings | {"record"}, found.findings
    assert {item.what for item in found.young_orphans} <= GARBAGE, found.young_orphans
    assert_accounted_for(cache)
    operation.always(case)
    for name in operation.kept:
        # What was damaged before is built anew.
        assert_served(case, name, offline=not operation.findings)
    assert_served(case, operation.asked)
    assert_garbage_goes(case)
    assert_modes(cache)


def assert_registry_is_sound(cache: EngineCache) -> None:
    with closing(sqlite3.connect(cache.root.registry_path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def assert_served(case: Path, name: str, **ask: bool) -> None:
    """The next process gets a whole plan, at once: no lock is left."""
    entry = get(case, name, **ask)
    assert entry.record.model_name == f"{name}.onnx"
    data = entry.path.read_bytes()
    assert digest_of(data) == entry.digest == entry.path.stem
    assert data.startswith(b"vtrt")


def assert_accounted_for(cache: EngineCache) -> None:
    """No file is left that nothing names and no prune would ever delete."""
    root = cache.root
    named = {root.registry_path, *(root.path / name for name in ("registry.sqlite-journal", "reserve", marker.NAME))}
    named |= {cache.path(used.record) for used in cache.entries()}
    digests = {used.record.digest for used in cache.entries()}
    past, _ = find_orphans(root, digests.__contains__, 0, time.time() + YEAR_S)
    named |= {item.path for item in past}
    named |= {path.with_suffix(".json") for path in named if path.suffix == ".engine"}
    # Small files that are never deleted while their key may be asked for again.
    kinds = {root.locks: {".lock", ".holder"}, root.uses: {""}}
    for path in root.path.rglob("*"):
        is_kept = path.suffix in kinds.get(path.parent, ())
        is_within_garbage = any(parent in named for parent in path.parents)
        assert path.is_dir() or path in named or is_kept or is_within_garbage, path


def assert_garbage_goes(case: Path) -> None:
    """A repair fixes what is left, a prune past the grace time deletes it all, and nothing else."""
    cache = cache_in(case, grace_s=0.0)
    found = cache.verify(deep=True, repair=True)
    assert found.is_clean, found.findings
    before = {used.record.key for used in cache.entries()}
    cache.execute_prune(cache.plan_prune())
    found = cache.verify(deep=True)
    assert (found.findings, found.young_orphans) == ((), ())
    assert {used.record.key for used in cache.entries()} == before


def assert_modes(cache: EngineCache) -> None:
    """The group of a shared folder is not kept out, and nobody else is let in."""
    root = cache.root
    for path in root.path.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_dir() and not path.name.startswith("."):
            assert mode == root.folder_mode, (path, oct(mode))
        elif path.suffix == ".engine":
            assert mode == root.blob_mode, (path, oct(mode))
        elif path.suffix == ".lock":
            assert mode == root.file_mode, (path, oct(mode))
        assert not mode & 0o007, (path, oct(mode))
