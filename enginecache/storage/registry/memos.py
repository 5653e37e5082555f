"""Memos: what was found in files, kept for the boot and the mount in which they were read; and answers."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blake3

from enginecache.config import runtime_folder
from enginecache.errors import RegistryError
from enginecache.files.canonical import canonical_json
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.units import utc_now
from enginecache.storage.registry.database import Database, Session
from enginecache.storage.registry.rows import AnswerRecord, MemoKind, time_text

MAX_OF_OTHER_BOOTS = 100
"""The newest, for other hosts that share the folder: their boots look like earlier ones of this host."""

MAX_ANSWERS = 1000
"""Of command lines; the newest are kept."""

MAX_MEMOS = 250_000
"""Of all boots and mounts; each start of a container adds its own. More than twice the largest cache that is tested."""

_FORGET_ANSWERS = """
    DELETE FROM answers
    WHERE key NOT IN (SELECT key FROM entries)
       OR (boot != :boot AND rowid NOT IN (SELECT rowid FROM answers ORDER BY rowid DESC LIMIT :others))
       OR rowid NOT IN (SELECT rowid FROM answers ORDER BY rowid DESC LIMIT :all)
"""
"""Those without an entry, and all but the newest. A command's digest names its boot, so other boots' are useless."""
_FORGET_OTHER_BOOTS = """
    DELETE FROM file_memo
    WHERE (boot < :boot OR boot > :boot) AND rowid <= (SELECT max(rowid) FROM file_memo) - :kept
"""
"""Two ranges of the index; ``!=`` would be none."""
_FORGET_OLDEST = "DELETE FROM file_memo WHERE rowid <= (SELECT max(rowid) FROM file_memo) - :kept"
_PLACE = ("boot", "kind", "mount", "device", "inode")
"""Primary key of a memo."""
_SEAL = "blake3"
_RECALL = """
    SELECT found FROM file_memo
    WHERE boot = :boot AND kind = :kind AND mount = :mount AND device = :device AND inode = :inode
      AND size_bytes = :size_bytes AND mtime_ns = :mtime_ns AND ctime_ns = :ctime_ns
"""


class Memos(Session):
    """Queries on the memos of files, and on the answers to command lines.

    Where this user cannot write the registry, they are kept in a file of the user's runtime folder, which is in memory
    and ends with the boot or the session.
    """

    _is_pruned = False

    def recall(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """Return what was found in a file of this fingerprint within this boot, or None."""
        row = self._row(kind, fingerprint)
        if row is None:
            return None
        with self._looking() as connection:
            found = connection.execute(_RECALL, row).fetchone()
        if found is None:
            found = self._recalled_for_user(row)
        return None if found is None else _unsealed(found[0], row)

    def remember(self, kind: MemoKind, fingerprint: Fingerprint, found: dict[str, Any]) -> None:
        """Keep what was found in a file. Never waits, never fails: a busy registry just forgets."""
        place = self._row(kind, fingerprint)
        if place is None or not self._database.is_made:
            return
        row = {**place, "found": json.dumps({**found, _SEAL: _seal(found, place)})}
        if self._is_read_only():
            self._remember_for_user(row)
            return
        with contextlib.suppress(RegistryError), self._noting() as connection:
            self._keep(connection, row)

    def remember_answer(self, answer: AnswerRecord, check_json: str | None = None) -> None:
        """Keep an answer, in place of the one to the same command line; a busy registry just forgets.

        Args:
            answer: The answer.
            check_json: The check of its entry as it was when the answer was given. With another by now it is not kept:
                another check deletes the answers that were given before it.
        """
        row = {**vars(answer), "boot": self._boot, "at": time_text(utc_now())}
        forgotten = {"boot": self._boot, "others": MAX_OF_OTHER_BOOTS, "all": MAX_ANSWERS}
        with contextlib.suppress(RegistryError), self._noting() as connection:
            checked = connection.execute("SELECT check_json FROM entries WHERE key = ?", (answer.key,)).fetchone()
            if checked is not None and checked[0] != check_json:
                return
            _replace(connection, "answers", row, ("command",))
            connection.execute(_FORGET_ANSWERS, forgotten)

    def _row(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """Return the place of a memo; None where there can be none."""
        if not self._boot:
            return None
        # Device, inode and mount are unsigned 64-bit numbers; SQLite's integers are signed.
        return {
            "boot": self._boot,
            "kind": kind,
            "mount": str(fingerprint.mount),
            "device": str(fingerprint.device),
            "inode": str(fingerprint.inode),
            "size_bytes": fingerprint.size_bytes,
            "mtime_ns": _signed(fingerprint.mtime_ns),
            "ctime_ns": _signed(fingerprint.ctime_ns),
        }

    def _keep(self, connection: sqlite3.Connection, row: dict[str, Any]) -> None:
        _replace(connection, "file_memo", row, _PLACE)
        if not self._is_pruned:
            _prune(connection, self._boot)
            self._is_pruned = True

    # In the user's runtime folder

    def _is_read_only(self) -> bool:
        path = self._database.path
        return not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))

    def _recalled_for_user(self, row: dict[str, Any]) -> Any:
        if not self._is_read_only():
            return None
        path = _user_file(is_made=False)
        if path is None:
            return None
        with contextlib.suppress(RegistryError, ValueError), Database(path, busy_timeout_s=0.0).looking() as connection:
            return connection.execute(_RECALL, row).fetchone()
        return None

    def _remember_for_user(self, row: dict[str, Any]) -> None:
        path = _user_file(is_made=True)
        if path is None:
            return
        from enginecache.storage.registry.tables import file_memo, making

        with contextlib.suppress(RegistryError), Database(path, 0.0, may_make=True).noting() as connection:
            connection.execute(making(file_memo))
            self._keep(connection, row)


def _signed(time_ns: int) -> int:
    """Return a time as one of SQLite's integers, which end in the year 2262: a file can be given a later date.

    Two dates that are 584 years apart become one. The ctimes of a file never are.
    """
    return (time_ns + 2**63) % 2**64 - 2**63


def _replace(connection: sqlite3.Connection, table: str, row: dict[str, Any], place: Sequence[str]) -> None:
    """Insert a row in place of the one of its primary key: by its number it is the newest, whatever the clock says."""
    same = " AND ".join(f"{name} = :{name}" for name in place)
    connection.execute(f"DELETE FROM {table} WHERE {same}", row)  # noqa: S608  names of tables and columns
    values = ", ".join(f":{name}" for name in row)
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})", row)  # noqa: S608


def _prune(connection: sqlite3.Connection, boot: str) -> None:
    """Delete rows of other boots, which nothing can use, and the oldest of too many."""
    connection.execute(_FORGET_OTHER_BOOTS, {"boot": boot, "kept": MAX_OF_OTHER_BOOTS})
    connection.execute(_FORGET_OLDEST, {"kept": MAX_MEMOS})


def _user_file(*, is_made: bool) -> Path | None:
    """Return the file in the runtime folder; None where there is no folder that only this user may write to."""
    folder = runtime_folder()
    if folder is None:
        return None
    with contextlib.suppress(OSError):
        if is_made:
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        # Its parent too: who owns that can put another folder in this one's place.
        if _is_private(folder.lstat()) and _is_private(folder.parent.lstat()):
            return folder / "files.sqlite"
    return None


def _is_private(status: os.stat_result) -> bool:
    is_closed = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    return is_closed and status.st_uid == os.geteuid()


def _seal(found: dict[str, Any], place: dict[str, Any]) -> str:
    """Return the digest of a memo and its place: a flipped bit in a model's digest would make another key of it."""
    # On one thread: starting others costs a hit a millisecond.
    return blake3.blake3(canonical_json({"found": found, "place": place}).encode("ascii")).hexdigest()


def _unsealed(text: str | None, place: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a memo holds; None where it is not what was written."""
    try:
        found = json.loads(text or "null")
        seal = found.pop(_SEAL)
        return dict(found) if seal == _seal(found, place) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
