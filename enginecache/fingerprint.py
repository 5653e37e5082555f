"""What the file system says of a file, as a stand-in for its bytes."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

SETTLE_NS = 2_000_000_000
"""A file younger than this when it was read can change again within one tick of its time stamps.

Source: git's racy-clean rule, with 2 s for file systems that keep times in coarse steps (FAT, some network ones).
"""


class Fingerprint(NamedTuple):
    """Identity, size and times of one file.

    ``ctime_ns`` cannot be set by a program, unlike ``mtime_ns``; linking, renaming and changing the mode move it too.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of_stat(cls, status: os.stat_result) -> Fingerprint:
        """The fingerprint in an ``os.stat`` or ``os.fstat`` result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def of_path(cls, path: str | os.PathLike[str]) -> Fingerprint:
        """Fingerprint of the file that ``path`` leads to, through symbolic links.

        Raises:
            OSError: There is no such file.
        """
        return cls.of_stat(os.stat(path))

    def is_settled(self, now_ns: int | None = None) -> bool:
        """Whether the file was old enough at ``now_ns`` (default: now) for this fingerprint to stand for its bytes."""
        now_ns = time.time_ns() if now_ns is None else now_ns
        return max(self.mtime_ns, self.ctime_ns) + SETTLE_NS <= now_ns
