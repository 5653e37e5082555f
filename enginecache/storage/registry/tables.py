"""The registry's tables. ``migrations/`` makes them; ``alembic check`` in the tests holds the two together."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

HEX = sa.String(64)


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """An aware time in UTC; SQLite has no time zones, so it is stored without and read back with one."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Any) -> dt.datetime | None:  # noqa: ARG002
        """Convert to UTC, without a time zone."""
        return None if value is None else value.astimezone(dt.timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: Any) -> dt.datetime | None:  # noqa: ARG002
        """Add the time zone again."""
        return None if value is None else value.replace(tzinfo=dt.timezone.utc)


def upsert(table: sa.Table, row: Mapping[str, Any], update: Mapping[str, Any] | None = None) -> sa.Executable:
    """Return the statement that inserts a row, or updates the one that has its primary key.

    Args:
        table: The table.
        row: Values by column.
        update: What to set in a row that is there already; all of ``row`` by default, nothing where it is empty.
    """
    statement = sqlite.insert(table).values(dict(row))
    update = row if update is None else update
    if not update:
        return statement.on_conflict_do_nothing()
    return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=dict(update))


def making(table: sa.Table) -> str:
    """Return the statement that makes a table where it is missing."""
    return str(sa.schema.CreateTable(table, if_not_exists=True).compile(dialect=sqlite.dialect()))


schema_info = sa.Table(
    "schema_info",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("oldest_reader", sa.Integer, nullable=False),
)

models = sa.Table(
    "models",
    METADATA,
    sa.Column("digest", HEX, primary_key=True),
    sa.Column("structure", HEX, nullable=False, index=True),
    sa.Column("weights", HEX, nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("first_seen_at", UtcDateTime, nullable=False),
)

blobs = sa.Table(
    "blobs",
    METADATA,
    sa.Column("digest", HEX, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("stored_at", UtcDateTime, nullable=False),
    sa.Column("quarantine_reason", sa.Text),
)

builds = sa.Table(
    "builds",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("key", HEX, nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=False, index=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("build_seconds", sa.Float),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("is_lasting", sa.Boolean),
)

entries = sa.Table(
    "entries",
    METADATA,
    sa.Column("key", HEX, primary_key=True),
    sa.Column("key_json", sa.Text, nullable=False),
    sa.Column("key_version", sa.Integer, nullable=False),
    sa.Column("model_digest", HEX, sa.ForeignKey("models.digest"), nullable=False, index=True),
    sa.Column("digest", HEX, sa.ForeignKey("blobs.digest"), nullable=False, index=True),
    sa.Column("backend", sa.String(32), nullable=False),
    sa.Column("tensorrt_version", sa.Text, nullable=False),
    sa.Column("compute_capabilities", sa.Text, nullable=False),
    sa.Column("device_name", sa.Text),
    sa.Column("driver_version", sa.Text),
    sa.Column("build_id", sa.String(32), sa.ForeignKey("builds.id"), nullable=False),
    sa.Column("build_seconds", sa.Float, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False, index=True),
    sa.Column("timing_cache_digest", HEX),
    sa.Column("check_json", sa.Text),
    sa.Column("seal", HEX),
)

set_asides = sa.Table(
    "set_asides",
    METADATA,
    # The keys whose engine was damaged, until they are built anew: the entry's row is deleted.
    sa.Column("key", HEX, primary_key=True),
    sa.Column("digest", HEX, nullable=False),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
)

loads = sa.Table(
    "loads",
    METADATA,
    # No foreign key to blobs: that a plan was bad is worth knowing after its deletion.
    sa.Column("digest", HEX, primary_key=True),
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("toolchain", sa.Text, primary_key=True),
    sa.Column("driver", sa.Text, primary_key=True),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("boot", sa.Text, nullable=False),
)

pins = sa.Table(
    "pins",
    METADATA,
    # No foreign key to entries: a pin outlives an engine that turned out corrupt, and holds for the one rebuilt.
    sa.Column("key", HEX, primary_key=True),
    sa.Column("pinned_at", UtcDateTime, nullable=False),
)

inflation = sa.Table(
    "inflation",
    METADATA,
    sa.Column("at", UtcDateTime, primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
)

answers = sa.Table(
    "answers",
    METADATA,
    sa.Column("command", HEX, primary_key=True),
    sa.Column("key", HEX, nullable=False),
    sa.Column("build_id", sa.String(32), nullable=False),
    sa.Column("watched", sa.LargeBinary, nullable=False),
    sa.Column("said", sa.LargeBinary, nullable=False),
    sa.Column("printed", sa.LargeBinary, nullable=False),
    sa.Column("seal", HEX, nullable=False),
    sa.Column("boot", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("siblings", sa.Text),
)

misses = sa.Table(
    "misses",
    METADATA,
    sa.Column("key", HEX, primary_key=True),
    sa.Column("reason", sa.String(16), nullable=False),
    sa.Column("nearest_key", HEX),
    sa.Column("differing", sa.Text, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("last_at", UtcDateTime, nullable=False),
)

file_memo = sa.Table(
    "file_memo",
    METADATA,
    sa.Column("boot", sa.Text, primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("mount", sa.Text, primary_key=True),
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("inode", sa.Text, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("mtime_ns", sa.BigInteger, nullable=False),
    sa.Column("ctime_ns", sa.BigInteger, nullable=False),
    sa.Column("found", sa.Text, nullable=False),
)
