"""Space on the cache's file system: checked before a build, and a little of it kept for repairs."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from enginecache.errors import StoreError
from enginecache.files.os_errors import FEW_INODES, describe_os_error, explain_full_disk, free_inodes
from enginecache.files.units import format_size
from enginecache.storage.folder import Root

PLAN_TO_MODEL = 1.5
"""Size of a plan, as a multiple of its model's.

TensorRT-RTX 1.7.1 plans had 0.3 to 1.3 times the size of their model
(measured 2026-11); half precision makes plans of half the size, so the estimate is rather too high than too low.
"""

SLACK_BYTES = 16 << 20
"""For logs, the registry and its journal, a timing cache, and plans of small models."""

RESERVE_BYTES = 1 << 20
"""Many times what the registry needs to write its journal for one transaction."""


def needed_bytes(model_bytes: int) -> int:
    """Return what a build is estimated to need, in bytes: for the plan, and some slack.

    Args:
        model_bytes: Size of the model with its external data; 0 if its weights are not in the plan.
    """
    return SLACK_BYTES + int(PLAN_TO_MODEL * model_bytes)


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user may still write to the folder's file system, without regard to quotas.

    Raises:
        OSError: The folder is missing, or the file system does not say.
    """
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def require_space(root: Root, model_name: str, model_bytes: int) -> None:
    """Refuse a build that would run out of room: a minute spent on it is a minute lost. Sets the reserve aside as well.

    An estimate, and no promise: others write to the same file system, and a quota shows only when it is met.

    Args:
        root: The cache folder.
        model_name: For the message.
        model_bytes: As for :func:`needed_bytes`.

    Raises:
        StoreError: This user may not write to the folder, or its file system has less room than the estimate.
    """
    require_room(root, f"build {model_name}", needed_bytes(model_bytes))


def require_room(root: Root, doing: str, needed: int) -> None:
    """Refuse to begin what would run out of room. Sets the reserve aside as well.

    Args:
        root: The cache folder.
        doing: For the message: ``build model.onnx``.
        needed: Bytes that it will write.

    Raises:
        StoreError: This user may not write to the folder, or its file system has less room than that.
    """
    require_writable(root)
    Reserve(root).keep()
    try:
        free, inodes = free_bytes(root.tmp), free_inodes(root.tmp)
    except OSError as error:
        doing = f"the free space in {root.path} cannot be looked up"
        raise StoreError(*describe_os_error(error, doing, root.tmp, in_cache=True)) from error
    if inodes is not None and inodes < FEW_INODES:
        why, fix = explain_full_disk(root.tmp)
        prune = "`enginecache prune --older-than 30d` deletes engines, which are files."
        raise StoreError(f"too little room to {doing}: {why}", f"{fix}\n{prune}")
    if free < needed:
        message = (
            f"too little room to {doing}: about {format_size(needed)} are needed in {root.path}, "
            f"and {format_size(free)} are free"
        )
        fix = "Free some with `enginecache prune --older-than 30d`, or name a folder on another disk with --dir."
        raise StoreError(message, fix)


def require_writable(root: Root) -> None:
    """Refuse a folder that cannot be written, before anything is done. Cheap; does not see a full disk.

    Raises:
        StoreError: This user may not write to the folder, or its file system is read-only.
    """
    folders = (root.path, root.engines, root.tmp, root.locks, root.logs)
    if not all(os.access(folder, os.W_OK, effective_ids=True) for folder in folders):
        message = f"{root.path} cannot be written by this user, so an engine that is not stored cannot be built into it"
        fix = "Make it writable, fill it from where it is writable, or name another with --dir or ENGINECACHE_DIR."
        raise StoreError(message, fix)


class Reserve:
    """A file that takes up room until a full disk must be repaired.

    A registry cannot be opened for writing on a full disk, so that nothing could be deleted either. Best effort: a file
    system that compresses, or keeps snapshots, may have nothing to give back.

    Source: SQLite, "Atomic Commit In SQLite", section 3.5: a rollback journal is written before the database.

    Args:
        root: The cache folder that it lies in.
    """

    def __init__(self, root: Root) -> None:
        self.path = root.path / "reserve"
        self._mode = root.file_mode

    @property
    def is_whole(self) -> bool:
        """True if it is there in full. Cheap."""
        try:
            status = self.path.lstat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size >= RESERVE_BYTES

    def keep(self) -> None:
        """Put it in place if that leaves as much room again; no error if it cannot be done. Idempotent."""
        with contextlib.suppress(OSError):
            if self.is_whole or free_bytes(self.path.parent) < 2 * RESERVE_BYTES:
                return
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _require_own(descriptor)
                if stat.S_IMODE(os.fstat(descriptor).st_mode) != self._mode:
                    os.fchmod(descriptor, self._mode)
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Free the room while the block runs, and take it up again after it. May be nested.

        Another process may take it meanwhile: then the block fails as on any full disk.
        """
        with contextlib.suppress(OSError):
            # Truncated, not deleted: a full file system may have no room for the change of a folder.
            descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _require_own(descriptor)
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)
        try:
            yield
        finally:
            self.keep()


def _require_own(descriptor: int) -> None:
    """Refuse a file with a second name: its bytes are also those of whoever gave it one.

    Raises:
        OSError: It has one, or is not a regular file.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
