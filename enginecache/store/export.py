"""A copy of a plan outside the cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from pathlib import Path

from enginecache.errors import StoreError

_FICLONE = 0x40049409
"""Share the blocks of another file, copy on write. Source: Linux, ioctl_ficlone(2)."""


def export_plan(plan: Path, target: Path, keep_out: Path) -> None:
    """Put a copy of ``plan`` at ``target``, atomically: readers see the old file or the whole new one.

    Shares the blocks where the file system can. Never a hard link: that would let a change of the copy reach the cache,
    and would move the blob's ctime. A symbolic link at ``target`` is replaced, not followed.

    Args:
        plan: The stored plan.
        target: A file to make or replace.
        keep_out: The cache folder, in which no copy may land.

    Raises:
        StoreError: The copy cannot be written, or would replace what is no plan's copy.
    """
    target = Path(os.path.realpath(target.parent)) / target.name
    for folder, what in ((Path(os.path.realpath(keep_out)), "the cache folder"), (Path("/dev"), "/dev")):
        # /dev/stdout is a link, and may lead to a regular file. Shared memory is a file system like another.
        if target.is_relative_to(folder) and (what != "/dev" or not target.is_relative_to("/dev/shm")):  # noqa: S108
            raise StoreError(
                f"the engine cannot be copied to {target}: it lies in {what}", "Name another file with -o."
            )
    try:
        _require_replaceable(target)
        temporary = target.parent / f".enginecache-{uuid.uuid4().hex}"  # a name may be as long as the file system takes
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as copy, plan.open("rb") as source:
                try:
                    fcntl.ioctl(copy, _FICLONE, source.fileno())
                except OSError:
                    shutil.copyfileobj(source, copy, 4 << 20)
                copy.flush()
                os.fsync(copy.fileno())
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        message = f"the engine cannot be copied to {target}: {error.strerror or error}"
        raise StoreError(message, "The engine is in the cache; name a writable file with -o.") from error


def _require_replaceable(target: Path) -> None:
    # A rename would put a file in the place of a device such as /dev/stdout.
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is there and is no regular file")
