"""When each entry was last used.

Kept in the modification times of empty files, outside the blobs: touching a blob changes its ctime, and so the
fingerprint that says it was verified. A touch takes no lock, so a hit waits for nobody.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
from pathlib import Path

from enginecache.errors import StoreError
from enginecache.store.root import Root

_KEY = re.compile(r"[0-9a-f]{64}")


class UseLog:
    """Last use by key. Best effort: a root that cannot be written keeps serving."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def touch(self, key: str) -> None:
        """Note a use now. Never blocks, never fails."""
        with contextlib.suppress(OSError):
            self._path(key).touch(mode=self._root.file_mode)
            if self._root.is_shared and self._path(key).stat().st_uid == os.geteuid():
                self._path(key).chmod(self._root.file_mode)  # touch's mode is cut by the umask

    def last_used(self, key: str) -> dt.datetime | None:
        """When the entry was last used; None where no use was noted."""
        try:
            return dt.datetime.fromtimestamp(self._path(key).stat().st_mtime, dt.timezone.utc)
        except (OSError, ValueError, OverflowError):  # a wrong clock's year may be beyond any calendar's
            return None

    def all(self) -> dict[str, dt.datetime]:
        """The last use of every entry that has a note, in one pass over the folder."""
        found: dict[str, dt.datetime] = {}
        folder = os.fspath(self._root.uses)
        with contextlib.suppress(OSError):
            for key in os.listdir(folder):  # noqa: PTH208  these and no Path, which takes longer than all the rest
                try:
                    found[key] = dt.datetime.fromtimestamp(os.stat(f"{folder}/{key}").st_mtime, dt.timezone.utc)
                except (OSError, ValueError, OverflowError):
                    continue
        return found

    def forget(self, key: str) -> None:
        """Drop the note of an entry that is gone."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if _KEY.fullmatch(key) is None:  # an OSError, so every method takes it for a file that is not there
            raise StoreError(f"{key!r} is not a key", "The registry is damaged: run `enginecache verify`.")
        return self._root.uses / key
