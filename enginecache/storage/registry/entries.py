"""Rows of the stored engines."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from enginecache.files.units import utc_now
from enginecache.storage.registry.reader import RegistryReader, capabilities_of, entry_of
from enginecache.storage.registry.rows import (
    EntryRecord,
    ExaminedRow,
    RegistryTotals,
    SetAside,
    Standing,
    stored_time,
)
from enginecache.storage.registry.tables import (
    answers,
    blobs,
    builds,
    entries,
    misses,
    models,
    pins,
    set_asides,
    upsert,
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
_WEIGHED = """
    SELECT model_digest, digest, key, backend, tensorrt_version, compute_capabilities,
           build_id, build_seconds, created_at
    FROM entries
"""
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
_SIZES = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(blobs.c.size_bytes), 0)).select_from(blobs)
_UNNAMED = sa.select(blobs.c.digest).where(~sa.exists().where(entries.c.digest == blobs.c.digest))
_ROW: sa.ColumnElement[int] = sa.literal_column("entries.rowid")
_NEWEST_FIRST = (entries.c.created_at.desc(), entries.c.key)


class Entries(RegistryReader):
    """Queries on the entries, with their models, blobs and pins."""

    def entries(self, limit: int | None = None) -> list[EntryRecord]:
        """Return the entries, newest first: all, or the newest ``limit``."""
        with self._reading() as connection:
            return [_entry(row) for row in connection.execute(_ENTRY.order_by(*_NEWEST_FIRST).limit(limit))]

    def standings(self, noted: Mapping[str, dt.datetime]) -> list[Standing]:
        """Return what eviction weighs of every entry, in no order; ``noted`` says when keys were last used."""
        # Joined here: SQLite looks each row's blob and model up in a tree, which takes twice as long. Through the
        # driver, because SQLAlchemy's rows and types take as long again (measured 2026-11, 100,000 entries).
        with self._looking() as connection:
            connection.execute("BEGIN")  # one snapshot
            sizes = dict(connection.execute("SELECT digest, size_bytes FROM blobs").fetchall())
            names = dict(connection.execute("SELECT digest, name FROM models").fetchall())
            pinned = {key for (key,) in connection.execute("SELECT key FROM pins")}
            return [
                _standing(row, names[row[0]], sizes[row[1]], noted, is_pinned=row[2] in pinned)
                for row in connection.execute(_WEIGHED)
                if row[0] in names and row[1] in sizes  # else a check finds it
            ]

    def relatives(self, structure: str, weights: str) -> Iterator[EntryRecord]:
        """Return the entries of models that share the structure or the weights, newest first."""
        related = sa.or_(models.c.structure == structure, models.c.weights == weights)
        with self._reading() as connection:
            rows = connection.execute(_ENTRY.where(related).order_by(*_NEWEST_FIRST)).all()
            return iter([_entry(row) for row in rows])

    def publish(self, entry: EntryRecord) -> None:
        """Commit the entry, its model and blob, and its build's success: all or nothing.

        Replaces an entry of the same key. The blob must be durable already.
        """
        finished = {"state": "succeeded", "build_seconds": entry.build_seconds}
        with self._writing() as connection:
            connection.execute(sa.update(builds).where(builds.c.id == entry.build_id).values(finished))
            _put_entry(connection, entry)

    def record_check(self, key: str, build_id: str, check_json: str) -> bool:
        """Keep the result of a check with the entry of this attempt; return False if the key has another one by now."""
        chosen = sa.update(entries).where(entries.c.key == key, entries.c.build_id == build_id)
        with self._writing() as connection:
            found = connection.execute(chosen.values(check_json=check_json).returning(entries.c.key)).first()
            connection.execute(sa.delete(answers).where(answers.c.key == key))  # they say what the check was before
        return found is not None

    def remove(self, key: str, *, digest: str | None = None) -> bool:
        """Delete the entry; return False if it is missing, pinned, or no longer has ``digest``."""
        chosen = sa.delete(entries).where(entries.c.key == key, entries.c.key.not_in(sa.select(pins.c.key)))
        if digest is not None:
            chosen = chosen.where(entries.c.digest == digest)
        with self._writing() as connection:
            removed = connection.scalar(chosen.returning(entries.c.digest))
            if removed is not None:
                _drop_blob_if_unnamed(connection, removed)
        return removed is not None

    def forget_blob(self, digest: str, reason: str) -> list[str]:
        """Delete every entry of a damaged blob, and record why; return the keys that lost their engine."""
        with self._writing() as connection:
            named = sa.select(entries.c.key, models.c.name).where(entries.c.digest == digest).order_by(entries.c.key)
            found = connection.execute(named.outerjoin_from(entries, models)).all()
            keys = [key for key, _ in found]
            for key, name in found:
                row = {"key": key, "digest": digest, "model_name": name or "", "reason": reason, "at": utc_now()}
                connection.execute(upsert(set_asides, row))
            connection.execute(sa.delete(entries).where(entries.c.digest == digest))
            connection.execute(sa.update(blobs).where(blobs.c.digest == digest).values(quarantine_reason=reason))
        return keys

    def set_aside(self, key: str) -> SetAside | None:
        """Return the damaged engine that the key had, if none was published since."""
        with self._reading() as connection:
            row = connection.execute(sa.select(set_asides).where(set_asides.c.key == key)).one_or_none()
        return None if row is None else SetAside(**row._mapping)  # noqa: SLF001  the public way to names

    def set_asides(self) -> list[SetAside]:
        """Return the damaged engines that were not built anew since, latest first."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(set_asides).order_by(set_asides.c.at.desc(), set_asides.c.key))
            return [SetAside(**row._mapping) for row in rows]  # noqa: SLF001

    def keys(self) -> set[str]:
        """Return the keys of all entries."""
        with self._reading() as connection:
            return set(connection.scalars(sa.select(entries.c.key)))

    def named(self) -> set[str]:
        """Return the blobs that a row names, also a damaged row."""
        with self._looking() as connection:
            return {digest for (digest,) in connection.execute("SELECT digest FROM entries")}

    def is_referenced(self, digest: str) -> bool:
        """Return whether any entry names the blob."""
        with self._reading() as connection:
            return connection.execute(sa.select(entries.c.key).where(entries.c.digest == digest)).first() is not None

    def entries_of(self, digest: str) -> list[EntryRecord]:
        """Return the entries that name the blob, in the order of their keys; not those whose row is damaged."""
        rows = self._examine(_EXAMINED.where(_in_table(entries.c.digest == digest)).order_by(entries.c.key))
        return [row.record for row in rows if row.record is not None and row.digest == digest]

    def examine(self) -> list[ExaminedRow]:
        """Return every entry's row, also those that nothing else shows, because a row that they name is missing."""
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
                connection.execute(upsert(builds, _build_of(entry), {}))
                _put_entry(connection, entry)
            for key in pinned:
                connection.execute(upsert(pins, {"key": key, "pinned_at": utc_now()}, {}))

    def pin(self, key: str) -> None:
        """Exempt the entry from every prune. Idempotent."""
        with self._writing() as connection:
            connection.execute(upsert(pins, {"key": key, "pinned_at": utc_now()}, {}))

    def unpin(self, key: str) -> None:
        """Allow a prune to delete the entry again. Idempotent."""
        with self._writing() as connection:
            connection.execute(sa.delete(pins).where(pins.c.key == key))

    def stored_bytes(self) -> int:
        """Return the bytes of all blobs that an entry names, each counted once. Quick."""
        with self._reading() as connection:
            return _stored(connection)[1]

    def totals(self) -> RegistryTotals:
        """Return counts and sums."""
        is_stored = sa.exists().where(entries.c.key == pins.c.key)
        by_state = sa.select(builds.c.state, sa.func.count(), sa.func.sum(builds.c.build_seconds))
        by_state = by_state.where(builds.c.reason != "interrupted")  # Ctrl-C is no failure
        with self._reading() as connection:
            states = connection.execute(by_state.group_by(builds.c.state))
            attempts = {state: (count, seconds or 0.0) for state, count, seconds in states}
            stored, size_bytes = _stored(connection)
            return RegistryTotals(
                entries=connection.scalar(sa.select(sa.func.count()).select_from(entries)) or 0,
                blobs=stored,
                size_bytes=size_bytes,
                pinned=connection.scalar(sa.select(sa.func.count()).select_from(pins).where(is_stored)) or 0,
                builds_succeeded=attempts.get("succeeded", (0, 0.0))[0],
                builds_failed=attempts.get("failed", (0, 0.0))[0],
                build_seconds=attempts.get("succeeded", (0, 0.0))[1],
                misses=connection.scalar(sa.select(sa.func.sum(misses.c.count))) or 0,
            )


def _stored(connection: sa.Connection) -> tuple[int, int]:
    """Return how many blobs are named by an entry, and their bytes.

    All but the unnamed, of which there are few: two passes along indexes, in a third of the time of looking each named
    one up (measured 2026-11).
    """
    count, size_bytes = connection.execute(_SIZES).one()
    unnamed, unnamed_bytes = connection.execute(_SIZES.where(blobs.c.digest.in_(_UNNAMED))).one()
    return count - unnamed, size_bytes - unnamed_bytes


def _in_table(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Return the condition, met through an index, with every value read from the table.

    With one bit of an index flipped it leads to another row. SQLite does not compare the two, and where a query names
    an indexed column it gives the index's value with the rest of the other row (seen with 3.40.1): another engine under
    the key that was asked for.
    """
    return _ROW.in_(sa.select(_ROW).select_from(entries).where(condition))


def _entry(row: sa.Row[Any]) -> EntryRecord:
    return entry_of(dict(row._mapping))  # noqa: SLF001  the public way to a row's names


def _standing(
    row: tuple[Any, ...], name: str, size_bytes: int, noted: Mapping[str, dt.datetime], *, is_pinned: bool
) -> Standing:
    _, digest, key, backend, version, capabilities, build_id, seconds, created_at = row
    # What it is weighed by. Whatever is to go is read whole before it does.
    if not (type(size_bytes) is int and size_bytes >= 0 and type(seconds) is float and 0 <= seconds < math.inf):
        raise ValueError(f"{str(key)[:12]} has {size_bytes!r:.30} bytes and took {seconds!r:.30} s")
    used_at = noted.get(key) or stored_time(created_at)
    reach = capabilities_of(capabilities)
    # By place: by name it takes half as long again.
    return Standing(key, digest, name, size_bytes, backend, version, reach, build_id, seconds, used_at, is_pinned)


def _examined(values: dict[str, Any]) -> ExaminedRow:
    attempt = values.pop("attempt")
    key, digest = values["key"], values["digest"]
    parents = {"model": values["model_name"], "blob": values["size_bytes"], "attempt": attempt}
    absent = [name for name, value in parents.items() if value is None]
    if absent:
        return ExaminedRow(key, digest, None, f"the row of its {absent[0]} is missing")
    try:
        return ExaminedRow(key, digest, entry_of(values))
    except (ValueError, TypeError) as error:
        return ExaminedRow(key, digest, None, str(error))


def _put_entry(connection: sa.Connection, entry: EntryRecord) -> None:
    fields = entry.fields
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
    row["seal"] = entry.right_seal
    connection.execute(upsert(models, model, {}))
    # Its size too: the bytes are there and have the digest, so a row of another size is damaged.
    healed = {"quarantine_reason": None, "size_bytes": entry.size_bytes}
    connection.execute(upsert(blobs, blob, healed))
    replaced = connection.scalar(sa.select(entries.c.digest).where(entries.c.key == entry.key))
    connection.execute(upsert(entries, row))
    connection.execute(sa.delete(set_asides).where(set_asides.c.key == entry.key))
    connection.execute(sa.delete(answers).where(answers.c.key == entry.key))  # they say what the check was before
    _drop_blob_if_unnamed(connection, replaced)


def _build_of(entry: EntryRecord) -> dict[str, Any]:
    """Return the row of the attempt that made an entry, as far as the entry has it."""
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


def _drop_blob_if_unnamed(connection: sa.Connection, digest: str | None) -> None:
    """Delete the row of a blob that no entry names, except a quarantined one, whose reason is still wanted."""
    is_named = sa.exists().where(entries.c.digest == digest)
    connection.execute(sa.delete(blobs).where(blobs.c.digest == digest, ~is_named, blobs.c.quarantine_reason.is_(None)))
