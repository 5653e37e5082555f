"""The registry in a SQL database, through SQLAlchemy Core."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import blake3
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from enginecache.errors import RegistryError
from enginecache.fingerprint import Fingerprint
from enginecache.key import Fields, canonical_json
from enginecache.registry.base import (
    AnswerRecord,
    BuildRecord,
    EntryRecord,
    ExaminedRow,
    InflationStep,
    LoadRecord,
    MemoKind,
    MissRecord,
    RegistryTotals,
    damaged_registry,
    utc_now,
)
from enginecache.registry.database import Database
from enginecache.registry.tables import (
    answers,
    blobs,
    builds,
    entries,
    file_memo,
    inflation,
    loads,
    misses,
    models,
    pins,
)

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
_EXAMINED = sa.select(
    entries,
    models.c.name.label("model_name"),
    blobs.c.size_bytes,
    sa.false().label("is_pinned"),
    builds.c.id.label("attempt"),
).select_from(
    entries.outerjoin(models, models.c.digest == entries.c.model_digest)
    .outerjoin(blobs, blobs.c.digest == entries.c.digest)
    .outerjoin(builds, builds.c.id == entries.c.build_id)
)
_ROW: sa.ColumnElement[int] = sa.literal_column("entries.rowid")
_GONE = {"state": "abandoned", "reason": "its process ended before the build did"}
_MAX_INTEGER = 2**63 - 1
"""SQLite's largest; a time in nanoseconds passes it in the year 2262, and a file can be given such a time."""
MAX_ANSWERS = 1000
"""Of command lines; the newest are kept."""

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

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """Like :meth:`Database.reading`; what a row's values cannot be is a damaged registry too."""
        try:
            with self._database.reading() as connection:
                yield connection
        except (ValueError, TypeError, KeyError, OverflowError, sa.exc.InvalidRequestError) as error:
            raise damaged_registry(self._database.path, error) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Like :meth:`Database.writing`; SQLite quotes damaged text in its errors, and Python cannot read it."""
        try:
            with self._database.writing() as connection:
                yield connection
        except UnicodeDecodeError as error:
            raise damaged_registry(self._database.path, error) from error

    def find(self, key: str) -> EntryRecord | None:
        """The entry of exactly this key."""
        with self._reading() as connection:
            row = connection.execute(_ENTRY.where(_in_table(entries.c.key == key))).one_or_none()
            found = None if row is None else _entry(row)
        if found is not None and found.key != key:
            raise damaged_registry(self._database.path, f"the row of {key[:12]} is that of {found.key[:12]}")
        return found

    def has_entry(self, key: str, build_id: str | None = None) -> bool:
        """Whether the key has an entry, and that of this attempt if one is named."""
        with self._database.looking() as connection:  # not SQLAlchemy, which takes three times as long
            found = connection.execute("SELECT build_id FROM entries WHERE key = ?", (key,)).fetchone()
        return found is not None and build_id in {None, found[0]}

    def find_prefix(self, prefix: str, limit: int = 8) -> list[EntryRecord]:
        """Entries whose key begins with ``prefix``, at most ``limit``, in the order of their keys."""
        # A range, not LIKE: it uses the primary key's index, and no letter of the prefix is special.
        chosen = sa.select(entries.c.key).where(entries.c.key >= prefix, entries.c.key < prefix + "g")
        with self._reading() as connection:
            keys = connection.scalars(chosen.order_by(entries.c.key).limit(limit)).all()
        return [record for record in map(self.find, keys) if record is not None]

    def entries(self, limit: int | None = None) -> list[EntryRecord]:
        """Entries, newest first: all, or the newest ``limit``."""
        with self._reading() as connection:
            return [_entry(row) for row in connection.execute(_ENTRY.order_by(*_NEWEST_FIRST).limit(limit))]

    def relatives(self, structure: str, weights: str) -> Iterator[EntryRecord]:
        """Entries of models that share the structure or the weights, newest first."""
        related = sa.or_(models.c.structure == structure, models.c.weights == weights)
        with self._reading() as connection:
            rows = connection.execute(_ENTRY.where(related).order_by(*_NEWEST_FIRST)).all()
            return iter([_entry(row) for row in rows])

    def publish(self, entry: EntryRecord, fields: Fields) -> None:
        """Commit the entry, its model and blob, and its build's success: all or nothing."""
        finished = {"state": "succeeded", "build_seconds": entry.build_seconds}
        with self._writing() as connection:
            connection.execute(sa.update(builds).where(builds.c.id == entry.build_id).values(finished))
            _put_entry(connection, entry, fields)

    def remove(self, key: str, *, digest: str | None = None, even_pinned: bool = False) -> bool:
        """Delete the entry; False if it was gone, pinned, or no longer has ``digest``."""
        chosen = sa.delete(entries).where(entries.c.key == key)
        if digest is not None:
            chosen = chosen.where(entries.c.digest == digest)
        if not even_pinned:
            chosen = chosen.where(entries.c.key.not_in(sa.select(pins.c.key)))
        with self._writing() as connection:
            removed = connection.scalar(chosen.returning(entries.c.digest))
            if removed is not None:
                connection.execute(sa.delete(pins).where(pins.c.key == key))
                _drop_blob_if_unnamed(connection, removed)
        return removed is not None

    def forget_blob(self, digest: str, reason: str) -> list[str]:
        """Delete every entry of a blob that is no longer good; the keys that lost their engine."""
        with self._writing() as connection:
            chosen = sa.select(entries.c.key).where(entries.c.digest == digest).order_by(entries.c.key)
            keys = list(connection.scalars(chosen))
            connection.execute(sa.delete(entries).where(entries.c.digest == digest))
            connection.execute(sa.update(blobs).where(blobs.c.digest == digest).values(quarantine_reason=reason))
        return keys

    def is_referenced(self, digest: str) -> bool:
        """Whether any entry names the blob."""
        with self._reading() as connection:
            return connection.execute(sa.select(entries.c.key).where(entries.c.digest == digest)).first() is not None

    def entries_of(self, digest: str) -> list[EntryRecord]:
        """The entries that name the blob, in the order of their keys; not those whose row is damaged."""
        rows = self._examine(_EXAMINED.where(_in_table(entries.c.digest == digest)).order_by(entries.c.key))
        return [row.record for row in rows if row.record is not None and row.digest == digest]

    def examine(self) -> list[ExaminedRow]:
        """Every entry's row, also those that nothing else shows, because a row that they name is gone."""
        return self._examine(_EXAMINED.order_by(*_NEWEST_FIRST))

    def _examine(self, chosen: sa.Select[Any]) -> list[ExaminedRow]:
        with self._reading() as connection:
            rows = connection.execute(chosen).all()
        return [_examined(dict(row._mapping)) for row in rows]  # noqa: SLF001  the public way to names

    def forget_entry(self, key: str) -> None:
        """Delete a row that is damaged, whatever its key is. A pin stays, for the engine that is built anew."""
        with self._writing() as connection:
            digest = connection.scalar(sa.delete(entries).where(entries.c.key == key).returning(entries.c.digest))
            _drop_blob_if_unnamed(connection, digest)

    def restore(self, entries: Iterable[EntryRecord], pinned: Iterable[str] = ()) -> None:
        """Put back entries as they were published, in place of those of the same keys, and pins: all or nothing."""
        with self._writing() as connection:
            for entry in entries:
                connection.execute(insert(builds).values(_build_of(entry)).on_conflict_do_nothing())
                _put_entry(connection, entry, entry.fields)
            for key in pinned:
                connection.execute(insert(pins).values(key=key, pinned_at=utc_now()).on_conflict_do_nothing())

    def pin(self, key: str) -> None:
        """Keep the entry whatever ``prune`` wants. Idempotent."""
        with self._writing() as connection:
            connection.execute(insert(pins).values(key=key, pinned_at=utc_now()).on_conflict_do_nothing())

    def unpin(self, key: str) -> None:
        """Let the entry go when ``prune`` wants. Idempotent."""
        with self._writing() as connection:
            connection.execute(sa.delete(pins).where(pins.c.key == key))

    def start_build(self, build: BuildRecord) -> None:
        """Record an attempt; others of the same key that still say ``running`` are abandoned."""
        row = {column.name: getattr(build, column.name) for column in builds.c}
        with self._writing() as connection:
            still = sa.and_(builds.c.key == build.key, builds.c.state == "running")
            connection.execute(sa.update(builds).where(still).values(_GONE))
            connection.execute(sa.insert(builds).values(row))

    def fail_build(self, build_id: str, seconds: float, reason: str, *, is_lasting: bool = False) -> None:
        """Record that the attempt failed, and why; an attempt whose entry is committed has succeeded."""
        failed = {"state": "failed", "build_seconds": seconds, "reason": reason, "is_lasting": is_lasting}
        with self._writing() as connection:
            running = sa.and_(builds.c.id == build_id, builds.c.state == "running")
            connection.execute(sa.update(builds).where(running).values(failed))

    def attempts_since_success(self, key: str) -> list[BuildRecord]:
        """The attempts at the key since the last that succeeded, newest first."""
        later = builds.alias()
        success = sa.exists().where(
            later.c.key == key, later.c.state == "succeeded", later.c.started_at >= builds.c.started_at
        )
        chosen = sa.select(builds).where(builds.c.key == key, builds.c.state != "succeeded", ~success)
        with self._reading() as connection:
            rows = connection.execute(chosen.order_by(builds.c.started_at.desc(), builds.c.id))
            return [BuildRecord(**row._mapping) for row in rows]  # noqa: SLF001

    def builds(self, key: str | None = None, limit: int = 100) -> list[BuildRecord]:
        """Attempts, newest first."""
        chosen = sa.select(builds).order_by(builds.c.started_at.desc(), builds.c.id).limit(limit)
        if key is not None:
            chosen = chosen.where(builds.c.key == key)
        with self._reading() as connection:
            return [BuildRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001  the public way to names

    def unfinished_builds(self) -> list[BuildRecord]:
        """The attempts that say ``running``, oldest first."""
        chosen = sa.select(builds).where(builds.c.state == "running").order_by(builds.c.started_at, builds.c.id)
        with self._reading() as connection:
            return [BuildRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001

    def abandon_build(self, build_id: str) -> None:
        """Record that the attempt's process died first. Nothing, if it no longer runs."""
        running = sa.and_(builds.c.id == build_id, builds.c.state == "running")
        with self._writing() as connection:
            connection.execute(sa.update(builds).where(running).values(_GONE))

    def lasting_failures(self) -> int:
        """How many keys there are whose latest attempt failed, and would fail again."""
        later = builds.alias()
        is_latest = ~sa.exists().where(later.c.key == builds.c.key, later.c.started_at > builds.c.started_at)
        chosen = sa.select(sa.func.count(builds.c.key.distinct())).where(
            builds.c.state == "failed", builds.c.is_lasting, is_latest
        )
        with self._reading() as connection:
            return connection.scalar(chosen) or 0

    def record_miss(self, key: str, reason: str, nearest_key: str | None, differing: Sequence[str]) -> None:
        """Count a miss of this key."""
        what = {"reason": reason, "nearest_key": nearest_key, "differing": json.dumps(differing), "last_at": utc_now()}
        counted = {**what, "count": misses.c.count + 1}
        with self._writing() as connection:
            first = insert(misses).values(key=key, count=1, **what)
            connection.execute(first.on_conflict_do_update(index_elements=["key"], set_=counted))

    def misses(self, limit: int = 100) -> list[MissRecord]:
        """Misses, latest first."""
        chosen = sa.select(misses).order_by(misses.c.last_at.desc(), misses.c.key).limit(limit)
        with self._reading() as connection:
            return [
                MissRecord(key, reason, nearest_key, tuple(json.loads(differing)), count, last_at)
                for key, reason, nearest_key, differing, count, last_at in connection.execute(chosen)
            ]

    def recall(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """What this host found in a file of this fingerprint, or None."""
        if max(fingerprint.mtime_ns, fingerprint.ctime_ns) > _MAX_INTEGER:
            return None
        row = self._memo_row(kind, fingerprint)
        chosen = sa.select(file_memo.c.found).where(*(file_memo.c[name] == value for name, value in row.items()))
        with self._reading() as connection:
            text = connection.scalar(chosen)
        return _unsealed(text, row)

    def remember(self, kind: MemoKind, fingerprint: Fingerprint, found: dict[str, Any]) -> None:
        """Keep what was found in a file; a registry that is busy or read-only just forgets."""
        if max(fingerprint.mtime_ns, fingerprint.ctime_ns) > _MAX_INTEGER:
            return
        row = {
            **self._memo_row(kind, fingerprint),
            "found": json.dumps({**found, _SEAL: _seal(found, self._memo_row(kind, fingerprint))}),
        }
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

    def remember_answer(self, answer: AnswerRecord) -> None:
        """Keep an answer, in place of the one to the same command line; a registry that is busy just forgets."""
        row = {**vars(answer), "at": utc_now()}
        gone = answers.c.key.not_in(sa.select(entries.c.key))
        newest = sa.select(answers.c.command).order_by(answers.c.at.desc()).limit(MAX_ANSWERS)
        with contextlib.suppress(RegistryError), self._hasty.writing() as connection:
            connection.execute(insert(answers).values(row).on_conflict_do_update(index_elements=["command"], set_=row))
            connection.execute(sa.delete(answers).where(sa.or_(gone, answers.c.command.not_in(newest))))

    def record_load(self, load: LoadRecord) -> None:
        """Keep what came of loading a blob, in place of what is known of the same four. Does not wait for writers."""
        row = {column.name: getattr(load, column.name) for column in loads.c}
        place = ["digest", "device", "toolchain", "driver"]
        with self._hasty.writing() as connection:
            connection.execute(insert(loads).values(row).on_conflict_do_update(index_elements=place, set_=row))

    def find_load(self, digest: str, device: str, toolchain: str, driver: str) -> LoadRecord | None:
        """What came of the last loading of the blob by this toolchain, on this class of GPU, under this driver."""
        asked = {"digest": digest, "device": device, "toolchain": toolchain, "driver": driver}
        chosen = sa.select(loads).where(*(loads.c[name] == value for name, value in asked.items()))
        with self._reading() as connection:
            row = connection.execute(chosen).one_or_none()
        return None if row is None else LoadRecord(**row._mapping)  # noqa: SLF001  the public way to names

    def loads(self, digest: str) -> list[LoadRecord]:
        """What is known of loading a blob, latest first."""
        chosen = sa.select(loads).where(loads.c.digest == digest).order_by(loads.c.at.desc(), loads.c.device)
        with self._reading() as connection:
            return [LoadRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001

    def inflation(self) -> list[InflationStep]:
        """The steps of eviction's inflation that are kept, oldest first."""
        chosen = sa.select(inflation.c.at, inflation.c.value).order_by(inflation.c.at)
        with self._reading() as connection:
            return [InflationStep(at, value) for at, value in connection.execute(chosen)]

    def record_inflation(self, step: InflationStep, oldest_use: dt.datetime) -> None:
        """Keep a step, and forget those that ended before ``oldest_use``."""
        in_force = sa.select(sa.func.max(inflation.c.at)).where(inflation.c.at <= min(oldest_use, step.at))
        with self._writing() as connection:
            highest = connection.scalar(sa.select(sa.func.max(inflation.c.value)))
            value = step.value if highest is None else max(highest, step.value)
            connection.execute(sa.delete(inflation).where(inflation.c.at >= step.at))
            connection.execute(sa.delete(inflation).where(inflation.c.at < in_force.scalar_subquery()))
            connection.execute(sa.insert(inflation).values(at=step.at, value=value))

    def stored_bytes(self) -> int:
        """Bytes of all blobs that an entry names, each counted once."""
        is_named = sa.exists().where(entries.c.digest == blobs.c.digest)
        with self._reading() as connection:
            return connection.scalar(sa.select(sa.func.sum(blobs.c.size_bytes)).where(is_named)) or 0

    def totals(self) -> RegistryTotals:
        """Counts and sums."""
        stored = sa.select(blobs.c.size_bytes).where(blobs.c.digest.in_(sa.select(entries.c.digest))).subquery()
        with self._reading() as connection:
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


def _in_table(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """The condition, met through an index, with every value read from the table.

    With one bit of an index flipped it leads to another row. SQLite does not compare the two, and where a query names
    an indexed column it gives the index's value beside the other row's rest (seen with 3.40.1): another engine under
    the key that was asked for.
    """
    return _ROW.in_(sa.select(_ROW).select_from(entries).where(condition))


def _entry(row: sa.Row[Any]) -> EntryRecord:
    return _entry_of(dict(row._mapping))  # noqa: SLF001  the public way to a row's names


def _entry_of(values: dict[str, Any]) -> EntryRecord:
    values["compute_capabilities"] = _capabilities(values["compute_capabilities"])
    values["is_pinned"] = bool(values["is_pinned"])
    return EntryRecord.of_values(values)


@functools.lru_cache
def _capabilities(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _examined(values: dict[str, Any]) -> ExaminedRow:
    attempt = values.pop("attempt")
    key, digest = values["key"], values["digest"]
    parents = {"model": values["model_name"], "blob": values["size_bytes"], "attempt": attempt}
    absent = [name for name, value in parents.items() if value is None]
    if absent:
        return ExaminedRow(key, digest, None, f"the row of its {absent[0]} is gone")
    try:
        return ExaminedRow(key, digest, _entry_of(values))
    except (ValueError, TypeError) as error:
        return ExaminedRow(key, digest, None, str(error))


def _put_entry(connection: sa.Connection, entry: EntryRecord, fields: Fields) -> None:
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
    connection.execute(insert(models).values(model).on_conflict_do_nothing())
    # Its size too: the bytes are there and have the digest, so a row of another size is damaged.
    healed = {"quarantine_reason": None, "size_bytes": entry.size_bytes}
    connection.execute(insert(blobs).values(blob).on_conflict_do_update(index_elements=["digest"], set_=healed))
    replaced = connection.scalar(sa.select(entries.c.digest).where(entries.c.key == entry.key))
    connection.execute(insert(entries).values(row).on_conflict_do_update(index_elements=["key"], set_=row))
    _drop_blob_if_unnamed(connection, replaced)


def _build_of(entry: EntryRecord) -> dict[str, Any]:
    """The row of the attempt that made an entry, as far as the entry tells."""
    started_at = entry.created_at - dt.timedelta(seconds=min(entry.build_seconds, 1e9))
    return {
        "id": entry.build_id,
        "key": entry.key,
        "state": "succeeded",
        "started_at": started_at,
        "host": "",
        "pid": 0,
        "build_seconds": entry.build_seconds,
        "reason": "",
    }


_SEAL = "blake3"


def _seal(found: dict[str, Any], place: dict[str, Any]) -> str:
    """Digest of a memo with what it is about: a flipped bit in a model's digest would make another key of it."""
    # On one thread: starting others costs a hit a millisecond.
    return blake3.blake3(canonical_json({"found": found, "place": place}).encode("ascii")).hexdigest()


def _unsealed(text: str | None, place: dict[str, Any]) -> dict[str, Any] | None:
    """What a memo's text says; None where it is not what was written."""
    try:
        found = json.loads(text or "null")
        seal = found.pop(_SEAL)
        return dict(found) if seal == _seal(found, place) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _drop_blob_if_unnamed(connection: sa.Connection, digest: str | None) -> None:
    """Forget a blob that no entry names, except a quarantined one, whose reason is still wanted."""
    is_named = sa.exists().where(entries.c.digest == digest)
    connection.execute(sa.delete(blobs).where(blobs.c.digest == digest, ~is_named, blobs.c.quarantine_reason.is_(None)))
