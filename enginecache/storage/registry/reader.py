"""The queries of a hit, through SQLite's driver alone: nothing here loads SQLAlchemy."""

from __future__ import annotations

import functools
import json
from typing import Any

from enginecache.storage.registry.memos import Memos
from enginecache.storage.registry.rows import MIXED_UP, EntryRecord, stored_time

COLUMNS = (
    "key",
    "key_json",
    "key_version",
    "model_digest",
    "digest",
    "backend",
    "tensorrt_version",
    "compute_capabilities",
    "device_name",
    "driver_version",
    "build_id",
    "build_seconds",
    "created_at",
    "timing_cache_digest",
    "check_json",
    "seal",
)
"""Of the table of entries, in its order."""
_NAMES = (*COLUMNS, "model_name", "size_bytes", "is_pinned")
_FOUND = f"""
    SELECT {", ".join(f"entries.{column}" for column in COLUMNS)}, models.name, blobs.size_bytes,
           pins.key IS NOT NULL
    FROM entries
    JOIN models ON models.digest = entries.model_digest
    JOIN blobs ON blobs.digest = entries.digest
    LEFT JOIN pins ON pins.key = entries.key
"""  # noqa: S608  columns' names
_FIND = _FOUND + "WHERE entries.rowid IN (SELECT rowid FROM entries WHERE key = ?)"  # noqa: S608
"""The entry of a key; see :func:`_in_table`."""
_FIND_PREFIX = f"""
    {_FOUND} WHERE entries.rowid IN (SELECT rowid FROM entries WHERE key >= ? AND key < ? ORDER BY key LIMIT ?)
    ORDER BY entries.key
"""  # noqa: S608
"""A range, not LIKE: it uses the primary key's index, and no character of the prefix is special."""
_CURRENT = "SELECT build_id, check_json FROM entries WHERE key = ?"
_SIBLINGS = "SELECT build_id FROM entries WHERE model_digest = ? ORDER BY key"


class RegistryReader(Memos):
    """Finds stored engines, and remembers what was found in files.

    Transactional; safe across threads, forks and processes. Every method may raise ``RegistryError``.
    """

    def find(self, key: str) -> EntryRecord | None:
        """Return the entry of exactly this key."""
        with self._looking() as connection:
            rows = connection.execute(_FIND, (key,)).fetchall()
            records = [_looked_up(row) for row in rows]
            if any(record.key != key for record in records[:1]):
                raise ValueError(f"the row of {key[:12]} is that of {records[0].key[:12]}")
            if len(records) > 1:
                raise ValueError(f"{key[:12]} has {len(records)} rows")
            if records:
                _require_seal(records[0])
        return records[0] if records else None

    def has_entry(self, key: str) -> bool:
        """Return whether the key has an entry."""
        with self._looking() as connection:
            return connection.execute("SELECT build_id FROM entries WHERE key = ?", (key,)).fetchone() is not None

    def is_current(self, record: EntryRecord) -> bool:
        """Return whether the key still has this entry, with the same check of its numbers."""
        with self._looking() as connection:
            found = connection.execute(_CURRENT, (record.key,)).fetchone()
        return bool(found == (record.build_id, record.check_json))

    def siblings(self, model_digest: str) -> str:
        """Return the attempts that made the model's entries, in the order of their keys, joined by commas."""
        with self._looking() as connection:
            return ",".join(build_id for (build_id,) in connection.execute(_SIBLINGS, (model_digest,)))

    def find_prefix(self, prefix: str, limit: int = 8) -> list[EntryRecord]:
        """Return the entries whose key begins with ``prefix``, at most ``limit``, in the order of their keys."""
        with self._looking() as connection:
            rows = connection.execute(_FIND_PREFIX, (prefix, f"{prefix}g", limit)).fetchall()
            records = [_looked_up(row) for row in rows]
            for record in records:
                if not record.key.startswith(prefix):
                    raise ValueError(f"a row of the keys that begin with {prefix} is that of {record.key[:12]}")
                _require_seal(record)
        return records


def _require_seal(record: EntryRecord) -> None:
    if not record.is_as_written:
        raise ValueError(f"the row of {record.key[:12]}: {MIXED_UP}")


def _looked_up(row: tuple[Any, ...]) -> EntryRecord:
    values = dict(zip(_NAMES, row, strict=True))
    values["created_at"] = stored_time(values["created_at"])
    return entry_of(values)


def entry_of(values: dict[str, Any]) -> EntryRecord:
    """Return the entry of a row's values, which are checked."""
    values["compute_capabilities"] = capabilities_of(values["compute_capabilities"])
    values["is_pinned"] = bool(values["is_pinned"])
    values["seal"] = values["seal"] or ""
    return EntryRecord.of_values(values)


@functools.lru_cache
def capabilities_of(text: str) -> tuple[str, ...]:
    """Return the compute capabilities of a row."""
    return tuple(json.loads(text))
