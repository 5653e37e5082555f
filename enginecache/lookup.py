"""From a key to the stored engine that serves it, or the reasons why none does."""

from __future__ import annotations

from dataclasses import dataclass

from enginecache.entry import Neighbour, Reason
from enginecache.key import EngineKey
from enginecache.locks.base import KeyLocks
from enginecache.matching import nearest
from enginecache.memo import BlobState, FileMemo
from enginecache.registry.base import EntryRecord, Registry
from enginecache.store.base import BlobStore

STORE_LOCK = "store"
"""Held for the last step of a publication and for every removal of a blob.

Without it an eviction could unlink a blob after its equal is published and before the row of that is committed.
"""

STORE_LOCK_TIMEOUT_S = 60.0
"""It is held for a few renames and one transaction, so who waits longer waits for a stopped process."""

NEAREST_SHOWN = 3


@dataclass(frozen=True)
class Miss:
    """No stored engine serves the request.

    Attributes:
        reasons: Why; the first one's code is ``absent``, ``differs`` or ``corrupt``.
        neighbours: The nearest stored engines, nearest first.
    """

    reasons: tuple[Reason, ...]
    neighbours: tuple[Neighbour, ...] = ()


class Lookup:
    """Finds stored engines, and sets damaged ones aside. Safe across threads and processes."""

    def __init__(self, registry: Registry, store: BlobStore, memo: FileMemo, locks: KeyLocks) -> None:
        self._registry = registry
        self._store = store
        self._memo = memo
        self._locks = locks

    def find(self, key: EngineKey, *, force_check: bool = False) -> EntryRecord | Miss:
        """The entry whose blob is whole, else why there is none. A damaged blob is quarantined on the way.

        Args:
            key: What was asked.
            force_check: Read the blob's bytes even where its fingerprint was verified before.
        """
        record = self._registry.find(key.digest)
        if record is None:
            return self.explain_miss(key)
        state = self._memo.check_blob(record.digest, record.size_bytes, force=force_check)
        if state is BlobState.INTACT:
            return record
        reason = self.set_aside(record)
        # Whole after all, or replaced by a rebuild: another process was here meanwhile.
        if reason is None or self._registry.find(key.digest) is not None:
            return self.find(key, force_check=force_check)
        return Miss((reason,))

    def set_aside(self, record: EntryRecord) -> Reason | None:
        """Quarantine a damaged blob and forget its entries; None if it is whole after all.

        The check is made again under the store's lock: another process may just have published the same bytes.
        """
        with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
            state = self._memo.check_blob(record.digest, record.size_bytes, force=True)
            if state is BlobState.INTACT:
                return None
            what = "its file is gone" if state is BlobState.MISSING else state.value
            # Rows first: a blob without a row is garbage, a row without a blob would be a broken promise.
            self._registry.forget_blob(record.digest, what)
            kept = self._store.quarantine(record.digest)
        where = "" if kept is None else f"; the file is kept as {kept}"
        return Reason("corrupt", f"the stored engine {record.digest[:12]} was set aside: {what}{where}")

    def explain_miss(self, key: EngineKey) -> Miss:
        """Why no entry has this key: the nearest ones, and the fields in which they differ."""
        relatives = self._registry.relatives(key.model_structure, key.model_weights)
        ranked = nearest(key.fields(), ((record, record.fields) for record in relatives), NEAREST_SHOWN)
        neighbours = tuple(Neighbour(record, differing) for record, differing in ranked)
        if not neighbours:
            return Miss((Reason("absent", "no engine of this model is stored"),))
        closest = neighbours[0]
        listed = "; ".join(str(difference) for difference in closest.differing)
        text = (
            f"the nearest stored engine, {closest.record.key[:12]} ({closest.record.model_name}), differs in {listed}"
        )
        return Miss((Reason("differs", text),), neighbours)
