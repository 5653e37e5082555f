"""Deletes entries, blobs and garbage, so that nothing that was just published or handed out goes with them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from enginecache.errors import EngineCacheError, OptionError
from enginecache.files.units import format_size, utc_now
from enginecache.maintenance.eviction import Garbage, Going, PrunePlan, inflation_after, plan_prune
from enginecache.maintenance.orphans import delete_garbage
from enginecache.pipeline.lookup import STORE_LOCK, STORE_LOCK_TIMEOUT_S
from enginecache.storage.blob_types import BlobStore
from enginecache.storage.folder import Root
from enginecache.storage.last_used import UseLog
from enginecache.storage.leases import UseScan
from enginecache.storage.lock_types import KeyLocks
from enginecache.storage.registry.base import Registry
from enginecache.storage.registry.rows import EntryRecord, InflationStep, Standing
from enginecache.storage.space import Reserve

Usability = Callable[[Standing], bool]


def _all_usable() -> Usability:
    return lambda _: True


@dataclass(frozen=True)
class Used:
    """An entry and when it was last used; to be published is a use."""

    record: EntryRecord
    last_used_at: dt.datetime


class Removal:
    """Every removal holds the store's lock. Safe across threads and processes.

    Args:
        root: The cache folder.
        registry: The rows.
        store: The blobs.
        locks: For the store's lock.
        uses: The last uses.
        usability: Finds out which entries this host can use; asked once a plan, and not where none is needed.
    """

    def __init__(
        self,
        root: Root,
        registry: Registry,
        store: BlobStore,
        locks: KeyLocks,
        uses: UseLog,
        usability: Callable[[], Usability] = _all_usable,
    ) -> None:
        self._root = root
        self._registry = registry
        self._store = store
        self._locks = locks
        self._uses = uses
        self._usability = usability

    def used(self, record: EntryRecord) -> Used:
        """An entry with its last use."""
        return Used(record, self._uses.last_used(record.key) or record.created_at)

    def remove(self, record: EntryRecord) -> int:
        """Delete the entry, and its blob if no other entry shares it; the bytes freed. Does nothing if it was replaced.

        Raises:
            OptionError: The entry is pinned.
        """
        with Reserve(self._root).lent(), self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
            if not self._removed_row(record):
                return 0
            self._uses.forget(record.key)
            return self._delete_unnamed(record.digest)

    def plan(
        self,
        garbage: Iterable[Garbage],
        *,
        max_size_bytes: int | None = None,
        older_than_s: float | None = None,
    ) -> PrunePlan:
        """Decide what a prune would delete. Deletes nothing.

        Args:
            garbage: Files past their grace time.
            max_size_bytes: Bytes of blobs that may stay; None is no limit.
            older_than_s: Entries not used for so many seconds go; None is no limit.
        """
        return plan_prune(
            self._registry.standings(self._uses.all()),
            garbage,
            utc_now(),
            max_size_bytes=max_size_bytes,
            older_than_s=older_than_s,
            inflation=self._registry.inflation(),
            is_usable=_all_usable() if max_size_bytes is None else self._usability(),
            is_in_use=UseScan(self._store.path).is_in_use,
        )

    def enforce(self, max_size_bytes: int) -> PrunePlan | None:
        """Shrink the cache to a size, after a publication; what was done, or None where it fits.

        One query where it fits. What was used or published within the last minute stays, so the engine just built does.
        """
        if self._registry.stored_bytes() <= max_size_bytes:
            return None
        plan = self.plan((), max_size_bytes=max_size_bytes)
        self.execute(plan)
        return plan

    def enforce_limit(self, max_size_bytes: int | None) -> tuple[str, ...]:
        """Like :meth:`enforce` after a build, which it must not fail; return warnings.

        Args:
            max_size_bytes: The limit; None is none.
        """
        if max_size_bytes is None:
            return ()
        try:
            plan = self.enforce(max_size_bytes)
        except EngineCacheError as error:
            return (f"the cache was not shrunk to its limit of {format_size(max_size_bytes)}: {error.what}",)
        if plan is None or not plan.shortfall_bytes:
            return ()
        above = f"{format_size(plan.shortfall_bytes)} above its limit of {format_size(max_size_bytes)}"
        return (f"the cache is {above}: the rest is pinned, in use, or was used just now",)

    def execute(self, plan: PrunePlan) -> int:
        """Carry out a plan; the bytes freed. What was pinned, rebuilt, used or opened since the plan was made stays.

        Atomic for each blob, not for the plan: what an interrupt leaves of it is still to be done. Also on a full disk.
        """
        self._uses.age_those_ahead()
        if plan.is_empty:
            return 0
        with Reserve(self._root).lent():
            return self._execute(plan)

    def _execute(self, plan: PrunePlan) -> int:
        started_at = utc_now()
        scan = UseScan(self._store.path)
        evicted: list[Going] = []
        freed = 0
        try:
            for group in plan.groups:
                with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
                    freed_now = self._evict(group, scan)
                if freed_now is not None:
                    freed += freed_now
                    evicted.extend(group)
        finally:
            self._inflate(evicted, started_at)
        return freed + sum(item.size_bytes for item in plan.garbage if self.delete_garbage(item))

    def _inflate(self, evicted: Sequence[Going], started_at: dt.datetime) -> None:
        """Keep what inflation rose to, from before the eviction on: what is used from now is worth more."""
        value = inflation_after(evicted)
        if value is not None:
            uses = (standing.last_used_at for standing in self._registry.standings(self._uses.all()))
            self._registry.record_inflation(InflationStep(started_at, value), min(uses, default=started_at))

    def _evict(self, group: Sequence[Going], scan: UseScan) -> int | None:
        """Delete a blob with all its entries, with the store's lock held; the bytes freed, or None where it stays."""
        digest = group[0].standing.digest
        with scan.unused(digest) as is_unused:
            if not is_unused or not all(self._is_as_planned(going) for going in group):
                return None
            # Not those that were pinned just now: with them the blob stays.
            removed = [going for going in group if self._registry.remove(going.standing.key, digest=digest)]
            if any(self._is_used_since(going.standing) for going in removed):
                # A hit noted its use and read the row just before it went, and hands the path out now. The blob is
                # garbage, and young.
                self._store.retire(digest)
                return None
            for going in removed:
                self._uses.forget(going.standing.key)
            return self._delete_unnamed(digest)

    def _is_as_planned(self, going: Going) -> bool:
        planned = going.standing
        current = self._registry.find(planned.key)
        # Rebuilt since, to the same bytes perhaps: another attempt.
        is_same = current is not None and current.build_id == planned.build_id and not current.is_pinned
        return is_same and not self._is_used_since(planned)

    def _is_used_since(self, planned: Standing) -> bool:
        return (self._uses.last_used(planned.key) or planned.last_used_at) != planned.last_used_at

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
            raise pinned_error(record)
        return False

    def _delete_unnamed(self, digest: str) -> int:
        return 0 if self._registry.is_referenced(digest) else self._store.delete(digest)


def pinned_error(record: EntryRecord) -> OptionError:
    """Says that a pinned entry is not deleted."""
    short = record.key[:12]
    return OptionError(f"the entry {short} is pinned", f"Run `enginecache unpin {short}`.")
