"""The registry in a SQL database, through SQLAlchemy Core."""

from __future__ import annotations

from enginecache.registry.entries import SqlEntries
from enginecache.registry.history import SqlHistory
from enginecache.registry.memos import SqlMemos
from enginecache.registry.notes import SqlNotes


class SqlRegistry(SqlEntries, SqlHistory, SqlMemos, SqlNotes):
    """Implements :class:`~enginecache.registry.base.Registry` on one SQLite file."""
