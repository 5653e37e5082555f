"""From a key to the stored engine that serves it, or the reasons why none does."""

from __future__ import annotations

from dataclasses import dataclass

from enginecache.entry import Candidate
from enginecache.errors import NotCachedError, RegistryError
from enginecache.failures import KnownFailure
from enginecache.key import EngineKey
from enginecache.locks.base import KeyLocks
from enginecache.matching import Reason, distance, is_same_model, judge
from enginecache.memo import BlobState, FileMemo
from enginecache.placement import required_reach
from enginecache.registry.base import Registry
from enginecache.registry.records import REPAIR_FIX, EntryRecord
from enginecache.store.base import BlobStore

STORE_LOCK = "store"
"""Held for the last step of a publication and for every removal of a blob.

Without it an eviction could unlink a blob after its equal is published and before the row of that is committed.
"""

STORE_LOCK_TIMEOUT_S = 60.0
"""It is held for a few renames and one transaction, so who waits longer waits for a stopped process."""


@dataclass(frozen=True)
class Miss:
    """No stored engine serves the request exactly.

    Attributes:
        reasons: Why; the first one's code is ``absent``, ``differs`` or ``corrupt``.
        candidates: The engines of this model that are stored, best first, each with its verdict.
    """

    reasons: tuple[Reason, ...]
    candidates: tuple[Candidate, ...] = ()

    def error(self, key: EngineKey, failure: KnownFailure | None = None) -> NotCachedError:
        """The miss as an error, for a caller who must not build; ``failure`` is what a build would be refused for."""
        why = "; ".join(reason.text for reason in self.reasons)
        message = f"no stored engine serves this request (key {key.digest[:12]}): {why}"
        fix = "Leave --offline out to build it, or see `enginecache explain` with the same options."
        if failure is not None:
            fix = f"A build of it is no way out: {failure.text}. {failure.build.reason}"
        return NotCachedError(message, fix)

    @property
    def nearest(self) -> Candidate | None:
        """The candidate whose key is least apart from the asked one."""
        return min(self.candidates, key=lambda candidate: distance(candidate.verdict.differing), default=None)


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

        Raises:
            RegistryError: The entry's row is damaged.
        """
        record = self._registry.find(key.digest)
        if record is None:
            return self.explain_miss(key)
        if record.key_json != key.canonical_json():
            raise RegistryError(f"the row of {key.digest[:12]} is damaged: it has the text of another key", REPAIR_FIX)
        state = self._memo.check_blob(record.digest, record.size_bytes, force=force_check)
        if state is BlobState.INTACT:
            return record
        reason = self.set_aside(record)
        # Whole after all, or replaced by a rebuild: another process was here meanwhile.
        if reason is None or self._registry.find(key.digest) is not None:
            return self.find(key, force_check=force_check)
        return Miss((reason,), self.candidates(key))

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

    def quarantine(self, record: EntryRecord, why: str) -> None:
        """Set aside a blob that TensorRT does not take although its bytes are whole."""
        with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
            current = self._registry.find(record.key)
            if current is None or current.build_id != record.build_id:
                return  # set aside or rebuilt by another process
            self._registry.forget_blob(record.digest, why)
            self._store.quarantine(record.digest)

    def explain_miss(self, key: EngineKey) -> Miss:
        """Why no entry has this key: what is stored of the model, and the fields in which the nearest differs."""
        miss = Miss((Reason("absent", "no engine of this model is stored"),), self.candidates(key))
        nearest = miss.nearest
        if nearest is None:
            return miss
        listed = "; ".join(str(difference) for difference in nearest.verdict.differing)
        text = (
            f"the nearest stored engine, {nearest.record.key[:12]} ({nearest.record.model_name}), differs in {listed}"
        )
        return Miss((Reason("differs", text),), miss.candidates)

    def candidates(self, key: EngineKey) -> tuple[Candidate, ...]:
        """What is stored of models that share graph or weights with the key's: best first, newest first of equals."""
        asked, needed = key.fields(), required_reach(key.target)
        judged = [
            Candidate(record, judge(asked, needed, record.fields, record.reach))
            for record in self._registry.relatives(key.model_structure, key.model_weights)
            if not record.flaw
        ]
        return tuple(sorted((c for c in judged if is_same_model(c.verdict.differing)), key=lambda c: c.verdict.rank))

    def whole(self, candidate: Candidate) -> bool:
        """Whether the candidate's blob is there and as its digest says; a damaged one is quarantined."""
        record = candidate.record
        return (
            self._memo.check_blob(record.digest, record.size_bytes) is BlobState.INTACT
            or self.set_aside(record) is None
        )
