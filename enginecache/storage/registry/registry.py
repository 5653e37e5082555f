"""The registry in a SQL database, through SQLAlchemy Core."""

from __future__ import annotations

from enginecache.storage.registry.entries import SqlEntries
from enginecache.storage.registry.history import SqlHistory
from enginecache.storage.registry.loads import SqlNotes
from enginecache.storage.registry.memos import SqlMemos


class SqlRegistry(SqlEntries, SqlHistory, SqlMemos, SqlNotes):
    """Implements :class:`~enginecache.storage.registry.base.Registry` on one SQLite file."""
