"""Last use of each entry.

Kept in the times of empty files, outside the blobs: touching a blob changes its ctime, and so the fingerprint that says
it was verified. A touch takes no lock, so a hit waits for nobody.

A note's mtime is its latest use by any clock and never moves back, so a clock that is behind makes no entry older. Its
ctime is the time of its last use by the clock of then. A note that is ahead of the clock therefore counts as it says,
which is as a use now, until a day has passed since its ctime: then the clock that wrote it was wrong, not this one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from enginecache.errors import StoreError
from enginecache.files.units import DAY_S
from enginecache.host.evidence import note_use
from enginecache.storage.folder import Root

_KEY = re.compile(r"[0-9a-f]{64}")
_LATEST_S = dt.datetime.max.replace(tzinfo=dt.timezone.utc).timestamp() - 1.0


class UseLog:
    """Last uses by key. Best effort: a root that cannot be written keeps serving."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def touch(self, key: str) -> None:
        """Note a use now. Never blocks, never fails."""
        with contextlib.suppress(OSError):
            path = os.fspath(self._path(key))
            with contextlib.suppress(FileNotFoundError):
                note_use(path)
                return
            # Not Path.touch, which follows a link.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._root.file_mode)
            try:
                if self._root.is_shared:
                    os.fchmod(descriptor, self._root.file_mode)  # the umask cut it
            finally:
                os.close(descriptor)

    def last_used(self, key: str) -> dt.datetime | None:
        """Return when the entry was last used; None where no use was noted."""
        try:
            return _last_use(self._path(key).lstat(), time.time())
        except OSError:
            return None

    def all(self) -> dict[str, dt.datetime]:
        """Return the last use of every entry that has a note, in one pass over the folder."""
        found: dict[str, dt.datetime] = {}
        now_s = time.time()
        for path, status in self._notes():
            found[path.rpartition("/")[2]] = _last_use(status, now_s)
        return found

    def age_those_ahead(self) -> None:
        """Start the day after which a note by a clock that was ahead is corrected. Best effort."""
        now_s = time.time()
        for path, status in self._notes():
            if status.st_ctime > now_s and status.st_mtime > now_s:
                with contextlib.suppress(OSError):
                    note_use(path)

    def _notes(self) -> Iterator[tuple[str, os.stat_result]]:
        folder = os.fspath(self._root.uses)
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):  # noqa: PTH208  these and no Path, which takes longer than all the rest
                if _KEY.fullmatch(name) is None:
                    continue  # not a note of enginecache's
                path = f"{folder}/{name}"
                try:
                    status = os.stat(path, follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield path, status

    def forget(self, key: str) -> None:
        """Delete the note of an entry that was deleted."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if _KEY.fullmatch(key) is None:  # an OSError, so every method takes it for a file that is not there
            raise StoreError(f"{key!r} is not a key", "The registry is damaged: run `enginecache verify`.")
        return self._root.uses / key


def _last_use(status: os.stat_result, now_s: float) -> dt.datetime:
    used_s = status.st_mtime
    if used_s > now_s and status.st_ctime + DAY_S <= now_s:
        used_s = status.st_ctime
    # A wrong clock's year may be beyond any calendar's.
    return dt.datetime.fromtimestamp(min(max(used_s, 0.0), _LATEST_S), dt.timezone.utc)
