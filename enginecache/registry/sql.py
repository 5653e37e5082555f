"""The registry in a SQL database, through SQLAlchemy Core."""

from __future__ import annotations

import datetime as dt
import json
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from enginecache.errors import RegistryError
from enginecache.fingerprint import Fingerprint
from enginecache.key import Fields
from enginecache.registry.base import (
    BuildRecord,
    EntryRecord,
    InflationStep,
    LoadRecord,
    MemoKind,
    MissRecord,
    RegistryTotals,
    utc_now,
)
from enginecache.registry.database import Database
from enginecache.registry.tables import blobs, builds, entries, file_memo, inflation, loads, misses, models, pins

_ENTRY = sa.select(
    entries,
    models.c.name.label("model_name"),
    blobs.c.size_bytes,
    pins.c.key.is_not(None).label("is_pinned"),
).select_from(
    entries.join(models, models.c.digest == entries.c.model_digest)
    .join(blobs, blobs.c.digest == entries.c.digest)
    .outerjoin(pins, pins.c.key == entries.c.key)
)
_MAX_INTEGER = 2**63 - 1
"""SQLite's largest; a time in nanoseconds passes it in the year 2262, and a file can be given such a time."""
_NEWEST_FIRST = (entries.c.created_at.desc(), entries.c.key)


class SqlRegistry:
    """Implements :class:`~enginecache.registry.base.Registry` on one SQLite file.

    Args:
        database: Where the rows are; its schema is current.
        host: Name that this host's file memo goes under; another host's fingerprints mean nothing here.
    """

    def __init__(self, database: Database, host: str | None = None) -> None:
        self._database = database
        # Its own short time-out: a memo is worth less than the wait for it.
        self._hasty = Database(database.path, busy_timeout_s=0.0)
        self._host = platform.node() if host is None else host

    def find(self, key: str) -> EntryRecord | None:
        """The entry of exactly this key."""
        with self._database.reading() as connection:
            row = connection.execute(_ENTRY.where(entries.c.key == key)).one_or_none()
        return None if row is None else _entry(row)

    def find_prefix(self, prefix: str, limit: int = 8) -> list[EntryRecord]:
        """Entries whose key begins with ``prefix``, at most ``limit``, in the order of their keys."""
        # A range, not LIKE: it uses the primary key's index, and no letter of the prefix is special.
        chosen = _ENTRY.where(entries.c.key >= prefix, entries.c.key < prefix + "g").order_by(entries.c.key)
        with self._database.reading() as connection:
            return [_entry(row) for row in connection.execute(chosen.limit(limit))]

    def entries(self, limit: int | None = None) -> list[EntryRecord]:
        """Entries, newest first: all, or the newest ``limit``."""
        with self._database.reading() as connection:
            return [_entry(row) for row in connection.execute(_ENTRY.order_by(*_NEWEST_FIRST).limit(limit))]

    def relatives(self, structure: str, weights: str) -> Iterator[EntryRecord]:
        """Entries of models that share the structure or the weights, newest first."""
        related = sa.or_(models.c.structure == structure, models.c.weights == weights)
        with self._database.reading() as connection:
            rows = connection.execute(_ENTRY.where(related).order_by(*_NEWEST_FIRST)).all()
        return map(_entry, rows)

    def publish(self, entry: EntryRecord, fields: Fields) -> None:
        """Commit the entry, its model and blob, and its build's success: all or nothing."""
        model = {
            "digest": entry.model_digest,
            "structure": fields["model"]["structure"],
            "weights": fields["model"]["weights"],
            "name": entry.model_name,
            "first_seen_at": entry.created_at,
        }
        blob = {"digest": entry.digest, "size_bytes": entry.size_bytes, "stored_at": entry.created_at}
        row = {column.name: getattr(entry, column.name) for column in entries.c}
        row["compute_capabilities"] = json.dumps(entry.compute_capabilities)
        finished = {"state": "succeeded", "build_seconds": entry.build_seconds}
        with self._database.writing() as connection:
            connection.execute(insert(models).values(model).on_conflict_do_nothing())
            healed = {"quarantine_reason": None}
            connection.execute(insert(blobs).values(blob).on_conflict_do_update(index_elements=["digest"], set_=healed))
            connection.execute(sa.update(builds).where(builds.c.id == entry.build_id).values(finished))
            replaced = connection.scalar(sa.select(entries.c.digest).where(entries.c.key == entry.key))
            connection.execute(insert(entries).values(row).on_conflict_do_update(index_elements=["key"], set_=row))
            _drop_blob_if_unnamed(connection, replaced)

    def remove(self, key: str, *, digest: str | None = None, even_pinned: bool = False) -> bool:
        """Delete the entry; False if it was gone, pinned, or no longer has ``digest``."""
        chosen = sa.delete(entries).where(entries.c.key == key)
        if digest is not None:
            chosen = chosen.where(entries.c.digest == digest)
        if not even_pinned:
            chosen = chosen.where(entries.c.key.not_in(sa.select(pins.c.key)))
        with self._database.writing() as connection:
            removed = connection.scalar(chosen.returning(entries.c.digest))
            if removed is not None:
                connection.execute(sa.delete(pins).where(pins.c.key == key))
                _drop_blob_if_unnamed(connection, removed)
        return removed is not None

    def forget_blob(self, digest: str, reason: str) -> list[str]:
        """Delete every entry of a blob that is no longer good; the keys that lost their engine."""
        with self._database.writing() as connection:
            chosen = sa.select(entries.c.key).where(entries.c.digest == digest).order_by(entries.c.key)
            keys = list(connection.scalars(chosen))
            connection.execute(sa.delete(entries).where(entries.c.digest == digest))
            connection.execute(sa.update(blobs).where(blobs.c.digest == digest).values(quarantine_reason=reason))
        return keys

    def is_referenced(self, digest: str) -> bool:
        """Whether any entry names the blob."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(entries.c.key).where(entries.c.digest == digest)).first() is not None

    def pin(self, key: str) -> None:
        """Keep the entry whatever ``prune`` wants. Idempotent."""
        with self._database.writing() as connection:
            connection.execute(insert(pins).values(key=key, pinned_at=utc_now()).on_conflict_do_nothing())

    def unpin(self, key: str) -> None:
        """Let the entry go when ``prune`` wants. Idempotent."""
        with self._database.writing() as connection:
            connection.execute(sa.delete(pins).where(pins.c.key == key))

    def start_build(self, build: BuildRecord) -> None:
        """Record an attempt; others of the same key that still say ``running`` are abandoned."""
        gone = {"state": "abandoned", "reason": "its process ended before the build did"}
        row = {column.name: getattr(build, column.name) for column in builds.c}
        with self._database.writing() as connection:
            still = sa.and_(builds.c.key == build.key, builds.c.state == "running")
            connection.execute(sa.update(builds).where(still).values(gone))
            connection.execute(sa.insert(builds).values(row))

    def fail_build(self, build_id: str, seconds: float, reason: str, *, is_lasting: bool = False) -> None:
        """Record that the attempt failed, and why; an attempt whose entry is committed has succeeded."""
        failed = {"state": "failed", "build_seconds": seconds, "reason": reason, "is_lasting": is_lasting}
        with self._database.writing() as connection:
            running = sa.and_(builds.c.id == build_id, builds.c.state == "running")
            connection.execute(sa.update(builds).where(running).values(failed))

    def recent_failures(self, key: str) -> list[BuildRecord]:
        """The attempts at the key that failed since the last that succeeded, newest first."""
        later = builds.alias()
        success = sa.exists().where(
            later.c.key == key, later.c.state == "succeeded", later.c.started_at >= builds.c.started_at
        )
        chosen = sa.select(builds).where(builds.c.key == key, builds.c.state == "failed", ~success)
        with self._database.reading() as connection:
            rows = connection.execute(chosen.order_by(builds.c.started_at.desc(), builds.c.id))
            return [BuildRecord(**row._mapping) for row in rows]  # noqa: SLF001

    def builds(self, key: str | None = None, limit: int = 100) -> list[BuildRecord]:
        """Attempts, newest first."""
        chosen = sa.select(builds).order_by(builds.c.started_at.desc(), builds.c.id).limit(limit)
        if key is not None:
            chosen = chosen.where(builds.c.key == key)
        with self._database.reading() as connection:
            return [BuildRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001  the public way to names

    def record_miss(self, key: str, reason: str, nearest_key: str | None, differing: Sequence[str]) -> None:
        """Count a miss of this key."""
        what = {"reason": reason, "nearest_key": nearest_key, "differing": json.dumps(differing), "last_at": utc_now()}
        counted = {**what, "count": misses.c.count + 1}
        with self._database.writing() as connection:
            first = insert(misses).values(key=key, count=1, **what)
            connection.execute(first.on_conflict_do_update(index_elements=["key"], set_=counted))

    def misses(self, limit: int = 100) -> list[MissRecord]:
        """Misses, latest first."""
        chosen = sa.select(misses).order_by(misses.c.last_at.desc(), misses.c.key).limit(limit)
        with self._database.reading() as connection:
            rows = connection.execute(chosen).all()
        return [
            MissRecord(key, reason, nearest_key, tuple(json.loads(differing)), count, last_at)
            for key, reason, nearest_key, differing, count, last_at in rows
        ]

    def recall(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """What this host found in a file of this fingerprint, or None."""
        if max(fingerprint.mtime_ns, fingerprint.ctime_ns) > _MAX_INTEGER:
            return None
        row = self._memo_row(kind, fingerprint)
        chosen = sa.select(file_memo.c.found).where(*(file_memo.c[name] == value for name, value in row.items()))
        with self._database.reading() as connection:
            text = connection.scalar(chosen)
        return None if text is None else dict(json.loads(text))

    def remember(self, kind: MemoKind, fingerprint: Fingerprint, found: dict[str, Any]) -> None:
        """Keep what was found in a file; a registry that is busy or read-only just forgets."""
        if max(fingerprint.mtime_ns, fingerprint.ctime_ns) > _MAX_INTEGER:
            return
        row = {**self._memo_row(kind, fingerprint), "found": json.dumps(found)}
        place = ["host", "kind", "device", "inode"]
        try:
            with self._hasty.writing() as connection:
                connection.execute(insert(file_memo).values(row).on_conflict_do_update(index_elements=place, set_=row))
        except RegistryError:
            return

    def _memo_row(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any]:
        # Device and inode are unsigned 64-bit numbers; SQLite's integers are signed.
        return {
            "host": self._host,
            "kind": kind,
            "device": str(fingerprint.device),
            "inode": str(fingerprint.inode),
            "size_bytes": fingerprint.size_bytes,
            "mtime_ns": fingerprint.mtime_ns,
            "ctime_ns": fingerprint.ctime_ns,
        }

    def record_load(self, load: LoadRecord) -> None:
        """Keep what came of loading a blob, in place of what is known of the same four."""
        row = {column.name: getattr(load, column.name) for column in loads.c}
        place = ["digest", "device", "toolchain", "driver"]
        with self._database.writing() as connection:
            connection.execute(insert(loads).values(row).on_conflict_do_update(index_elements=place, set_=row))

    def find_load(self, digest: str, device: str, toolchain: str, driver: str) -> LoadRecord | None:
        """What came of the last loading of the blob by this toolchain, on this class of GPU, under this driver."""
        asked = {"digest": digest, "device": device, "toolchain": toolchain, "driver": driver}
        chosen = sa.select(loads).where(*(loads.c[name] == value for name, value in asked.items()))
        with self._database.reading() as connection:
            row = connection.execute(chosen).one_or_none()
        return None if row is None else LoadRecord(**row._mapping)  # noqa: SLF001  the public way to names

    def loads(self, digest: str) -> list[LoadRecord]:
        """What is known of loading a blob, latest first."""
        chosen = sa.select(loads).where(loads.c.digest == digest).order_by(loads.c.at.desc(), loads.c.device)
        with self._database.reading() as connection:
            return [LoadRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001

    def inflation(self) -> list[InflationStep]:
        """The steps of eviction's inflation that are kept, oldest first."""
        chosen = sa.select(inflation.c.at, inflation.c.value).order_by(inflation.c.at)
        with self._database.reading() as connection:
            return [InflationStep(at, value) for at, value in connection.execute(chosen)]

    def record_inflation(self, step: InflationStep, oldest_use: dt.datetime) -> None:
        """Keep a step, and forget those that ended before ``oldest_use``."""
        in_force = sa.select(sa.func.max(inflation.c.at)).where(inflation.c.at <= min(oldest_use, step.at))
        with self._database.writing() as connection:
            highest = connection.scalar(sa.select(sa.func.max(inflation.c.value)))
            value = step.value if highest is None else max(highest, step.value)
            connection.execute(sa.delete(inflation).where(inflation.c.at >= step.at))
            connection.execute(sa.delete(inflation).where(inflation.c.at < in_force.scalar_subquery()))
            connection.execute(sa.insert(inflation).values(at=step.at, value=value))

    def stored_bytes(self) -> int:
        """Bytes of all blobs that an entry names, each counted once."""
        is_named = sa.exists().where(entries.c.digest == blobs.c.digest)
        with self._database.reading() as connection:
            return connection.scalar(sa.select(sa.func.sum(blobs.c.size_bytes)).where(is_named)) or 0

    def totals(self) -> RegistryTotals:
        """Counts and sums."""
        stored = sa.select(blobs.c.size_bytes).where(blobs.c.digest.in_(sa.select(entries.c.digest))).subquery()
        with self._database.reading() as connection:
            states = connection.execute(
                sa.select(builds.c.state, sa.func.count(), sa.func.sum(builds.c.build_seconds)).group_by(builds.c.state)
            )
            by_state = {state: (count, seconds or 0.0) for state, count, seconds in states}
            sizes = connection.execute(sa.select(sa.func.count(), sa.func.sum(stored.c.size_bytes))).one()
            return RegistryTotals(
                entries=connection.scalar(sa.select(sa.func.count()).select_from(entries)) or 0,
                blobs=sizes[0],
                size_bytes=sizes[1] or 0,
                pinned=connection.scalar(
                    sa.select(sa.func.count()).select_from(entries.join(pins, pins.c.key == entries.c.key))
                )
                or 0,
                builds_succeeded=by_state.get("succeeded", (0, 0.0))[0],
                builds_failed=by_state.get("failed", (0, 0.0))[0],
                build_seconds=by_state.get("succeeded", (0, 0.0))[1],
                misses=connection.scalar(sa.select(sa.func.sum(misses.c.count))) or 0,
            )


def _entry(row: sa.Row[Any]) -> EntryRecord:
    values = dict(row._mapping)  # noqa: SLF001  the public way to a row's names
    values["compute_capabilities"] = tuple(json.loads(values["compute_capabilities"]))
    values["is_pinned"] = bool(values["is_pinned"])
    return EntryRecord(**values)


def _drop_blob_if_unnamed(connection: sa.Connection, digest: str | None) -> None:
    """Forget a blob that no entry names, except a quarantined one, whose reason is still wanted."""
    is_named = sa.exists().where(entries.c.digest == digest)
    connection.execute(sa.delete(blobs).where(blobs.c.digest == digest, ~is_named, blobs.c.quarantine_reason.is_(None)))
