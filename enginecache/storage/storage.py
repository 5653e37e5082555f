"""Storage: one opened cache folder. Only here blobs and rows change together, under a lock that nobody else takes."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from enginecache.config import Shared
from enginecache.errors import EngineCacheError, RegistryError, StoreError
from enginecache.files.fingerprint import has_kernel_times
from enginecache.storage.blobs import Blobs, StagedBlob
from enginecache.storage.folder import Root
from enginecache.storage.last_used import UseLog
from enginecache.storage.locks import FileLocks
from enginecache.storage.rebuild import Rebuilt, RegistryRebuild, require_registry
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.reader import RegistryReader
from enginecache.storage.registry.rows import BuildRecord, EntryRecord, ExaminedRow, Standing
from enginecache.storage.registry.schema import ensure_schema
from enginecache.storage.repair_files import RepairRecords
from enginecache.storage.space import Reserve

if TYPE_CHECKING:
    from enginecache.storage.registry.registry import Registry

_LOCK = "store"
_LOCK_TIMEOUT_S = 60.0
"""It is held for a few renames and one transaction, so a longer wait is for a stopped process."""


MOUNTED_OVER = "another file system is mounted over"
"""For an engine that is missing; the path follows."""

TICK_NS = 20_000_000
"""Longer than a tick of the clock that file times are taken from: 10 ms at most (CONFIG_HZ=100).

Source: Linux, ``current_time`` in fs/inode.c.
"""


class BlobState(enum.Enum):
    """The result of checking a blob."""

    INTACT = "intact"
    MISSING = "its file is missing"
    WRONG_SIZE = "its size is not the one that was stored"
    WRONG_DIGEST = "its bytes do not have the digest in its name"


class Storage:
    """The registry, blobs, locks and last uses of one cache folder. Safe across threads and processes.

    A blob gets its name before its row is committed, and loses its row before its file is deleted: a crash between the
    two leaves an orphan, never a row without a blob. The store's lock makes both one step for everybody else; without
    it an eviction could delete a blob after its equal is published and before that row is committed.

    Args:
        root: The cache folder.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self.database = Database(root.registry_path)
        self.reader = RegistryReader(self.database)
        self.blobs = Blobs(root)
        self.locks = FileLocks(root)
        self.records = RepairRecords(root)
        self.last_used = UseLog(root)

    @functools.cached_property
    def registry(self) -> Registry:
        """All of the registry; a hit needs only the ``reader``, which is loaded in a fraction of the time."""
        from enginecache.storage.registry.registry import Registry

        return Registry(self.database)

    # Opening

    def make(self, shared: Shared) -> bool:
        """Make the folder and the registry where they are missing. Idempotent; safe across processes.

        Returns:
            Whether this call made a cache where none was.

        Raises:
            StoreError: The folder cannot be made, or must not be used.
            RegistryError: The registry cannot be made.
        """
        is_new = self.root.make(shared)
        require_registry(self.root)
        ensure_schema(self.database, self.root.file_mode)
        return is_new

    def prepare(self, shared: Shared) -> None:
        """Make what is there ready for use: upgrade a registry, share the folder if the settings say so."""
        if not self.root.is_made:
            return
        if shared:
            self.root.share()
        require_registry(self.root)
        with self.database.connected():
            if self.database.is_made:
                ensure_schema(self.database, self.root.file_mode)

    def look(self, shared: Shared) -> None:
        """Find out whether another process has made the cache since this one looked."""
        if not self.root.is_made:
            self.root.look()
            self.prepare(shared)

    def path(self, record: EntryRecord) -> Path:
        """Return where the entry's plan is."""
        return self.blobs.path(record.digest)

    # Checking

    def check(self, record: EntryRecord, *, force: bool = False) -> BlobState:
        """Check that the entry's blob is there and whole.

        Reads its bytes only where this host has not verified this fingerprint before.

        Args:
            record: The entry.
            force: Read the bytes in any case.

        Raises:
            StoreError: The file is there and cannot be read.
        """
        fingerprint = self.blobs.fingerprint(record.digest)
        if fingerprint is None:
            return BlobState.MISSING
        if fingerprint.size_bytes != record.size_bytes:
            return BlobState.WRONG_SIZE
        is_asked = not force and has_kernel_times(fingerprint)
        found = self.reader.recall("blob", fingerprint) if is_asked else None
        if found is not None and found.get("digest") == record.digest:
            return BlobState.INTACT
        return self._read(record.digest)

    def _read(self, digest: str) -> BlobState:
        read = self.blobs.read(digest)
        if read is None:
            return BlobState.MISSING
        if read.digest != digest:
            return BlobState.WRONG_DIGEST
        if read.is_settled:
            self.reader.remember("blob", read.fingerprint, {"digest": digest})
        return BlobState.INTACT

    def set_aside(self, record: EntryRecord) -> str | None:
        """Quarantine a damaged blob and forget its entries.

        The check is made again under the lock: another process may just have published the same bytes.

        Returns:
            A sentence that says what is wrong with it and where it is kept; None if it is whole after all.

        Raises:
            StoreError: It is missing, and ``engines/`` is a mount of its own, which may hide it.
        """
        with self._locked():
            state = self.check(record, force=True)
            if state is BlobState.INTACT:
                return None
            if state is BlobState.MISSING and self.root.is_mounted_over():
                short = record.digest[:12]
                message = f"the stored engine {short} may be hidden: {MOUNTED_OVER} {self.root.engines}"
                fix = (
                    f"Unmount that and run the command again, or forget the entry: `enginecache rm {record.key[:12]}`."
                )
                raise StoreError(message, fix)
            # Rows first: a blob without a row is an orphan, a row without a blob would be a broken promise.
            self.registry.forget_blob(record.digest, state.value)
            kept = self.blobs.quarantine(record.digest)
        where = "" if kept is None else f"; the file is kept as {kept}"
        return f"the stored engine {record.digest[:12]} was set aside: {state.value}{where}"

    def quarantine(self, record: EntryRecord, why: str) -> None:
        """Quarantine a blob that TensorRT refuses although its bytes are whole, unless the entry was replaced since."""
        with self._locked():
            current = self.registry.find(record.key)
            if current is None or current.build_id != record.build_id:
                return  # set aside or rebuilt by another process
            self.registry.forget_blob(record.digest, why)
            self.blobs.quarantine(record.digest)

    # Publishing

    def commit(self, staged: StagedBlob, record: EntryRecord, attempt: BuildRecord) -> None:
        """Give a staged plan its name, and commit its row. Either both are there afterwards, or neither.

        Args:
            staged: The plan; discarded on failure.
            record: Its row.
            attempt: The attempt that built it.

        Raises:
            StoreError: The plan cannot be stored.
            RegistryError: The row cannot be committed.
        """
        try:
            with self._locked():
                previous = self.registry.find(record.key)
                self.blobs.publish(staged)
                try:
                    self.last_used.touch(record.key)  # before the row: no eviction takes it for long unused
                    self._record_entries(record.digest, [record])
                    self._require_attempt(attempt)
                    self.registry.publish(record)
                except BaseException:
                    # Nobody else can have named it while the lock is held. On a full disk it is in the way.
                    self._delete_unnamed_quietly(staged.digest)
                    raise
                self._retire(previous)
        except BaseException:
            self.blobs.discard(staged)
            raise
        self._remember_new(staged.digest)

    def record_check(self, record: EntryRecord, check_json: str) -> EntryRecord:
        """Keep the result of a check of an entry's numbers, unless the entry was replaced or deleted meanwhile.

        Returns:
            The entry with the result.
        """
        checked = replace(record, check_json=check_json)
        with self._locked():
            if self.registry.record_check(record.key, record.build_id, check_json):
                self._record_entries(checked.digest, [checked])
        return checked

    def admit(self, staged: Mapping[str, StagedBlob], records: Sequence[EntryRecord]) -> list[EntryRecord]:
        """Give staged plans their names, and commit the rows of all at once. What is stored under a key stays.

        A death in between leaves blobs without rows, as that of a build does, and no row.

        Args:
            staged: The plans by digest; those that are not published are left for the caller to discard.
            records: Their rows.

        Returns:
            The entries that are stored now; the others' keys were taken.

        Raises:
            StoreError: A plan cannot be stored.
            RegistryError: The rows cannot be committed.
        """
        with self._locked():
            new = [record for record in records if self.registry.find(record.key) is None]
            digests = sorted({record.digest for record in new})
            try:
                for digest in digests:
                    self.blobs.publish(staged[digest])
                for record in new:
                    self.last_used.touch(record.key)  # before the rows: no eviction takes them for long unused
                for digest in digests:
                    self._record_entries(digest, [record for record in new if record.digest == digest])
                self.registry.restore(new)
            except BaseException:
                for digest in digests:
                    self._delete_unnamed_quietly(digest)
                raise
        for digest in digests:
            self._remember_new(digest)
        return new

    def _remember_new(self, digest: str) -> None:
        """Remember that a blob that was just published is whole, so that nobody has to read it again.

        Waits for the clock's next tick: a change after that moves ctime. Where times are whole seconds the blob is read
        again. Best effort.
        """
        with contextlib.suppress(StoreError, RegistryError):
            published = self.blobs.fingerprint(digest)
            if published is None or published.ctime_ns % 1_000_000_000 == 0:
                return
            time.sleep(min(max(published.ctime_ns + TICK_NS - time.time_ns(), 0), TICK_NS) / 1e9)
            if self.blobs.fingerprint(digest) == published:
                self.reader.remember("blob", published, {"digest": digest})

    def _record_entries(self, digest: str, new: Sequence[EntryRecord]) -> None:
        """Write down next to the blob what its rows are about to say, with what its other rows say.

        Before the rows are committed: then no crash leaves a row without its record. What is recorded and never
        committed is a whole engine of that key all the same. Best effort.
        """
        keys = {entry.key for entry in new}
        with contextlib.suppress(StoreError, RegistryError):
            others = [other for other in self._sound_entries(digest) if other.key not in keys]
            self.records.write(digest, [entry.to_json() for entry in (*others, *new)])

    def _require_attempt(self, attempt: BuildRecord) -> None:
        """Record the attempt again if the registry was rebuilt while it ran: the entry names its row."""
        if not self.registry.has_build(attempt.id):
            self.registry.start_build(attempt)

    def _retire(self, previous: EntryRecord | None) -> None:
        # Its path may just have been handed out. The entry is committed: nothing here may fail the build.
        with contextlib.suppress(StoreError, RegistryError):
            if previous is not None and not self.registry.is_referenced(previous.digest):
                self.blobs.retire(previous.digest)
                self.records.delete(previous.digest)  # nobody asks for it again

    # Removing

    def remove(self, record: EntryRecord) -> int | None:
        """Delete the entry, and its blob unless another entry shares it; also on a full disk.

        Returns:
            The bytes freed, 0 if the entry was replaced or deleted since; None if it is pinned.
        """
        with Reserve(self.root).lent(), self._locked():
            if not self.registry.remove(record.key, digest=record.digest):
                current = self.registry.find(record.key)
                return None if current is not None and current.is_pinned else 0
            self.last_used.forget(record.key)
            return self._delete_unnamed(record.digest)

    def evict(self, planned: Sequence[Standing]) -> int | None:
        """Delete a blob with all its entries, unless one of them was pinned, rebuilt or used since it was planned.

        Args:
            planned: The entries of one blob, as they were when the eviction was planned.

        Returns:
            The bytes freed; None if the blob stays.
        """
        digest = planned[0].digest
        with self._locked():
            if not all(map(self._is_as_planned, planned)):
                return None
            # Not those that were pinned just now: with them the blob stays.
            removed = [entry for entry in planned if self.registry.remove(entry.key, digest=digest)]
            if any(map(self._is_used_since, removed)):
                # A hit noted its use and read the row just before it was deleted, and hands the path out now. The blob
                # is an orphan, and young.
                self.blobs.retire(digest)
                return None
            for entry in removed:
                self.last_used.forget(entry.key)
            return self._delete_unnamed(digest)

    def _is_as_planned(self, planned: Standing) -> bool:
        current = self.registry.find(planned.key)
        # Rebuilt since, to the same bytes perhaps: another attempt.
        is_same = current is not None and current.build_id == planned.build_id and not current.is_pinned
        return is_same and not self._is_used_since(planned)

    def _is_used_since(self, planned: Standing) -> bool:
        return (self.last_used.last_used(planned.key) or planned.last_used_at) != planned.last_used_at

    def delete_orphan(self, path: Path, delete: Callable[[], bool]) -> bool:
        """Delete a file that no row names; False if that failed, or if a row names it by now.

        Args:
            path: The file.
            delete: Deletes it, and returns whether it did.
        """
        # Asked again under the lock: a publication may just have given an orphan its row.
        with self._locked():
            is_blob = path.parent.parent == self.root.engines and path.stem[:2] == path.parent.name
            return not (is_blob and self.registry.is_referenced(path.stem)) and delete()

    def _delete_unnamed(self, digest: str) -> int:
        return 0 if self.registry.is_referenced(digest) else self.blobs.delete(digest)

    def _delete_unnamed_quietly(self, digest: str) -> None:
        with contextlib.suppress(StoreError, RegistryError):
            self._delete_unnamed(digest)

    # Repairing

    def forget_row(self, row: ExaminedRow) -> None:
        """Delete a damaged row, unless it was replaced since."""
        with self._locked():
            if row in self.registry.examine():
                self.registry.forget_entry(row.key)

    def restore_row(self, entry: EntryRecord) -> bool:
        """Take a row from the record next to its blob; False if the entry was rebuilt since."""
        with self._locked():
            recorded = self.records.entries(entry.digest)
            is_current = not isinstance(recorded, str) and entry in recorded
            if is_current:
                self.registry.restore([entry])
        return is_current

    def recorded_and_sound(self, digest: str) -> tuple[list[EntryRecord] | str, list[EntryRecord]]:
        """Return the entries in a blob's record, or what is wrong with it, and those in its rows, of one moment."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(EngineCacheError):  # in a folder that is read-only there are no locks
                held.enter_context(self._locked())
            return self.records.entries(digest), self._sound_entries(digest)

    def write_record(self, digest: str) -> None:
        """Write the record next to a blob anew from its rows."""
        with self._locked():
            rows = self._sound_entries(digest)
            if rows:
                self.records.set_aside(digest)
                self.records.write(digest, [row.to_json() for row in rows])

    def own(self, digest: str, user: int) -> bool:
        """Replace another user's blob by a copy: its owner could make it writable at any time.

        Returns:
            Whether it is replaced; False if its bytes do not have their digest.
        """
        with self._locked():
            staged = self.blobs.stage(self.blobs.path(digest))
            try:
                is_whole = staged.digest == digest
                if is_whole:
                    os.chown(staged.path, user, -1)
                    self.blobs.publish(staged)
            finally:
                self.blobs.discard(staged)
        return is_whole

    def rebuild_registry(self) -> Rebuilt | None:
        """Make a lost or damaged registry anew from the records next to the blobs; None if it is whole.

        Raises:
            RegistryError: The new one cannot be written, or the old one is locked.
            StoreError: The files cannot be moved.
        """
        return RegistryRebuild(self.root, self.locks, self._locked()).run()

    def _sound_entries(self, digest: str) -> list[EntryRecord]:
        return [entry for entry in self.registry.entries_of(digest) if not entry.flaw]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock, and one connection for what is done under it."""
        with self.locks.hold(_LOCK, _LOCK_TIMEOUT_S), self.registry.connected():
            yield
