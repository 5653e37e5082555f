"""The schema's version: made, upgraded and checked with Alembic; read without it."""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from enginecache.errors import SchemaError
from enginecache.storage.registry.database import Database, unavailable
from enginecache.storage.registry.rows import damaged_registry

if TYPE_CHECKING:
    import sqlalchemy as sa
    from alembic.config import Config

HEAD = "0001"
"""Revision that this release writes: the newest script in ``migrations/versions``."""

KNOWN = (HEAD,)
"""Revisions that this release can upgrade from, oldest first."""

READER = 1
"""This release's number as a reader. A registry names the oldest reader that understands it."""

_ALEMBIC = threading.Lock()
"""Alembic's ``context`` is one per process: two threads at once would run their scripts on each other's database."""


def ensure_schema(database: Database, mode: int) -> None:
    """Make the registry, or upgrade it, or do nothing where it is current. Idempotent; safe across processes.

    Args:
        database: The registry; its folder exists.
        mode: File mode for a new file.

    Raises:
        SchemaError: A newer release wrote it, and it says that this one cannot read it.
        RegistryError: It cannot be opened.
    """
    with database.connected():
        revision = current_revision(database)
        if revision == HEAD or (revision is not None and revision not in KNOWN):
            require_readable(database, revision)
            return
    if revision is None:
        _create_file(database.path, mode)
    upgrade(database)


def current_revision(database: Database) -> str | None:
    """Return the revision that the file says it has; None where there is no registry yet.

    Reads with ``sqlite3`` alone, so that opening a current registry loads no Alembic.

    Raises:
        RegistryError: The file is no SQLite database, or cannot be read.
    """
    path = database.path
    try:
        # An empty file is one whose making was interrupted, or is under way in another process.
        if path.stat().st_size == 0:
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unavailable(path, error) from error
    with _looking(database) as connection:
        found = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'")
        if found.fetchone() is None:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def require_readable(database: Database, revision: str) -> None:
    """Refuse a registry whose schema this release cannot read. Changes nothing.

    Args:
        database: The registry.
        revision: From :func:`current_revision`; one that is not in :data:`KNOWN` is a newer release's.

    Raises:
        SchemaError: It says that only a later reader understands it.
        RegistryError: It cannot be read.
    """
    path = database.path
    with _looking(database) as connection:
        row = connection.execute("SELECT oldest_reader FROM schema_info").fetchone()
    if row is None or not isinstance(row[0], int):
        raise damaged_registry(path, "it does not say who can read it")
    if row[0] > READER:
        message = f"the registry {path} has schema {revision}, which a newer enginecache wrote"
        raise SchemaError(message, "Upgrade enginecache, or name another folder with --dir or ENGINECACHE_DIR.")


def upgrade(database: Database) -> str:
    """Run the migrations up to :data:`HEAD`, all or nothing; the revision that it has then.

    Two processes at once: the second waits for the write lock, then finds nothing left to do.

    Raises:
        SchemaError: It has a revision that this release does not know.
        RegistryError: It cannot be opened or written.
    """
    from alembic import command
    from alembic.util.exc import CommandError

    try:
        with _ALEMBIC, database.migrating() as connection:
            command.upgrade(_alembic_config(connection), HEAD)
    except CommandError as error:
        message = f"the registry {database.path} cannot be upgraded: {error}"
        raise SchemaError(
            message, "Upgrade enginecache, or name another folder with --dir or ENGINECACHE_DIR."
        ) from error
    return HEAD


def check(database: Database) -> None:
    """Compare the tables in the database with the tables in the code.

    Raises:
        SchemaError: They differ.
    """
    from alembic import command
    from alembic.util.exc import CommandError

    try:
        with _ALEMBIC, database.reading() as connection:
            found = _texts(connection)
            if found in _CHECKED:
                return
            command.check(_alembic_config(connection))
            _CHECKED.add(found)
    except CommandError as error:
        message = f"the registry {database.path} differs from what this release expects: {error}"
        raise SchemaError(
            message, "Run `enginecache db upgrade`; if that does not help, keep the file and report it."
        ) from error


def _texts(connection: sa.Connection) -> tuple[object, ...]:
    """Return the texts of all tables and indexes, and the revision: everything that :func:`check` compares."""
    tables = connection.exec_driver_sql("SELECT type, name, sql FROM sqlite_master ORDER BY type, name")
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version")
    return (*map(tuple, tables), *map(tuple, revision))


_CHECKED: set[tuple[object, ...]] = set()
"""Schemas that passed :func:`check` in this process: Alembic takes a hundred times as long as reading their texts."""


def _alembic_config(connection: sa.Connection) -> Config:
    from alembic.config import Config

    # Its own talk goes nowhere: standard output is data.
    config = Config(output_buffer=io.StringIO(), stdout=io.StringIO())
    scripts = Path(str(import_module("enginecache.migrations").__file__)).parent
    if not scripts.is_dir():
        message = f"enginecache was imported from an archive, and its schema's scripts ({scripts}) must be files"
        raise SchemaError(message, "Install enginecache with pip, or unpack the archive and run it from there.")
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _create_file(path: Path, mode: int) -> None:
    """Create an empty file of the right mode: SQLite gives its journal the database's mode.

    Never opened here: closing any descriptor of the file would drop the locks that another thread's SQLite holds on it.
    Source: SQLite, "How To Corrupt An SQLite Database File", section 2.2.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFREG | mode)
            path.chmod(mode)  # mknod's mode is cut by the umask
    except OSError as error:
        raise unavailable(path, error) from error


@contextlib.contextmanager
def _looking(database: Database) -> Iterator[sqlite3.Connection]:
    try:
        with database.looking() as connection:
            yield connection
    except UnicodeDecodeError as error:  # SQLite quotes damaged text in its errors
        raise damaged_registry(database.path, error) from error
