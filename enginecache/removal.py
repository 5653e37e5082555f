"""Deletes entries, blobs and garbage, so that nothing that was just published or handed out goes with them."""

from __future__ import annotations

import contextlib

from enginecache.errors import OptionError
from enginecache.eviction import Garbage, PrunePlan, Used
from enginecache.garbage import delete_garbage
from enginecache.locks.base import KeyLocks
from enginecache.lookup import STORE_LOCK, STORE_LOCK_TIMEOUT_S
from enginecache.registry.base import EntryRecord, Registry
from enginecache.store.base import BlobStore
from enginecache.store.root import Root
from enginecache.store.uses import UseLog


class Removal:
    """Every removal holds the store's lock. Safe across threads and processes."""

    def __init__(self, root: Root, registry: Registry, store: BlobStore, locks: KeyLocks, uses: UseLog) -> None:
        self._root = root
        self._registry = registry
        self._store = store
        self._locks = locks
        self._uses = uses

    def used(self, record: EntryRecord) -> Used:
        """An entry with its last use."""
        return Used(record, self._uses.last_used(record.key) or record.created_at)

    def remove(self, record: EntryRecord) -> int:
        """Delete the entry, and its blob if no other entry shares it; the bytes freed. Does nothing if it was replaced.

        Raises:
            OptionError: The entry is pinned.
        """
        with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
            if not self._removed_row(record):
                return 0
            self._uses.forget(record.key)
            return self._delete_unnamed(record.digest)

    def execute(self, plan: PrunePlan) -> int:
        """Carry out a plan; the bytes freed. What was pinned, rebuilt or used since the plan was made stays."""
        freed = sum(self._evict(used) for used in plan.entries)
        return freed + sum(item.size_bytes for item in plan.garbage if self.delete_garbage(item))

    def _evict(self, planned: Used) -> int:
        if self.used(planned.record) != planned:
            return 0
        with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S), contextlib.suppress(OptionError):  # pinned since
            current = self._registry.find(planned.record.key)
            if current is None or current.build_id != planned.record.build_id:
                return 0  # rebuilt since, to the same bytes perhaps
            if not self._removed_row(planned.record):
                return 0
            if self.used(planned.record) != planned:
                # A hit noted its use and read the row just before it went, and hands the path out now. The blob is
                # garbage, and young.
                self._store.retire(planned.record.digest)
                return 0
            self._uses.forget(planned.record.key)
            return self._delete_unnamed(planned.record.digest)
        return 0

    def delete_garbage(self, item: Garbage) -> bool:
        """Delete a file that no row names; False if that failed, or if a row names it by now."""
        # Under the lock, and asked again: a publication may just have given an orphan its row.
        with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
            is_blob = item.path.parent.parent == self._root.engines and item.path.stem[:2] == item.path.parent.name
            if is_blob and self._registry.is_referenced(item.path.stem):
                return False
            return delete_garbage(item)

    def _removed_row(self, record: EntryRecord) -> bool:
        if self._registry.remove(record.key, digest=record.digest):
            return True
        current = self._registry.find(record.key)
        if current is not None and current.is_pinned:
            short = record.key[:12]
            raise OptionError(f"the entry {short} is pinned", f"Run `enginecache unpin {short}`.")
        return False

    def _delete_unnamed(self, digest: str) -> int:
        return 0 if self._registry.is_referenced(digest) else self._store.delete(digest)
