"""Build an engine at most once for a key, whoever asks, and return what is stored then.

The callers of one key take its lock in turn. Each looks again when it has the lock, so that only the first one builds;
a failure that is in force is raised before and after the waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from enginecache.config import Config
from enginecache.key.matching import Reason
from enginecache.pipeline.failures import FailureMemory
from enginecache.pipeline.lookup import Lookup, Match, Miss
from enginecache.pipeline.model_memo import FileMemo
from enginecache.pipeline.publish import Publication
from enginecache.pipeline.request import Policy
from enginecache.pipeline.resolve import Resolved
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.space import require_writable
from enginecache.storage.storage import Storage

_WAITED = Reason("waited", "another process built it while this one waited")

Shrink = Callable[[Config, EntryRecord], Iterable[str]]
"""Shrinks the cache to its limit after the build of an entry; returns warnings."""


class BuildOnce:
    """Builds what is not stored. Safe across threads and processes.

    Args:
        storage: Where the engine goes; its locks are taken for the key.
        lookup: Looks again, with the lock held.
        publication: Builds and commits.
        memo: Remembers the model's digest in a cache that was just made.
        watch_for: Returns a function that says whether a key has an engine by now.
        shrink: Makes room after a build.
    """

    def __init__(
        self,
        storage: Storage,
        lookup: Lookup,
        publication: Publication,
        memo: FileMemo,
        *,
        watch_for: Callable[[str], Callable[[], bool]],
        shrink: Shrink,
    ) -> None:
        self._storage = storage
        self._lookup = lookup
        self._publication = publication
        self._memo = memo
        self._watch_for = watch_for
        self._shrink = shrink
        self._failures = FailureMemory(storage)

    def build_once(self, resolved: Resolved, miss: Miss, policy: Policy) -> Match:
        """Return the engine for a key that has none: built now, or by another process while this one waited.

        Args:
            resolved: What to build.
            miss: Why nothing serves it yet.
            policy: How long to wait, and whom to keep informed.

        Raises:
            BuildError: TensorRT refused it or failed, now or a short while ago.
            LockTimeoutError: Another process still builds.
            EngineCacheError: As :meth:`enginecache.pipeline.publish.Publication.build`.
        """
        key, config = resolved.key, resolved.config
        ttl_s = config.failure_ttl_s
        if policy.timeout_s is None:
            policy = replace(policy, timeout_s=config.timeout_s)
        outdated = self._attempts(resolved) if policy.rebuild else frozenset[str]()
        new = self._make(resolved, policy)
        self._lookup.note_miss(key, miss)
        self._failures.require_none(key, ttl_s, outdated)  # before the lock too: it may be held by a long build
        require_writable(self._storage.root)  # before the lock, which could not be taken either
        while True:
            started_s = time.monotonic()
            # Waiters return as soon as the engine is there; they do not queue for the lock.
            is_there = None if policy.rebuild else self._watch_for(key.digest)
            with self._storage.locks.hold(key.digest, policy.timeout_s, policy.waiting, is_there) as is_held:
                policy = _left(policy, time.monotonic() - started_s)
                again = self._lookup.find_in_use(key)
                if isinstance(again, Match) and _is_wanted(again, policy, outdated):
                    why = (*(() if again.is_exact else again.reasons), *miss.reasons)
                    return replace(again, reasons=(_WAITED, *why))
                if not is_held:
                    continue  # it was there, and was deleted again
                self._failures.require_none(key, ttl_s, outdated)
                record, built = self._publication.build(
                    resolved,
                    policy.progress,
                    timeout_s=policy.timeout_s,
                    waiting=policy.waiting,
                    uses_timing_cache=policy.timing_cache,
                    examine=policy.examine,
                )
            return self._served(resolved, record, (*miss.reasons, *new), built.warnings)

    def _served(
        self, resolved: Resolved, record: EntryRecord, reasons: tuple[Reason, ...], warnings: Iterable[str]
    ) -> Match:
        above = self._shrink(resolved.config, record)
        warned = (Reason("warning", text) for text in (*resolved.warnings, *warnings, *above))
        return Match(record, (*reasons, *warned), outcome="built")

    def _make(self, resolved: Resolved, policy: Policy) -> tuple[Reason, ...]:
        """Make what is missing of the cache before the first engine is stored; return the reason that says so."""
        if not self._storage.make(resolved.config.shared):
            return ()
        self._memo.keep(resolved.source, resolved.identity)  # there was no place for it when it was found out
        folder = self._storage.root.path
        if policy.made is not None:
            policy.made(folder)
        return (Reason("new_cache", f"made a new cache in {folder}"),)

    def _attempts(self, resolved: Resolved) -> frozenset[str]:
        """Return the attempts that a rebuild repeats: those of the stored entry and of the failure in force.

        If another process rebuilds, or fails, from now on, its result is used.
        """
        record = self._storage.registry.find(resolved.key.digest)
        failure = self._failures.find(resolved.key, resolved.config.failure_ttl_s)
        stored = () if record is None else (record.build_id,)
        return frozenset((*stored, *(() if failure is None else (failure.build.id,))))


def _is_wanted(found: Match, policy: Policy, outdated: frozenset[str]) -> bool:
    """Return whether an engine that is there by now will do: for a rebuild, a new one of exactly the key."""
    return found.record.build_id not in outdated and (found.is_exact or not policy.rebuild)


def _left(policy: Policy, waited_s: float) -> Policy:
    """Return the policy with what is left of its time-out."""
    return policy if policy.timeout_s is None else replace(policy, timeout_s=max(policy.timeout_s - waited_s, 0.0))
