"""What goes when the cache is to shrink: decided first, as a frozen plan, and carried out after.

Least recently used first. Never: pinned entries, and those used within :data:`RECENT_USE_S`, whose path may have been
handed out and not opened yet.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from enginecache.registry.base import EntryRecord

RECENT_USE_S = 60.0


@dataclass(frozen=True)
class Used:
    """An entry and when it was last used."""

    record: EntryRecord
    last_used_at: dt.datetime


@dataclass(frozen=True)
class Garbage:
    """A file that no row names.

    Attributes:
        path: File or folder.
        size_bytes: What deleting it frees.
        what: What it is, for people.
    """

    path: Path
    size_bytes: int
    what: str


@dataclass(frozen=True)
class PrunePlan:
    """What a prune would do.

    Attributes:
        entries: To go, first to last.
        garbage: Files past their grace time.
        freed_bytes: What it frees: a blob that a staying entry shares frees nothing.
        kept_bytes: Size of the blobs that stay.
        shortfall_bytes: How much of the asked size could not be reached without touching what must stay.
    """

    entries: tuple[Used, ...]
    garbage: tuple[Garbage, ...]
    freed_bytes: int
    kept_bytes: int
    shortfall_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.entries and not self.garbage


def plan_prune(
    stored: Sequence[Used],
    garbage: Iterable[Garbage],
    now: dt.datetime,
    *,
    max_size_bytes: int | None = None,
    older_than_s: float | None = None,
) -> PrunePlan:
    """Decide what goes. Pure.

    Args:
        stored: All entries.
        garbage: Files past their grace time.
        now: The time.
        max_size_bytes: Bytes of blobs that may stay; None is no limit.
        older_than_s: Entries not used for so many seconds go; None is no limit.
    """
    sizes = {used.record.digest: used.record.size_bytes for used in stored}
    users = Counter(used.record.digest for used in stored)
    kept_bytes = sum(sizes.values())
    going: list[Used] = []
    for used in sorted(stored, key=lambda used: (used.last_used_at, used.record.key)):
        idle_s = (now - used.last_used_at).total_seconds()
        is_old = older_than_s is not None and idle_s > older_than_s
        is_too_much = max_size_bytes is not None and kept_bytes > max_size_bytes
        if not (is_old or is_too_much) or used.record.is_pinned or idle_s < RECENT_USE_S:
            continue
        going.append(used)
        users[used.record.digest] -= 1
        if not users[used.record.digest]:
            kept_bytes -= sizes[used.record.digest]
    rubbish = tuple(garbage)
    return PrunePlan(
        entries=tuple(going),
        garbage=rubbish,
        freed_bytes=sum(sizes.values()) - kept_bytes + sum(item.size_bytes for item in rubbish),
        kept_bytes=kept_bytes,
        shortfall_bytes=0 if max_size_bytes is None else max(kept_bytes - max_size_bytes, 0),
    )
