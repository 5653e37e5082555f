"""Connections to the registry's database, and its transactions."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from enginecache.errors import EngineCacheError, OutOfMemoryError, RegistryError, ResourceError
from enginecache.files.os_errors import describe_os_error, free_inodes, is_out_of_descriptors

BUSY_TIMEOUT_S = 60.0
WAL_EXIT_S = 10.0
"""How long to wait for a moment in which no other connection is open."""
WAL_SAFE_FROM = (3, 51, 3)
"""SQLite 3.7.0 to 3.51.2 can corrupt a database in WAL mode. Source: SQLite, "Write-Ahead Logging", section 11."""


def journal_mode(version: tuple[int, int, int]) -> str:
    """The journal mode that is safe with this SQLite: WAL where its reset bug is mended, else TRUNCATE."""
    return "WAL" if version >= WAL_SAFE_FROM else "TRUNCATE"


class Database:
    """One SQLite file.

    A connection lives for one transaction: none is carried across a fork or shared between threads. Opening one costs
    about a third of a millisecond (measured 2026-11).

    Args:
        path: The file.
        busy_timeout_s: How long to wait for a writer.
        may_make: Whether writing makes a file that is missing; the registry is made by its migrations alone.
    """

    def __init__(self, path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S, *, may_make: bool = False) -> None:
        self.path = path
        self._may_make = may_make
        self._is_made = False
        # check_same_thread stays on: NullPool hands every thread a connection of its own.
        # URL.create, because in the text of a URL a ``?`` in the path would begin a query.
        url = sa.URL.create("sqlite", database=str(path))
        self._source = sa.create_engine(url, poolclass=NullPool, connect_args={"timeout": busy_timeout_s})
        sa.event.listen(self._source, "connect", _configure)
        sa.event.listen(self._source, "begin", _begin)

    @property
    def is_made(self) -> bool:
        """Whether the file has tables. Asked of the file until it once has; never makes it, as opening would."""
        if not self._is_made:
            self._is_made = _has_tables(self.path)
        return self._is_made

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A consistent snapshot; blocks no writer for longer than it is open.

        Raises:
            RegistryError: The database cannot be opened or read.
        """
        with self._translated(), self._source.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def looking(self) -> Iterator[sqlite3.Connection]:
        """A connection of the driver's own, for one query that must be quick.

        Raises:
            RegistryError: The database cannot be opened or read.
        """
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as found:
                yield found
        except sqlite3.Error as error:
            raise unavailable(self.path, error) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first statement: commits at the end, or not at all.

        DEFERRED transactions that read before they write lost updates or failed with "database is locked" (measured
        2026-11); IMMEDIATE ones did neither.

        Raises:
            RegistryError: The database cannot be opened or written, stayed busy for the time-out, or is not made yet.
        """
        if not (self._may_make or self.is_made):
            raise RegistryError(f"there is no registry {self.path} yet", "`enginecache get` makes it.")
        with (
            self._translated(),
            self._source.connect().execution_options(enginecache_begin="IMMEDIATE") as connection,
            connection.begin(),
        ):
            yield connection

    @contextlib.contextmanager
    def migrating(self) -> Iterator[sa.Connection]:
        """Like :meth:`writing`, with foreign keys checked once, before the commit.

        Alembic alters a table by dropping and renaming it, which SQLite refuses for one that others name, and the
        setting cannot change inside a transaction. Source: SQLite, "ALTER TABLE", section 7.

        Raises:
            RegistryError: As :meth:`writing`, or a row would name another that is gone.
        """
        options = {"enginecache_begin": "IMMEDIATE", "enginecache_foreign_keys": "OFF"}
        with (
            self._translated(),
            self._source.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            yield connection
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                message = (
                    f"the registry {self.path} was not changed: a row of {broken[0]} would name none of {broken[2]}"
                )
                raise RegistryError(message, "Keep the file and report it.")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise unavailable(self.path, error) from error


def unavailable(path: Path, error: Exception) -> EngineCacheError:
    """Return the error for a registry that SQLite cannot use. SQLite hides the errno: the cause is looked for."""
    found = getattr(error, "orig", error)
    doing = f"the registry {path} is unavailable"
    if isinstance(found, OSError):
        return RegistryError(*describe_os_error(found, doing, path, in_cache=True))
    if isinstance(found, MemoryError) or "out of memory" in str(found):
        return OutOfMemoryError(*describe_os_error(OSError(errno.ENOMEM, ""), f"{doing}: {found}", path))
    if is_out_of_descriptors():
        return ResourceError(*describe_os_error(OSError(errno.EMFILE, ""), f"{doing}: {found}", path))
    if "disk is full" in str(found):
        return RegistryError(*describe_os_error(OSError(errno.ENOSPC, ""), f"{doing}: {found}", path, in_cache=True))
    if "unable to open" in str(found):
        cause = _folder_error(path.parent)
        if cause is not None:
            return RegistryError(*describe_os_error(cause, f"{doing}: {found}", path, in_cache=True))
    return RegistryError(f"{doing}: {found}", fix_for(error, path))


def _folder_error(folder: Path) -> OSError | None:
    """Why a folder cannot be opened, or get a file such as the registry's journal.

    Never the registry itself: closing it would drop the locks of this process's connections.
    """
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        is_full = free_inodes(folder) == 0
    except OSError as error:
        return error
    return OSError(errno.ENOSPC, "") if is_full else None


def _has_tables(path: Path) -> bool:
    """Whether there are any; True also for a file that is locked or cannot be read, which the reading tells."""
    try:
        if path.stat().st_size == 0:
            return False
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0.0)) as connection:
            return connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
    except (sqlite3.Error, UnicodeDecodeError):
        return True


def fix_for(error: Exception, path: Path) -> str:
    """What to do about what SQLite says.

    Source: SQLite, "Result and Extended Result Codes": a full disk is SQLITE_FULL, but a quota that is met (EDQUOT) and
    a file that may not grow (EFBIG, from ``ulimit -f``) are SQLITE_IOERR, "disk I/O error".
    """
    text = str(getattr(error, "orig", error))
    leftovers = [file for file in (Path(f"{path}-journal"), Path(f"{path}-wal")) if _is_filled(file)]
    if "locked" in text:
        return "Another process holds it; try again, and see `enginecache doctor`."
    if "disk I/O error" in text:
        return (
            "Look for a quota that is met or a limit on the size of files (`ulimit -f`), and in the system's log for a "
            f"failing disk under {path.parent}; then run `enginecache verify`."
        )
    if leftovers and not os.access(path.parent, os.W_OK):
        return (
            f"A process died in the middle of a change and left {leftovers[0].name}; whoever opens the registry next "
            f"puts that right, and must be able to write: run `enginecache ls` once where {path.parent} is writable."
        )
    if "readonly" in text or not os.access(path.parent, os.W_OK):
        return f"Make {path.parent} writable for this user, or name another folder with --dir or ENGINECACHE_DIR."
    return "Run `enginecache doctor` and `enginecache verify`."


def _is_filled(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _configure(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver's own transaction handling is off: it begins too late, and never IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    wanted = journal_mode(sqlite3.sqlite_version_info)
    (mode,) = cursor.execute("PRAGMA journal_mode").fetchone()
    if mode.upper() != wanted:
        _change_journal(cursor, mode, wanted)
    cursor.close()


def _change_journal(cursor: sqlite3.Cursor, mode: str, wanted: str) -> None:
    """Choose the journal of a new file, and take an old one out of WAL mode where this SQLite must not use it.

    A file that has left WAL mode stays so: two SQLite versions on one registry would change it back and forth, and the
    change fails at once, without the time-out, while another connection is open (measured 2026-11).
    """
    is_new = cursor.execute("PRAGMA page_count").fetchone() == (0,)
    if wanted == "WAL" and not is_new:
        wanted = "TRUNCATE"
    deadline = time.monotonic() + WAL_EXIT_S
    while True:
        try:
            cursor.execute(f"PRAGMA journal_mode={wanted}")
        except sqlite3.OperationalError:
            if mode.upper() != "WAL" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    connection.exec_driver_sql(f"PRAGMA foreign_keys={options.get('enginecache_foreign_keys', 'ON')}")
    connection.exec_driver_sql(f"BEGIN {options.get('enginecache_begin', 'DEFERRED')}")
