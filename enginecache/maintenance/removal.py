"""Delete entries, blobs and orphaned files without racing a concurrent publish or hit."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from enginecache.errors import EngineCacheError, OptionError
from enginecache.files.units import format_duration, format_size, utc_now
from enginecache.maintenance.eviction import Going, Orphan, PrunePlan, inflation_after, plan_prune
from enginecache.maintenance.orphans import delete_orphan
from enginecache.storage.registry.rows import EntryRecord, InflationStep, Standing
from enginecache.storage.space import Reserve
from enginecache.storage.storage import Storage

Usability = Callable[[Standing], bool]


def _all_usable() -> Usability:
    return lambda _: True


@dataclass(frozen=True)
class Used:
    """An entry and the time of its last use; its publication is a use."""

    record: EntryRecord
    last_used_at: dt.datetime


class Removal:
    """Deletes engines. Safe across threads and processes.

    Args:
        storage: The folder.
        usability: Finds out which entries this host can use; asked once a plan, and not where none is needed.
    """

    def __init__(self, storage: Storage, usability: Callable[[], Usability] = _all_usable) -> None:
        self._storage = storage
        self._registry = storage.registry
        self._last_used = storage.last_used
        self._usability = usability

    def used(self, record: EntryRecord) -> Used:
        """Return an entry with its last use."""
        return Used(record, self._last_used.last_used(record.key) or record.created_at)

    def remove(self, record: EntryRecord) -> int:
        """Delete the entry, and its blob if no other entry shares it; return the bytes freed.

        Does nothing if the entry was replaced.

        Raises:
            OptionError: The entry is pinned.
        """
        freed = self._storage.remove(record)
        if freed is None:
            raise pinned_error(record)
        return freed

    def plan(
        self,
        orphans: Iterable[Orphan],
        keep_recent_s: float,
        *,
        max_size_bytes: int | None = None,
        older_than_s: float | None = None,
        built: str | None = None,
    ) -> PrunePlan:
        """Decide what a prune would delete. Deletes nothing.

        Args:
            orphans: Files past their grace time.
            keep_recent_s: How long an engine stays after its last use, in seconds.
            max_size_bytes: Bytes of blobs that may stay; None is no limit.
            older_than_s: Entries not used for so many seconds are deleted; None is no limit.
            built: Digest of the engine that was just built, which stays.
        """
        return plan_prune(
            self._registry.standings(self._last_used.all()),
            orphans,
            utc_now(),
            keep_recent_s,
            max_size_bytes=max_size_bytes,
            older_than_s=older_than_s,
            inflation=self._registry.inflation(),
            is_usable=_all_usable() if max_size_bytes is None else self._usability(),
            built=built,
        )

    def enforce(self, max_size_bytes: int, keep_recent_s: float, *, built: str | None = None) -> PrunePlan | None:
        """Shrink the cache to a size after a publication; return what was done, or None where it fits.

        One query where it fits.

        Args:
            max_size_bytes: Bytes of blobs that may stay.
            keep_recent_s: How long an engine stays after its last use, in seconds.
            built: Digest of the engine that was just built, which stays.
        """
        if self._registry.stored_bytes() <= max_size_bytes:
            return None
        plan = self.plan((), keep_recent_s, max_size_bytes=max_size_bytes, built=built)
        self.execute(plan)
        return plan

    def enforce_limit(self, max_size_bytes: int | None, keep_recent_s: float, *, built: str) -> tuple[str, ...]:
        """Like :meth:`enforce` after a build, which it must not fail; return warnings.

        Args:
            max_size_bytes: The limit; None is none.
            keep_recent_s: As for :meth:`enforce`.
            built: As for :meth:`enforce`.
        """
        if max_size_bytes is None:
            return ()
        try:
            plan = self.enforce(max_size_bytes, keep_recent_s, built=built)
        except EngineCacheError as error:
            return (f"the cache was not shrunk to its limit of {format_size(max_size_bytes)}: {error.what}",)
        if plan is None or not plan.shortfall_bytes:
            return ()
        above = f"{format_size(plan.shortfall_bytes)} above its limit of {format_size(max_size_bytes)}"
        if not keep_recent_s:
            return (f"the cache is {above}: pinned engines stay, and the one just built",)
        within = f"within the last {format_duration(keep_recent_s)}"
        return (f"the cache is {above}: pinned engines and engines used {within} stay (`keep_recent`)",)

    def execute(self, plan: PrunePlan) -> int:
        """Carry out a plan and return the bytes freed. Engines pinned, rebuilt or used since the plan was made stay.

        Atomic for each blob, not for the whole plan. Works on a full disk.
        """
        self._last_used.age_those_ahead()
        if plan.is_empty:
            return 0
        with Reserve(self._storage.root).lent():
            return self._execute(plan)

    def _execute(self, plan: PrunePlan) -> int:
        started_at = utc_now()
        evicted: list[Going] = []
        freed = 0
        try:
            for group in plan.groups:
                freed_now = self._storage.evict([going.standing for going in group])
                if freed_now is not None:
                    freed += freed_now
                    evicted.extend(group)
        finally:
            self._inflate(evicted, started_at)
        return freed + sum(item.size_bytes for item in plan.orphans if self.delete_orphan(item))

    def _inflate(self, evicted: Sequence[Going], started_at: dt.datetime) -> None:
        """Record what inflation rose to, with the time before the eviction: uses from then on are worth more."""
        value = inflation_after(evicted)
        if value is not None:
            uses = (standing.last_used_at for standing in self._registry.standings(self._last_used.all()))
            self._registry.record_inflation(InflationStep(started_at, value), min(uses, default=started_at))

    def delete_orphan(self, item: Orphan) -> bool:
        """Delete a file that no row names; return False if that failed, or if a row names it by now."""
        return self._storage.delete_orphan(item.path, lambda: delete_orphan(item))


def pinned_error(record: EntryRecord) -> OptionError:
    """Return the error for deleting a pinned entry."""
    short = record.key[:12]
    return OptionError(f"the entry {short} is pinned", f"Run `enginecache unpin {short}`.")
