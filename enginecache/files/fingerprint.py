"""Fingerprints of files: numbers and times that stand for the bytes, and the conditions under which they may."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import NamedTuple

from enginecache.files.mounts import file_system_of, status_of

SETTLE_NS = 2_000_000_000
"""Age below which a file can change again within one tick of its time stamps.

Source: git's racy-clean rule, with 2 s for file systems that keep times in coarse steps (FAT, some network ones).
"""

_SECOND_NS = 1_000_000_000

KERNEL_TIMED = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
"""File systems whose ctime the kernel sets at every change, if they are mounted for writing.

In an image that is mounted read-only (squashfs, erofs, ISO, or an ext4 image) ctime is data: two images may contain
different bytes under the same numbers (seen with two ext2 images, 2026-11), and the image's file may be overwritten
while it is mounted. FAT and many FUSE file systems invent ctime; on a network file system it is the server's.
"""

_IMAGE_DEVICES = ("loop", "ram", "zram", "nbd", "rbd", "ublk")
"""Block devices that may get another image at any time under the same number."""


class Fingerprint(NamedTuple):
    """Identity, size and times of one file, and the mount in which it is seen.

    ``ctime_ns`` cannot be set by a program, unlike ``mtime_ns``; linking, renaming and changing the mode move it too. A
    program that keeps a file mapped for writing can change it again without moving it. ``mount`` is the kernel's unique
    number, which no other mount has before the next boot; 0 where it is not known.

    Equal fingerprints mean equal bytes only within one boot, and only if :meth:`is_conclusive`.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    mount: int = 0

    @classmethod
    def of_path(cls, path: str | os.PathLike[str], *, follow_symlinks: bool = True) -> Fingerprint:
        """Return the fingerprint of the file that ``path`` leads to.

        Raises:
            OSError: There is no such file.
        """
        return cls(*status_of(path, follow_symlinks=follow_symlinks)[:6])

    @classmethod
    def of_descriptor(cls, descriptor: int) -> Fingerprint:
        """Return the fingerprint of an open file.

        Raises:
            OSError: The descriptor is closed.
        """
        return cls(*status_of(descriptor)[:6])

    def is_conclusive(self, read_ns: int | None = None) -> bool:
        """Return whether an equal fingerprint, seen later in this boot, proves equal bytes.

        Ask this before a file is not read again. Both conditions matter: the file must have been old enough when it was
        read for a change to show, and only this kernel may set its times.

        Args:
            read_ns: When its reading began, nanoseconds since the epoch; default: now.
        """
        return self.is_settled(read_ns) and has_kernel_times(self)

    def is_settled(self, now_ns: int | None = None) -> bool:
        """Return whether a change at ``now_ns`` (default: now) would have given the file another ctime.

        Every change moves ctime to the clock's time, so mtime may be any date. A ctime in the future comes from a clock
        that was set back: a change now would show too. If times are whole seconds, a change in that very second, when
        the clock reaches it, would not.
        """
        now_ns = time.time_ns() if now_ns is None else now_ns
        if self.ctime_ns <= now_ns:
            return self.ctime_ns + SETTLE_NS <= now_ns
        return now_ns + SETTLE_NS <= self.ctime_ns and self.ctime_ns % _SECOND_NS != 0


def has_kernel_times(fingerprint: Fingerprint, mounts: str | None = None, blocks: Path | None = None) -> bool:
    """Return whether this kernel sets the file's times, and the fingerprint's file system cannot be exchanged unseen.

    The mount's unique number rules out an exchange. Without it (before Linux 6.8) only a disk is safe: its number stays
    the same for a boot, unlike that of a loop device, an overlay or a memory disk.

    Args:
        fingerprint: The file's.
        mounts: Text of ``/proc/self/mountinfo``; default: read now. Source: Linux, proc_pid_mountinfo(5).
        blocks: Default: ``/sys/dev/block``. Source: Linux, sysfs(5).
    """
    if mounts is None and blocks is None and fingerprint.mount:
        return _has_kernel_times_in(fingerprint.device, fingerprint.mount)
    return _has_kernel_times(fingerprint, mounts, blocks)


@functools.lru_cache(maxsize=256)
def _has_kernel_times_in(device: int, mount: int) -> bool:
    """Return the answer for every file of one mount, whose number no other mount has before the next boot."""
    return _has_kernel_times(Fingerprint(device, 0, 0, 0, 0, mount), None, None)


def _has_kernel_times(fingerprint: Fingerprint, mounts: str | None, blocks: Path | None) -> bool:
    found = _file_system(fingerprint.device, mounts)
    if found is None and fingerprint.mount:
        # Files on btrfs, and on an overlay's lower layers, have device numbers that no list of mounts shows.
        found = file_system_of(fingerprint.mount)
    if found is None:
        return False
    kind, is_writable = found
    if kind not in KERNEL_TIMED:
        return False
    # An overlay without a writable layer is fine: its files have the times of the lower layers, as files of any overlay
    # have until they are written. No layer can be exchanged under a mount.
    if not is_writable and kind != "overlay":
        return False
    return fingerprint.mount != 0 or _is_disk(fingerprint.device, Path("/sys/dev/block") if blocks is None else blocks)


def _file_system(device: int, mounts: str | None) -> tuple[str, bool] | None:
    """Return the kind of the mounted file system with this number, and whether it is writable."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        fields, kind = mount.split(), source.split()
        if len(fields) > 2 and fields[2] == number and len(kind) > 2:
            return kind[0], "rw" in kind[2].split(",")
    return None


def _is_disk(device: int, blocks: Path) -> bool:
    """Return whether a block device is a real disk: neither an image nor built on one."""
    try:
        found = (blocks / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
        below = list((found / "slaves").iterdir()) if (found / "slaves").is_dir() else []
        # A partition lies in its disk's folder.
        if any(part.startswith(_IMAGE_DEVICES) for part in (found.name, found.parent.name)):
            return False
        numbers = [tuple(map(int, (part / "dev").read_text().split(":"))) for part in below]
    except (OSError, ValueError):
        return False
    return all(_is_disk(os.makedev(*number), blocks) for number in numbers)
