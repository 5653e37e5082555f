"""Find the stored engine that serves a key, or the reasons why none does."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from enginecache.errors import NotCachedError, RegistryError
from enginecache.key.key import EngineKey
from enginecache.key.matching import EXACT, Accept, Reason, distance, is_same_model, judge
from enginecache.pipeline.failures import FailureMemory, KnownFailure
from enginecache.pipeline.placement import required_reach
from enginecache.pipeline.resolve import Resolved
from enginecache.pipeline.results import Candidate, Explanation, Outcome
from enginecache.storage.registry.rows import REPAIR_FIX, BuildRecord, EntryRecord
from enginecache.storage.storage import BlobState, Storage


@dataclass(frozen=True)
class Match:
    """A stored engine that serves the request.

    Attributes:
        record: Its row. Its blob is whole.
        reasons: Why it serves; then which damaged engines were set aside on the way.
        outcome: How it came about.
        siblings: For an engine of a wider reach, the entries of its model that it was chosen from, as
            :meth:`~enginecache.storage.registry.entries.Entries.siblings` has them: with others, another may be the
            right one. None for one that has exactly the asked key.
    """

    record: EntryRecord
    reasons: tuple[Reason, ...] = (EXACT,)
    siblings: str | None = None
    outcome: Outcome = "hit"

    @property
    def is_exact(self) -> bool:
        """True if it has exactly the asked key."""
        return self.siblings is None and self.outcome != "compatible"


MAX_LOOKS = 16
"""Rounds of one search. Other processes that publish and remove cause a few; more mean that the registry is damaged."""


@dataclass(frozen=True)
class Miss:
    """No stored engine serves the request as a hit.

    Attributes:
        reasons: Why; the first one's code is ``absent``, ``differs``, ``corrupt`` or, if earlier, ``set_aside``.
        candidates: The engines of this model that are stored, best first, each with its verdict.
    """

    reasons: tuple[Reason, ...]
    candidates: tuple[Candidate, ...] = ()

    def error(self, key: EngineKey, failure: KnownFailure | None = None) -> NotCachedError:
        """Return the miss as an error, for a caller who must not build; ``failure`` is why a build would be refused."""
        why = "; ".join(reason.text for reason in self.reasons)
        message = f"no stored engine serves this request (key {key.digest[:12]}): {why}"
        fix = "Leave --offline out to build it, or see `enginecache explain` with the same options."
        if failure is not None:
            fix = (
                f"Building would not help: {failure.text}: {failure.build.reason}\n"
                "Fix the model or the options, or give --rebuild in place of --offline."
            )
        return NotCachedError(message, fix)

    @property
    def nearest(self) -> Candidate | None:
        """Return the candidate whose key differs least from the asked one."""
        return min(self.candidates, key=lambda candidate: distance(candidate.verdict.differing), default=None)


class Lookup:
    """Finds stored engines, and sets damaged ones aside. Safe across threads and processes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._reader = storage.reader
        self._failures = FailureMemory(storage)

    def serve(self, key: EngineKey, accept: Accept) -> Match | Miss:
        """Find the engine to hand out: a hit, else a compatible one where the caller takes such. Its use is noted."""
        found = self.find_in_use(key)
        return found if isinstance(found, Match) else self.compatible(found, accept) or found

    def find(self, key: EngineKey, *, force_check: bool = False) -> Match | Miss:
        """Find the stored engine that serves the key, or say why none does. Damaged blobs are quarantined on the way.

        The engine of exactly this key comes first; then, of those whose reach is wider, the narrowest, and of these the
        newest.

        Args:
            key: What was asked.
            force_check: Read the blob's bytes even where its fingerprint was verified before.

        Raises:
            RegistryError: The entry's row is damaged.
        """
        damaged: list[Reason] = []
        for _ in range(MAX_LOOKS):
            record = self._reader.find(key.digest)
            if record is not None:
                if record.key_json != key.text:
                    message = f"the row of {key.digest[:12]} is damaged: it has the text of another key"
                    raise RegistryError(message, REPAIR_FIX)
                if self._is_whole(record, damaged, force_check=force_check):
                    return Match(record)
                continue
            found = self._find_wider(key, damaged, force_check=force_check)
            # Read after the search: an engine of exactly this key that was published meanwhile comes before any other.
            if isinstance(found, Miss) or not self._reader.has_entry(key.digest):
                return found
        raise _contradiction()

    def find_in_use(self, key: EngineKey) -> Match | Miss:
        """Like :meth:`find`, for an engine that is about to be handed out: its use is noted.

        The use is noted before the row is read: a prune that takes the row after this sees it, and leaves the blob.
        """
        with self._reader.connected():
            return self._find_in_use(key)

    def _find_in_use(self, key: EngineKey) -> Match | Miss:
        uses = self._storage.last_used
        noted = key.digest if uses.last_used(key.digest) is not None else ""
        damaged: tuple[Reason, ...] = ()
        for _ in range(MAX_LOOKS):
            if noted:
                uses.touch(noted)
            found = self.find(key)
            if isinstance(found, Miss):
                return replace(found, reasons=(*damaged, *found.reasons))
            if found.record.key == noted:
                return replace(found, reasons=(*found.reasons, *damaged))
            noted = found.record.key
            damaged += found.reasons[1:]
        raise _contradiction()

    def _find_wider(self, key: EngineKey, damaged: list[Reason], *, force_check: bool) -> Match | Miss:
        for looks in itertools.count():
            related = list(self._storage.registry.relatives(key.model_structure, key.model_weights))
            if looks > len(related) + MAX_LOOKS:
                break
            candidates = _judged(key, related)
            chosen = next((c.record for c in candidates if c.verdict.level == "exact"), None)
            if chosen is None:
                return Miss(tuple(damaged), candidates) if damaged else self._unmatched(key, candidates)
            if self._is_whole(chosen, damaged, force_check=force_check):
                reasons = next(c.verdict.reasons for c in candidates if c.record is chosen)
                return Match(chosen, (*reasons, *damaged), siblings_of(chosen, related))
        raise _contradiction()

    def _is_whole(self, record: EntryRecord, damaged: list[Reason], *, force_check: bool) -> bool:
        """Return whether the blob is whole; if not, set it aside, and add to ``damaged`` why.

        False with nothing added: it is whole after all, as another process repaired it meanwhile. Look again.
        """
        if self._storage.check(record, force=force_check) is BlobState.INTACT:
            return True
        why = self._storage.set_aside(record)
        if why is not None:
            damaged.append(Reason("corrupt", why))
        return False

    def _unmatched(self, key: EngineKey, candidates: tuple[Candidate, ...]) -> Miss:
        """Say that the engine was damaged, if so, and in which fields the nearest one differs."""
        damaged = self._storage.registry.set_aside(key.digest)
        lost = () if damaged is None else (Reason("set_aside", str(damaged)),)
        nearest = Miss((), candidates).nearest
        if nearest is None:
            return Miss((*lost, Reason("absent", "no engine of this model is stored")), candidates)
        name = f"{nearest.record.key[:12]} ({nearest.record.model_name})"
        listed = "; ".join(str(difference) for difference in nearest.verdict.differing)
        differs = Reason("differs", f"the nearest stored engine, {name}, differs in {listed}")
        return Miss((*lost, differs), candidates)

    def _candidates(self, key: EngineKey) -> tuple[Candidate, ...]:
        """Return what is stored of models that share graph or weights with the key's, best first."""
        return _judged(key, self._storage.registry.relatives(key.model_structure, key.model_weights))

    def _is_candidate_whole(self, candidate: Candidate) -> bool:
        """Return whether the candidate's blob is there and has its digest; a damaged one is quarantined."""
        record = candidate.record
        return self._storage.check(record) is BlobState.INTACT or self._storage.set_aside(record) is None

    def compatible(self, miss: Miss, accept: Accept) -> Match | None:
        """Return the best stored engine that runs here and is not quite what was asked, if the caller takes such."""
        if accept != "compatible":
            return None
        good = (candidate for candidate in miss.candidates if candidate.verdict.level == "compatible")
        found = next(filter(self._is_candidate_whole, good), None)
        return None if found is None else Match(found.record, found.verdict.reasons, outcome="compatible")

    def offline_error(self, resolved: Resolved, miss: Miss) -> NotCachedError:
        """Count the miss, and return its error for a caller who must not build."""
        self.note_miss(resolved.key, miss)
        failure = self._failures.find(resolved.key, resolved.config.failure_ttl_s)
        return self._explained(miss).error(resolved.key, failure)

    def explain(self, resolved: Resolved) -> Explanation:
        """Say what a request would be served with now, and why. Builds nothing; counts as no miss."""
        key, found = resolved.key, self.find(resolved.key)
        if isinstance(found, Match):
            served: Match | None = found
            reasons, candidates = found.reasons, self._candidates(key)
        else:
            miss = self._explained(found)
            served, candidates = self.compatible(miss, resolved.accept), miss.candidates
            reasons = miss.reasons if served is None else (*miss.reasons, *served.reasons)
        failure = self._failures.find(key, resolved.config.failure_ttl_s) if served is None else None
        failed = self._last_failure(key)
        return Explanation(
            verdict="miss" if served is None else "compatible" if served.outcome == "compatible" else "hit",
            requested_key=key.digest,
            fields=key.fields(),
            reasons=(
                *reasons,
                *(() if failure is None else (failure.as_reason(),)),
                *(Reason("warning", text) for text in resolved.warnings),
            ),
            entry=None if served is None else served.record,
            candidates=candidates,
            failure="" if failed is None else failed.reason,
            failure_log=None if failed is None else self._storage.root.log_path(failed.id),
        )

    def _last_failure(self, key: EngineKey) -> BuildRecord | None:
        """Return the last attempt at the key, if it failed."""
        return next(
            (last for last in self._storage.registry.builds(key.digest, limit=1) if last.state == "failed"), None
        )

    def _explained(self, miss: Miss) -> Miss:
        """Return the plainest reason if there is no cache: its folder may be mistyped, or not mounted."""
        root = self._storage.root
        if root.is_made:
            return miss
        return Miss((Reason("absent", f"no engine of this model is stored: there is no cache in {root.path} yet"),))

    def note_miss(self, key: EngineKey, miss: Miss) -> None:
        """Count the miss, with the fields that differ from the nearest engine; a busy registry counts nothing."""
        nearest = miss.nearest
        differing = [] if nearest is None else [difference.field for difference in nearest.verdict.differing]
        nearest_key = None if nearest is None else nearest.record.key
        with contextlib.suppress(RegistryError):  # a build says soon enough that nothing can be written
            self._storage.registry.record_miss(key.digest, miss.reasons[0].code, nearest_key, differing)


def _judged(key: EngineKey, related: Iterable[EntryRecord]) -> tuple[Candidate, ...]:
    """Give each of the related entries its verdict: best first; of equals the narrower reach, then the newer.

    Args:
        key: What was asked.
        related: Entries of models that share graph or weights with the key's, newest first.
    """
    asked, needed = key.fields(), required_reach(key.target)
    judged = [
        Candidate(
            record,
            judge(
                asked,
                needed,
                record.fields,
                record.reach,
                stored_version=record.key_version,
                is_confirmed=record.is_confirmed,
            ),
        )
        for record in related
        if not record.flaw
    ]
    neighbours = (c for c in judged if is_same_model(c.verdict.differing))
    return tuple(sorted(neighbours, key=lambda c: (*c.verdict.rank, len(c.record.compute_capabilities))))


def siblings_of(record: EntryRecord, related: Iterable[EntryRecord]) -> str:
    """Return the attempts that made the entries of the record's model, as the registry's ``siblings`` does."""
    same = sorted((other.key, other.build_id) for other in related if other.model_digest == record.model_digest)
    return ",".join(build_id for _, build_id in same)


def _contradiction() -> RegistryError:
    """Return the error for a registry that names an entry in one query and not in the next, or cannot forget it."""
    return RegistryError("the registry is damaged: its indexes do not agree with its rows", REPAIR_FIX)
