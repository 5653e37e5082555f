"""Eviction: which engines a smaller cache loses. Decided first, as a frozen plan, and carried out after.

By size, GreedyDual-Size decides: the blob of least priority goes first, and its priority is the inflation at its last
use, plus the seconds that it took to build for each GiB that it takes up. With each blob that goes, inflation rises to
that blob's priority: what is not used loses its rank to what is, the sooner the cheaper it is to build again.

A hit writes nothing for this: the registry keeps when inflation rose, and a last use has a time. So priorities outlive
any process.

Source: P. Cao, S. Irani, "Cost-Aware WWW Proxy Caching Algorithms", USENIX Symposium on Internet Technologies and
Systems, 1997. ``benchmarks/eviction.py`` compares it with others.
"""

from __future__ import annotations

import datetime as dt
import functools
import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from enginecache.errors import OptionError
from enginecache.files.units import DAY_S
from enginecache.host.devices import Device
from enginecache.host.targets import Reach
from enginecache.host.toolchain import Toolchain
from enginecache.storage.registry.rows import InflationStep, Standing

FOREIGN_USE_S = DAY_S
"""An engine that nothing here can use, and that was used within this time, belongs to another container."""

_GIB = float(1 << 30)

GoingReason = Literal["old", "unusable", "cheapest"]
StayReason = Literal["pinned", "young"]


@dataclass(frozen=True)
class Orphan:
    """A file that no row names.

    Attributes:
        path: File or folder.
        size_bytes: Bytes that its deletion frees.
        what: Its kind, for display.
    """

    path: Path
    size_bytes: int
    what: str


@dataclass(frozen=True)
class Going:
    """An entry that is to be deleted.

    Attributes:
        standing: The entry.
        reason: ``old``: not used for longer than was asked. Else the size is too much, and ``unusable``: no TensorRT
            or GPU here can use it; ``cheapest``: its priority is the least.
        priority: Of its blob, in seconds per GiB.
    """

    standing: Standing
    reason: GoingReason
    priority: float


@dataclass(frozen=True)
class Staying:
    """Blobs that were next in order, but must stay.

    Attributes:
        reason: ``pinned``; ``young``: used or published within ``keep_recent``.
        blobs: How many.
        size_bytes: Of all of them.
    """

    reason: StayReason
    blobs: int
    size_bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """The deletions that a prune would make.

    Attributes:
        entries: To be deleted, first to last; those that share a blob are deleted together, and stand together.
        orphans: Files past their grace time.
        freed_bytes: Bytes that it frees.
        kept_bytes: Size of the blobs that stay.
        shortfall_bytes: How much of the asked size could not be reached without touching what must stay.
        staying: The blobs that were passed over, by reason.
    """

    entries: tuple[Going, ...]
    orphans: tuple[Orphan, ...]
    freed_bytes: int
    kept_bytes: int
    shortfall_bytes: int = 0
    staying: tuple[Staying, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to do."""
        return not self.entries and not self.orphans

    @property
    def groups(self) -> list[tuple[Going, ...]]:
        """Return the entries to delete, by blob, in order."""
        groups: dict[str, list[Going]] = {}
        for going in self.entries:
            groups.setdefault(going.standing.digest, []).append(going)
        return [tuple(group) for group in groups.values()]


class _Blob(NamedTuple):
    """A blob: first its place in the order, then what decides about it."""

    is_usable: bool
    priority: float
    last_used_at: dt.datetime
    digest: str
    size_bytes: int
    is_pinned: bool
    users: list[Standing]

    def merged(self, other: _Blob) -> _Blob:
        """Return the blob with the users of both: the best of them counts."""
        return _Blob(
            self.is_usable or other.is_usable,
            max(self.priority, other.priority),
            max(self.last_used_at, other.last_used_at),
            self.digest,
            self.size_bytes,
            self.is_pinned or other.is_pinned,
            sorted((*self.users, *other.users)),
        )


def plan_prune(
    stored: Sequence[Standing],
    orphans: Iterable[Orphan],
    now: dt.datetime,
    keep_recent_s: float,
    *,
    max_size_bytes: int | None = None,
    older_than_s: float | None = None,
    inflation: Sequence[InflationStep] = (),
    is_usable: Callable[[Standing], bool] = lambda _: True,
    built: str | None = None,
) -> PrunePlan:
    """Decide what to delete. Deterministic, and changes nothing.

    A blob is deleted with all its entries or not at all; the best of them counts. Old blobs come first. Then, while the
    rest is too large, those that cannot be used here, and then the others by priority. Nothing is deleted that is
    pinned, or was used or published within ``keep_recent_s``. A last use or a step in the future comes from a wrong
    clock, and counts as now.

    Args:
        stored: All entries.
        orphans: Files past their grace time.
        now: The time.
        keep_recent_s: How long a blob stays after its last use, in seconds.
        max_size_bytes: Bytes of blobs that may stay; None is no limit.
        older_than_s: Entries not used for so many seconds go; None is no limit.
        inflation: Its steps, oldest first.
        is_usable: Whether a TensorRT and a GPU here can use the entry.
        built: Digest of a blob that was just built, which stays: its caller does not have it yet.
    """
    blobs = _blobs(stored, now, inflation, is_usable)
    kept_bytes = total_bytes = sum(blob.size_bytes for blob in blobs)
    staying: dict[str, tuple[StayReason, int]] = {}
    going: dict[str, tuple[_Blob, GoingReason]] = {}
    for blob, reason in _turns(blobs, now, older_than_s, by_size=max_size_bytes is not None):
        if reason != "old" and (max_size_bytes is None or kept_bytes <= max_size_bytes):
            break
        if blob.digest in going or blob.digest in staying:
            continue
        why = _stay_reason(blob, now, keep_recent_s, built)
        if why is None:
            going[blob.digest] = (blob, reason)
            kept_bytes -= blob.size_bytes
        else:
            staying[blob.digest] = (why, blob.size_bytes)
    orphans = tuple(orphans)
    return PrunePlan(
        entries=tuple(Going(user, why, blob.priority) for blob, why in going.values() for user in blob.users),
        orphans=orphans,
        freed_bytes=total_bytes - kept_bytes + sum(item.size_bytes for item in orphans),
        kept_bytes=kept_bytes,
        shortfall_bytes=0 if max_size_bytes is None else max(kept_bytes - max_size_bytes, 0),
        staying=_tally(staying.values()),
    )


def _blobs(
    stored: Sequence[Standing],
    now: dt.datetime,
    inflation: Sequence[InflationStep],
    is_usable: Callable[[Standing], bool],
) -> list[_Blob]:
    times = [min(step.at, now) for step in inflation]
    values = [0.0, *(step.value for step in inflation)]
    foreign_before = now - dt.timedelta(seconds=FOREIGN_USE_S)
    blobs: dict[str, _Blob] = {}
    for standing in stored:
        used_at, digest = standing.last_used_at, standing.digest
        blob = _Blob(
            used_at > foreign_before or is_usable(standing),
            values[bisect_right(times, used_at)] + rebuild_cost(standing),
            min(now, used_at),  # not min: this runs for every entry
            digest,
            standing.size_bytes,
            standing.is_pinned,
            [standing],
        )
        other = blobs.get(digest)
        blobs[digest] = blob if other is None else blob.merged(other)
    return list(blobs.values())


def rebuild_cost(standing: Standing) -> float:
    """Return the cost of losing an entry for the room that it takes up: seconds of its build per GiB."""
    return standing.build_seconds * _GIB / max(standing.size_bytes, 1)


def _turns(
    blobs: list[_Blob], now: dt.datetime, older_than_s: float | None, *, by_size: bool
) -> Iterable[tuple[_Blob, GoingReason]]:
    """Yield the blobs in the order of their deletion, each with the reason. Uses ``blobs`` up."""
    if older_than_s is not None:
        old = [blob for blob in blobs if (now - blob.last_used_at).total_seconds() > older_than_s]
        for blob in sorted(old, key=lambda blob: (blob.last_used_at, blob.digest)):
            yield blob, "old"
    if by_size:
        heapq.heapify(blobs)
        while blobs:
            blob = heapq.heappop(blobs)  # not sorted: mostly the first few are asked for
            yield blob, "cheapest" if blob.is_usable else "unusable"


def _stay_reason(blob: _Blob, now: dt.datetime, keep_recent_s: float, built: str | None) -> StayReason | None:
    if blob.is_pinned:
        return "pinned"
    is_young = blob.digest == built or (now - blob.last_used_at).total_seconds() < keep_recent_s
    return "young" if is_young else None


def _tally(passed_over: Iterable[tuple[StayReason, int]]) -> tuple[Staying, ...]:
    sizes: dict[StayReason, list[int]] = {"pinned": [], "young": []}
    for reason, size_bytes in passed_over:
        sizes[reason].append(size_bytes)
    return tuple(Staying(reason, len(found), sum(found)) for reason, found in sizes.items() if found)


def inflation_after(evicted: Iterable[Going]) -> float | None:
    """Return what inflation rises to when these are deleted; None where it does not rise.

    A blob that was deleted for its age, or because nothing here can use it, was not the least in rank.
    """
    return max((going.priority for going in evicted if going.reason == "cheapest"), default=None)


def usable_here(toolchains: Sequence[Toolchain], devices: Sequence[Device]) -> Callable[[Standing], bool]:
    """Return a function that says whether a TensorRT and a GPU of this host can use an entry.

    A host without GPU builds for others: there every target is usable. One without TensorRT says nothing either.

    Args:
        toolchains: The installed ones.
        devices: All GPUs of the host.
    """
    versions = {(toolchain.flavour, toolchain.version) for toolchain in toolchains}

    @functools.cache
    def is_reached(compute_capabilities: tuple[str, ...]) -> bool:
        try:
            reach = Reach.from_texts(compute_capabilities)
        except OptionError:  # a later release may write what this one cannot read
            return True
        return not devices or any(reach.covers_one(device.compute_capability) for device in devices)

    def is_usable(standing: Standing) -> bool:
        if versions and (standing.backend, standing.tensorrt_version) not in versions:
            return False
        return is_reached(standing.compute_capabilities)

    return is_usable
