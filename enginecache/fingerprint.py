"""What the file system says of a file, as a stand-in for its bytes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

SETTLE_NS = 2_000_000_000
"""A file younger than this when it was read can change again within one tick of its time stamps.

Source: git's racy-clean rule, with 2 s for file systems that keep times in coarse steps (FAT, some network ones).
"""


KERNEL_TIMED = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
"""File systems whose ctime the kernel sets at every change, as long as they are mounted for writing.

In an image that is mounted read-only (squashfs, erofs, ISO, or an ext4 image) ctime is data: two images may hold other
bytes under the same numbers (seen with two ext2 images, 2026-11). FAT and many FUSE file systems make it up.
"""


def has_true_ctime(device: int, mounts: str | None = None) -> bool:
    """Whether the kernel keeps the ctime of files on this device (``st_dev``), so that it tells of every change.

    Args:
        device: From ``os.stat``.
        mounts: Text of ``/proc/self/mountinfo``; default: read now. Source: Linux, proc_pid_mountinfo(5).
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return False
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        fields, kind = mount.split(), source.split()
        if len(fields) > 2 and fields[2] == number and len(kind) > 2:
            return kind[0] in KERNEL_TIMED and "rw" in kind[2].split(",")
    return False


class Fingerprint(NamedTuple):
    """Identity, size and times of one file.

    ``ctime_ns`` cannot be set by a program, unlike ``mtime_ns``, where :func:`has_true_ctime`; linking, renaming and
    changing the mode move it too. A program that keeps a file mapped for writing can change it again without moving it.
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
