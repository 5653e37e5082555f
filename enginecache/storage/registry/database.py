"""Connections to the registry's database, and its transactions.

``looking`` and ``noting`` go through the driver alone, and are all that a hit needs: SQLAlchemy takes longer to load
than a hit may take, so the first of the other methods imports it.

The journal is a rollback journal that is truncated at each commit (``TRUNCATE``), with ``synchronous=FULL``: what was
committed survives a power loss. A registry that another program left in WAL mode is taken out of it by the first
transaction: SQLite writes the log into the file, and loses nothing. While another program has it open in that mode,
that fails, and so does the command.

Source: SQLite, "PRAGMA journal_mode".
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from enginecache.errors import EngineCacheError, OutOfMemoryError, RegistryError, ResourceError
from enginecache.files.mounts import boot_id
from enginecache.files.os_errors import describe_os_error, free_inodes, is_out_of_descriptors
from enginecache.storage.registry.rows import REPAIR_FIX, damaged_registry

if TYPE_CHECKING:
    import sqlalchemy as sa

BUSY_TIMEOUT_S = 60.0


class _Connection(sqlite3.Connection):
    """A connection that several transactions may use: while it is kept, ``close`` only ends the transaction.

    Attributes:
        is_kept: Whether :meth:`Database.connected` keeps it.
        is_configured: Whether its journal is chosen.
        file: Device and inode of the path just before it was opened; None where nothing was there.
    """

    is_kept = False
    is_configured = False
    file: tuple[int, int] | None = None

    def close(self) -> None:
        if not self.is_kept:
            super().close()
        elif self.in_transaction:
            self.rollback()


class Database:
    """One SQLite file. Safe across threads, processes and forks.

    A connection lives for one transaction, or for one block of :meth:`connected`. It is not shared between threads.
    Opening one costs about a third of a millisecond (measured 2026-11).

    Args:
        path: The file.
        busy_timeout_s: How long to wait for a writer.
        may_make: Whether writing makes a missing file; the registry is made by its migrations alone.
    """

    def __init__(self, path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S, *, may_make: bool = False) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._may_make = may_make
        self._is_made = False
        self._kept: dict[tuple[int, int], _Connection | None] = {}

    @functools.cached_property
    def _source(self) -> sa.Engine:
        import sqlalchemy as sa
        from sqlalchemy.pool import NullPool

        # NullPool: nothing but `connected` decides how long a connection lives.
        source = sa.create_engine("sqlite://", creator=self._connect, poolclass=NullPool)
        sa.event.listen(source, "begin", _begin)
        return source

    @property
    def is_made(self) -> bool:
        """True if the file has tables. Looks at the file until it has; never makes it, as opening would."""
        if not self._is_made:
            self._is_made = self._has_tables()
        return self._is_made

    def _has_tables(self) -> bool:
        """Return whether there are tables; True also for a locked or unreadable file, which reading reports."""
        try:
            if self.path.stat().st_size == 0:
                return False
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        try:
            with contextlib.closing(self._connect()) as connection, _timeout(connection, 0.0, self._busy_timeout_s):
                return connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
        except (sqlite3.Error, UnicodeDecodeError):
            return True

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Use one connection for all transactions that this thread makes within the block. May be nested.

        It is opened by the first transaction, and opened again if another file has the path by then, as after a repair.
        A child that is forked meanwhile opens its own, and never closes this one: SQLite in the child would not know
        which locks it has. Keep the block short, and wait for nothing in it: no lock, no build, no caller's function.

        Source: SQLite, "How To Corrupt An SQLite Database File", section 2.6.
        """
        place = _here()
        if place in self._kept:
            yield
            return
        self._kept[place] = None
        try:
            yield
        finally:
            if place == _here():
                _close(self._kept.pop(place))

    def _connect(self) -> _Connection:
        place, file = _here(), _identity(self.path)
        kept = self._kept.get(place)
        is_busy = kept is not None and kept.in_transaction  # which a second one on it would end
        if kept is not None and not is_busy:
            if kept.file == file:
                return kept
            self._kept[place] = None
            _close(kept)
        # check_same_thread stays on. isolation_level: the driver's own transaction handling begins too late, and never
        # IMMEDIATE.
        connection = sqlite3.connect(self.path, timeout=self._busy_timeout_s, isolation_level=None, factory=_Connection)
        connection.file = file
        if place in self._kept and not is_busy:
            connection.is_kept = True
            self._kept[place] = connection
        return connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Yield a consistent snapshot; blocks no writer for longer than it is open.

        Raises:
            RegistryError: The database cannot be opened or read.
        """
        with self._begun() as connection:
            yield connection

    @contextlib.contextmanager
    def looking(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection of the driver's own, for a query that must be quick.

        Raises:
            RegistryError: The database cannot be opened or read.
        """
        with self._translated(), contextlib.closing(self._connect()) as connection:
            yield connection

    @contextlib.contextmanager
    def noting(self) -> Iterator[sqlite3.Connection]:
        """Like :meth:`writing` without waiting for another writer, through the driver alone.

        Raises:
            RegistryError: As :meth:`writing`.
        """
        self._require_made()
        with (
            self._translated(),
            contextlib.closing(self._connect()) as connection,
            _timeout(connection, 0.0, self._busy_timeout_s),
        ):
            _configure(connection)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.rollback()
                raise

    @contextlib.contextmanager
    def writing(self, *, waits: bool = True) -> Iterator[sa.Connection]:
        """Yield a transaction that holds the write lock from its first statement: commits at the end, or not at all.

        DEFERRED transactions that read before they write lost updates or failed with "database is locked" (measured
        2026-11); IMMEDIATE ones did neither.

        Args:
            waits: Whether to wait for another writer; if not, a busy registry is an error at once.

        Raises:
            RegistryError: The database cannot be opened or written, stayed busy for the time-out, or is not made yet.
        """
        self._require_made()
        with self._begun("IMMEDIATE", timeout_s=None if waits else 0.0) as connection:
            yield connection

    def _require_made(self) -> None:
        if not (self._may_make or self.is_made):
            raise RegistryError(f"there is no registry {self.path} yet", "`enginecache get` makes it.")

    @contextlib.contextmanager
    def migrating(self) -> Iterator[sa.Connection]:
        """Like :meth:`writing`, with foreign keys checked once, before the commit.

        Alembic alters a table by dropping and renaming it, which SQLite refuses for one that others name, and the
        setting cannot change inside a transaction. Source: SQLite, "ALTER TABLE", section 7.

        Raises:
            RegistryError: As :meth:`writing`, or a row would name a missing one.
        """
        with self._begun("IMMEDIATE", foreign_keys="OFF") as connection:
            yield connection
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                message = (
                    f"the registry {self.path} was not changed: a row of {broken[0]} would name none of {broken[2]}"
                )
                raise RegistryError(message, "Keep the file and report it.")

    @contextlib.contextmanager
    def _begun(
        self, kind: str = "DEFERRED", *, foreign_keys: str = "ON", timeout_s: float | None = None
    ) -> Iterator[sa.Connection]:
        import sqlalchemy as sa

        options = {"enginecache_begin": kind, "enginecache_foreign_keys": foreign_keys}
        try:
            with self._translated(), self._source.connect().execution_options(**options) as connection:
                driver = cast("sqlite3.Connection", connection.connection.driver_connection)
                with _timeout(driver, timeout_s, self._busy_timeout_s), connection.begin():
                    yield connection
        except sa.exc.DBAPIError as error:
            raise unavailable(self.path, error) from error

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise unavailable(self.path, error) from error


class Session:
    """One SQLite file whose values are checked; before it is made, it has no rows and takes none.

    Args:
        database: Where the rows are; its schema is current.
        boot: Name of the host's boot: what was found in files is believed within it alone; default: the present one.
    """

    def __init__(self, database: Database, boot: str | None = None) -> None:
        self._database = database
        self._boot = boot_id() if boot is None else boot

    def connected(self) -> contextlib.AbstractContextManager[None]:
        """Use one connection for all transactions within the block: see :meth:`Database.connected`."""
        return self._database.connected()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """Like :meth:`Database.reading`; a value of an impossible type means a damaged registry too."""
        import sqlalchemy as sa

        try:
            with self._database.reading() if self._database.is_made else _no_rows() as connection:
                yield connection
        except (ValueError, TypeError, KeyError, OverflowError, sa.exc.InvalidRequestError) as error:
            raise damaged_registry(self._database.path, error) from error

    @contextlib.contextmanager
    def _looking(self) -> Iterator[sqlite3.Connection]:
        """Like :meth:`_reading`, through the driver alone, where SQLAlchemy would take most of the time."""
        try:
            if not self._database.is_made:
                with _no_rows() as empty:
                    yield cast("sqlite3.Connection", empty.connection.driver_connection)
                return
            with self._database.looking() as connection:
                yield connection
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise damaged_registry(self._database.path, error) from error

    @contextlib.contextmanager
    def _noting(self) -> Iterator[sqlite3.Connection]:
        """Like :meth:`Database.noting`; see :meth:`_writing`."""
        try:
            with self._database.noting() as connection:
                yield connection
        except UnicodeDecodeError as error:
            raise damaged_registry(self._database.path, error) from error

    @contextlib.contextmanager
    def _writing(self, *, waits: bool = True) -> Iterator[sa.Connection]:
        """Like :meth:`Database.writing`; SQLite quotes damaged text in its errors, and Python cannot read it."""
        try:
            with self._database.writing(waits=waits) as connection:
                yield connection
        except UnicodeDecodeError as error:
            raise damaged_registry(self._database.path, error) from error


@contextlib.contextmanager
def _no_rows() -> Iterator[sa.Connection]:
    """Yield a registry without rows, in memory."""
    import sqlalchemy as sa
    from sqlalchemy.pool import NullPool

    from enginecache.storage.registry.tables import METADATA

    with sa.create_engine("sqlite://", poolclass=NullPool).connect() as connection:
        METADATA.create_all(connection)
        yield connection


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _close(connection: _Connection | None) -> None:
    if connection is not None:
        connection.is_kept = False
        connection.close()


@contextlib.contextmanager
def _timeout(connection: sqlite3.Connection, timeout_s: float | None, usual_s: float) -> Iterator[None]:
    """Wait for a writer for ``timeout_s`` seconds within the block, and for the usual time after it."""
    if timeout_s is None:
        yield
        return
    connection.execute(f"PRAGMA busy_timeout = {timeout_s * 1000:.0f}")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA busy_timeout = {usual_s * 1000:.0f}")


def _configure(connection: _Connection) -> None:
    """Choose the journal, before the first transaction that may write."""
    if not connection.is_configured:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.is_configured = True


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    driver = cast("_Connection", connection.connection.driver_connection)
    _configure(driver)
    connection.exec_driver_sql(f"PRAGMA foreign_keys = {options['enginecache_foreign_keys']}")
    connection.exec_driver_sql(f"BEGIN {options['enginecache_begin']}")


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
    return RegistryError(f"{doing}: {found}", REPAIR_FIX if tells_damage(found) else fix_for(error, path))


def _folder_error(folder: Path) -> OSError | None:
    """Return why a folder cannot be opened, or cannot get a file such as the registry's journal.

    Never the registry itself: closing it would drop the locks of this process's connections.
    """
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        is_full = free_inodes(folder) == 0
    except OSError as error:
        return error
    return OSError(errno.ENOSPC, "") if is_full else None


def fix_for(error: Exception, path: Path) -> str:
    """Return what to do about an error of SQLite's.

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


_OUTSIDE = (
    "locked",
    "readonly",
    "disk is full",
    "disk I/O error",
    "unable to open",
    "out of memory",
    "permission denied",
    "interrupted",
)
"""SQLite's words for causes outside the file. Its codes are in Python from 3.11 on.

Source: SQLite, ``sqlite3ErrStr`` in main.c, 3.40.
"""


def tells_damage(error: object) -> bool:
    """Return whether an error of SQLite's is about the file's content, not about the disk, a lock or the modes."""
    error = getattr(error, "orig", error)  # of SQLAlchemy's
    if isinstance(error, UnicodeDecodeError):
        return True
    return isinstance(error, sqlite3.Error) and not any(text in str(error) for text in _OUTSIDE)
