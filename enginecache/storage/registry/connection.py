"""What the parts of the registry share: its database, and one way to read and to write."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import cast

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from enginecache.files.mounts import boot_id
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.rows import damaged_registry
from enginecache.storage.registry.tables import METADATA


class Session:
    """One SQLite file; while it is not made yet, no row is there, and nothing can be written.

    Args:
        database: Where the rows are; its schema is current.
        boot: Name of the host's boot, in which alone what was found in files is believed; default: the present one.
    """

    def __init__(self, database: Database, boot: str | None = None) -> None:
        self._database = database
        # Its own short time-out: a memo is worth less than the wait for it.
        self._hasty = Database(database.path, busy_timeout_s=0.0)
        self._boot = boot_id() if boot is None else boot

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """Like :meth:`Database.reading`; what a row's values cannot be is a damaged registry too."""
        try:
            with self._database.reading() if self._database.is_made else _nothing() as connection:
                yield connection
        except (ValueError, TypeError, KeyError, OverflowError, sa.exc.InvalidRequestError) as error:
            raise damaged_registry(self._database.path, error) from error

    @contextlib.contextmanager
    def _looking(self) -> Iterator[sqlite3.Connection]:
        """Like :meth:`_reading`, through the driver alone, where SQLAlchemy would take most of the time."""
        try:
            if not self._database.is_made:
                with _nothing() as empty:
                    yield cast("sqlite3.Connection", empty.connection.driver_connection)
                return
            with self._database.looking() as connection:
                yield connection
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise damaged_registry(self._database.path, error) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Like :meth:`Database.writing`; SQLite quotes damaged text in its errors, and Python cannot read it."""
        try:
            with self._database.writing() as connection:
                yield connection
        except UnicodeDecodeError as error:
            raise damaged_registry(self._database.path, error) from error


@contextlib.contextmanager
def _nothing() -> Iterator[sa.Connection]:
    """A registry without rows, in memory."""
    with sa.create_engine("sqlite://", poolclass=NullPool).connect() as connection:
        METADATA.create_all(connection)
        yield connection
