"""Integrity of the registry's file: damage, as opposed to a full disk, a lock or a mode."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import sqlalchemy as sa

from enginecache.errors import RegistryError, SchemaError
from enginecache.storage.registry import schema
from enginecache.storage.registry.database import Database, tells_damage, unavailable
from enginecache.storage.registry.rows import BuildState, LoadOutcome
from enginecache.storage.registry.tables import METADATA


def find_damage(database: Database, mode: int) -> str:
    """Return what is wrong with the file as a database; an empty string for nothing.

    Reads all of it: each page, each index against its table, each value of each row. An older schema is upgraded first,
    as whatever opens the registry does.

    Args:
        database: The registry; a missing file is made.
        mode: File mode for a new file.

    Raises:
        SchemaError: A newer release wrote it.
        RegistryError: It cannot be read or written for a reason outside the file.
    """
    revision = None
    try:
        with database.connected():
            revision = schema.current_revision(database)
            _check_pages(database)
            schema.ensure_schema(database, mode)
            _check_rows(database)
            if schema.current_revision(database) == schema.HEAD:
                schema.check(database)
    except SchemaError as error:
        if revision not in schema.KNOWN:
            raise  # what a newer release wrote is not known to be wrong
        return error.what
    except (RegistryError, sqlite3.Error) as error:
        return _damage_in(error, database.path)
    except (sa.exc.SQLAlchemyError, ValueError, TypeError, KeyError, OverflowError) as error:
        return f"a row cannot be read: {error}"
    return ""


def _damage_in(error: Exception, path: Path) -> str:
    """Return what an error says about the file's content.

    Raises:
        RegistryError: It says something else.
    """
    cause = error if isinstance(error, sqlite3.Error) else error.__cause__
    if tells_damage(cause):
        return str(getattr(cause, "orig", cause))
    if "readonly" in str(cause) and _may_write(path):
        return "SQLite takes it for a file that must not be written"
    if isinstance(error, RegistryError):
        raise error
    raise unavailable(path, error) from error


def _check_pages(database: Database) -> None:
    if not database.path.exists():
        return
    with database.looking() as connection:
        # Not quick_check, which does not compare the indexes with their tables.
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        if _may_write(database.path):
            _try_to_write(connection)


def _try_to_write(connection: sqlite3.Connection) -> None:
    """Begin a change and roll it back: one flipped bit of the header makes the file read-only."""
    connection.execute("BEGIN IMMEDIATE")  # alone it would only read such a file
    try:
        connection.execute("PRAGMA user_version = 0")
    except sqlite3.OperationalError as error:
        if "disk is full" not in str(error):
            raise
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _check_rows(database: Database) -> None:
    with database.reading() as connection:
        for table in METADATA.sorted_tables:
            check = _ROW_CHECKS.get(table.name)
            for row in connection.execute(sa.select(table)):
                if check is not None:
                    check(row)


def _check_build(row: sa.Row[Any]) -> None:
    if row.state not in get_args(BuildState) or not isinstance(row.reason, str):
        raise ValueError(f"an attempt to build is {row.state!r}")


def _check_load(row: sa.Row[Any]) -> None:
    if row.outcome not in get_args(LoadOutcome):
        raise ValueError(f"a loading is {row.outcome!r}")


def _check_miss(row: sa.Row[Any]) -> None:
    json.loads(row.differing)


_ROW_CHECKS: dict[str, Callable[[sa.Row[Any]], None]] = {
    "builds": _check_build,
    "loads": _check_load,
    "misses": _check_miss,
}
"""Entries have a check of their own, row by row: see :meth:`~enginecache.storage.registry.entries.Entries.examine`."""
