"""What every implementation of the registry does."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from enginecache.files.canonical import Fields
from enginecache.files.fingerprint import Fingerprint
from enginecache.storage.registry.rows import (
    AnswerRecord,
    BuildRecord,
    EntryRecord,
    ExaminedRow,
    InflationStep,
    LoadRecord,
    MemoKind,
    MissRecord,
    RegistryTotals,
    SetAside,
    Standing,
)


class Entries(Protocol):
    """The stored engines."""

    def find(self, key: str) -> EntryRecord | None:
        """The entry of exactly this key."""
        ...

    def has_entry(self, key: str, build_id: str | None = None) -> bool:
        """Whether the key has an entry, and that of this attempt if one is named."""
        ...

    def siblings(self, model_digest: str) -> str:
        """Return the attempts that made the model's entries, in the order of their keys, joined by commas."""
        ...

    def find_prefix(self, prefix: str, limit: int = 8) -> list[EntryRecord]:
        """Entries whose key begins with ``prefix``, at most ``limit``, in the order of their keys."""
        ...

    def entries(self, limit: int | None = None) -> list[EntryRecord]:
        """Entries, newest first: all, or the newest ``limit``."""
        ...

    def standings(self, noted: Mapping[str, dt.datetime]) -> list[Standing]:
        """What eviction weighs of every entry, in no order; ``noted`` says when keys were last used."""
        ...

    def relatives(self, structure: str, weights: str) -> Iterator[EntryRecord]:
        """Entries of models that share the structure or the weights, newest first."""
        ...

    def publish(self, entry: EntryRecord, fields: Fields) -> None:
        """Commit the entry, its model and blob, and its build's success: all or nothing.

        Replaces an entry of the same key. The blob must be durable already.
        """
        ...

    def remove(self, key: str, *, digest: str | None = None, even_pinned: bool = False) -> bool:
        """Delete the entry; False if it was gone, pinned, or no longer has ``digest``."""
        ...

    def forget_blob(self, digest: str, reason: str) -> list[str]:
        """Delete every entry of a blob that is no longer good, and note why; the keys that lost their engine."""
        ...

    def set_aside(self, key: str) -> SetAside | None:
        """Return the damaged engine that the key had, if none was published since."""
        ...

    def set_asides(self) -> list[SetAside]:
        """Return the damaged engines that were not built anew since, latest first."""
        ...

    def keys(self) -> set[str]:
        """Return the keys of all entries."""
        ...

    def named(self) -> set[str]:
        """The blobs that a row names, also a damaged row."""
        ...

    def is_referenced(self, digest: str) -> bool:
        """Whether any entry names the blob."""
        ...

    def entries_of(self, digest: str) -> list[EntryRecord]:
        """The entries that name the blob, in the order of their keys; not those whose row is damaged."""
        ...

    def examine(self) -> list[ExaminedRow]:
        """Every entry's row, also those that nothing else shows, because a row that they name is gone."""
        ...

    def forget_entry(self, key: str) -> None:
        """Delete a row that is damaged, whatever its key is. A pin stays, for the engine that is built anew."""
        ...

    def restore(self, entries: Iterable[EntryRecord], pinned: Iterable[str] = ()) -> None:
        """Put back entries as they were published, in place of those of the same keys, and pins: all or nothing."""
        ...

    def pin(self, key: str) -> None:
        """Keep the entry whatever ``prune`` wants. Idempotent."""
        ...

    def unpin(self, key: str) -> None:
        """Let the entry go when ``prune`` wants. Idempotent."""
        ...

    def stored_bytes(self) -> int:
        """Bytes of all blobs that an entry names, each counted once. One quick query."""
        ...

    def totals(self) -> RegistryTotals:
        """Counts and sums."""
        ...


class History(Protocol):
    """What happened: attempts to build, misses, evictions."""

    def start_build(self, build: BuildRecord) -> None:
        """Record an attempt. The caller holds the key's lock, so other running attempts of it are abandoned."""
        ...

    def fail_build(self, build_id: str, seconds: float, reason: str, *, is_lasting: bool = False) -> None:
        """Record that the attempt failed, why, and whether the next would too. Nothing, if it no longer runs."""
        ...

    def attempts_since_success(self, key: str) -> list[BuildRecord]:
        """The attempts at the key since the last that succeeded, newest first."""
        ...

    def builds(self, key: str | None = None, limit: int = 100) -> list[BuildRecord]:
        """Attempts, newest first."""
        ...

    def unfinished_builds(self) -> list[BuildRecord]:
        """The attempts that say ``running``, oldest first."""
        ...

    def abandon_build(self, build_id: str) -> None:
        """Record that the attempt's process died first, if it still runs. The caller holds its key's lock."""
        ...

    def lasting_failures(self) -> int:
        """How many keys there are whose latest attempt failed, and would fail again."""
        ...

    def record_miss(self, key: str, reason: str, nearest_key: str | None, differing: Sequence[str]) -> None:
        """Count a miss of this key."""
        ...

    def misses(self, limit: int = 100) -> list[MissRecord]:
        """Misses, latest first."""
        ...

    def inflation(self) -> list[InflationStep]:
        """The steps of eviction's inflation that are kept, oldest first."""
        ...

    def record_inflation(self, step: InflationStep, oldest_use: dt.datetime) -> None:
        """Keep a step, and forget those that ended before ``oldest_use``: they are in force at no entry's last use.

        Inflation never falls: a lower value than the latest is kept as that. Steps later than this one are a wrong
        clock's, and move to its time.
        """
        ...


class Notes(Protocol):
    """What was found out once: to forget it costs the time of finding it out again."""

    def recall(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """Return what was found in a file of this fingerprint within this boot, or None."""
        ...

    def remember(self, kind: MemoKind, fingerprint: Fingerprint, found: dict[str, Any]) -> None:
        """Keep what was found in a file. Never blocks and never fails: a busy registry just forgets."""
        ...

    def remember_answer(self, answer: AnswerRecord) -> None:
        """Keep an answer, in place of the one to the same command line; a registry that is busy just forgets."""
        ...

    def record_load(self, load: LoadRecord) -> None:
        """Keep what came of loading a blob, in place of what is known of the same four. Does not wait for writers."""
        ...

    def find_load(self, digest: str, device: str, toolchain: str, driver: str) -> LoadRecord | None:
        """What came of the last loading of the blob by this toolchain, on this class of GPU, under this driver."""
        ...

    def loads(self, digest: str) -> list[LoadRecord]:
        """What is known of loading a blob, latest first."""
        ...


class Registry(Entries, History, Notes, Protocol):
    """Rows, transactional. Safe across threads, forks and processes; every method may raise ``RegistryError``."""
