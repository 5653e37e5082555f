"""Rebuild a lost registry from the records next to the blobs.

These come back: every engine whose bytes have the digest in their name, and whose record is whole; pins, as far as they
can be read in the damaged file. These do not: attempts to build and their reasons, remembered failures, misses,
outcomes of loading, eviction's inflation, and the memo of files, which all come again in the course of time. An engine
that was deleted while another entry shared its blob may come back too.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from enginecache.errors import RegistryError, StoreError
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.os_errors import describe_os_error
from enginecache.storage.blobs import Blobs
from enginecache.storage.durable import sync_folder
from enginecache.storage.folder import Root
from enginecache.storage.locks import FileLocks
from enginecache.storage.registry import schema
from enginecache.storage.registry.database import BUSY_TIMEOUT_S, Database
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.repair_files import RepairRecords

REPAIR_LOCK = "repair"
"""Held while a registry is made anew; taken before the store's lock."""

_SIDE_FILES = ("-journal", "-wal", "-shm")
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Rebuilt:
    """The contents of a new registry.

    Attributes:
        kept: Where the damaged file is now; None where there was none.
        entries: Entries that came back.
        pins: Pins that came back.
        lost_blobs: Stored engines whose key is not known: without a whole record, or not whole themselves.
    """

    kept: Path | None
    entries: int
    pins: int
    lost_blobs: int


def require_registry(root: Root) -> None:
    """Refuse a root whose registry is missing while its engines are there: a new one would forget them all.

    Raises:
        RegistryError: It is missing.
    """
    why = _absence(root)
    if why:
        fix = "Put the file back if you have it; else run `enginecache verify --repair --yes`."
        raise RegistryError(f"the registry {root.registry_path} is lost: {why}", fix)


def find_registry_damage(root: Root) -> str:
    """Return what is wrong with the registry as a file; an empty string for nothing.

    Raises:
        RegistryError: It cannot be looked at.
    """
    if _is_absent(root.registry_path):
        return _absence(root)
    from enginecache.storage.registry.integrity import find_damage

    return find_damage(Database(root.registry_path), root.file_mode)


def _absence(root: Root) -> str:
    path = root.registry_path
    # Asked again: the first one may have been made, and used, while the folder was looked through.
    if _is_absent(path) and any(RepairRecords(root).digests()) and _is_absent(path):
        return "it is empty or missing, and there are engines"
    return ""


def _is_absent(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError as error:
        return isinstance(error, FileNotFoundError)


class RegistryRebuild:
    """Makes a lost registry anew. Safe across processes: of two at once, one does it, and the other finds it done.

    A ``get`` that runs meanwhile loses no row: it publishes under the store's lock, which is held while the files
    change, and whoever opened the old file before that is refused by SQLite when it begins to write (in a rollback
    journal's mode; with a write-ahead log a pin or a miss of that moment may be lost).

    Source: SQLite, ``databaseIsUnmoved`` in pager.c, since 3.8.3.

    Args:
        root: The cache folder.
        locks: For the repair's lock.
        store_held: Takes the store's lock.
    """

    def __init__(self, root: Root, locks: FileLocks, store_held: contextlib.AbstractContextManager[object]) -> None:
        self._root = root
        self._locks = locks
        self._store_held = store_held
        self._store = Blobs(root)
        self._records = RepairRecords(root)
        self._checked: dict[tuple[str, Fingerprint], bool] = {}

    def run(self) -> Rebuilt | None:
        """Set a damaged registry aside, and put one in its place that is made of the records; None if it is whole.

        Raises:
            RegistryError: The new one cannot be written, or the old one is locked.
            StoreError: The files cannot be moved.
        """
        with self._locks.hold(REPAIR_LOCK, None):
            if not find_registry_damage(self._root):
                return None
            self._entries()  # reads every blob, so that the store's lock is not held for that
            with self._store_held, tempfile.TemporaryDirectory(prefix="registry-", dir=self._root.tmp) as folder:
                entries = self._entries()
                pins = _readable_pins(self._root.registry_path)
                new = self._make(Path(folder) / "registry.sqlite", entries, pins)
                kept = self._exchange(new)
                lost = self._keep_unnamed(entries)
        return Rebuilt(kept, len(entries), len(pins), lost)

    def _entries(self) -> list[EntryRecord]:
        """Return the entries in the records of whole blobs: the newest of each key."""
        newest: dict[str, EntryRecord] = {}
        for digest in self._records.digests():
            found = self._records.entries(digest)
            if isinstance(found, str) or not self._is_whole(digest):
                continue
            for entry in found:
                if entry.key not in newest or newest[entry.key].created_at < entry.created_at:
                    newest[entry.key] = entry
        return list(newest.values())

    def _is_whole(self, digest: str) -> bool:
        try:
            fingerprint = self._store.fingerprint(digest)
            if fingerprint is None:
                return False
            if (digest, fingerprint) not in self._checked:
                read = self._store.read(digest)
                self._checked[digest, fingerprint] = read is not None and read.digest == digest
            return self._checked[digest, fingerprint]
        except StoreError:
            return False

    def _make(self, path: Path, entries: Iterable[EntryRecord], pins: Iterable[str]) -> Path:
        database = Database(path)
        schema.ensure_schema(database, self._root.file_mode)
        from enginecache.storage.registry.registry import Registry

        Registry(database).restore(entries, pins)
        return path

    def _exchange(self, new: Path) -> Path | None:
        """Put the new file in the old one's place, atomically; return where the old one is now."""
        old = self._root.registry_path
        kept = self._root.quarantine / f"registry.{time.time_ns()}.sqlite"
        try:
            with _write_locked(old):
                # Before the registry: a journal that is left next to a new one would be rolled back into it.
                for suffix in _SIDE_FILES:
                    _set_aside(old.with_name(old.name + suffix), kept.with_name(kept.name + suffix))
                is_there = old.exists()
                if is_there:
                    _link_or_move(old, kept)
                new.rename(old)
            sync_folder(self._root.quarantine)
            sync_folder(self._root.path)
        except OSError as error:
            doing = f"the damaged registry {old} cannot be set aside"
            raise StoreError(*describe_os_error(error, doing, kept, in_cache=True)) from error
        return kept if is_there else None

    def _keep_unnamed(self, entries: Iterable[EntryRecord]) -> int:
        """Make blobs young that came back under no key: they are orphans only after the grace time. Return how many."""
        named = {entry.digest for entry in entries}
        lost = [digest for digest in self._store.digests() if digest not in named]
        for digest in lost:
            with contextlib.suppress(StoreError):
                self._store.retire(digest)
        return len(lost)


def _set_aside(side: Path, kept: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if side.stat().st_size:
            side.rename(kept)
        else:
            side.unlink()


def _link_or_move(old: Path, kept: Path) -> None:
    try:
        kept.hardlink_to(old)  # so that there is no moment without a registry
    except OSError:
        old.rename(kept)  # a file system without hard links, or another user's file


@contextlib.contextmanager
def _write_locked(path: Path) -> Iterator[None]:
    """Hold the registry's write lock, where SQLite can still take it: where it cannot, nobody can."""
    if _is_absent(path):
        yield
        return
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if "locked" in str(error):
                message = f"the registry {path} cannot be set aside: {error}"
                raise RegistryError(message, "End the process that holds it, and try again.") from error
        yield


def _readable_pins(path: Path) -> list[str]:
    """Return the pins in a damaged registry, as far as they can be read."""
    found: list[str] = []
    if _is_absent(path):
        return found
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError),  # SQLite quotes damaged text in its errors
        contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection,
    ):
        for (key,) in connection.execute("SELECT key FROM pins"):
            if isinstance(key, str) and _KEY.fullmatch(key):
                found.append(key)
    return found
