"""Files and folders that appear whole and with their mode, durably; and reading them without surprises."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from enginecache.storage.names import TEMPORARY_PREFIX

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def make_folder(path: Path, mode: int, workspace: Path, fill: Callable[[Path], object] | None = None) -> bool:
    """Make a folder with exactly this mode, durably, or leave the one that is there. Idempotent; safe across processes.

    It appears under its name with its mode: ``mkdir`` alone gives the mode that the umask leaves, and a crash before
    the ``chmod`` would shut the group out forever.

    Args:
        path: The folder.
        mode: Its mode.
        workspace: A folder of the same file system, where a crash may leave a folder of a temporary name behind.
        fill: Puts files into it before it appears, durably.

    Returns:
        Whether this call made it.

    Raises:
        OSError: It cannot be made, or something else has its name.
    """
    if _is_there(path, mode):
        return False
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=workspace))
    try:
        temporary.chmod(mode)
        if fill is not None:
            fill(temporary)
            sync_folder(temporary)
        rename_to_new(temporary, path)
    except OSError as error:
        for file in temporary.iterdir():
            file.unlink()
        temporary.rmdir()
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        return False  # another process made it, or it is no folder, which the check says
    sync_folder(path.parent)
    return True


def replace_file(path: Path, content: Iterable[bytes], mode: int, workspace: Path, prefix: str) -> None:
    """Put a file in place, whatever file was there: a reader sees the old one or the new one, also after a power loss.

    Args:
        path: The file.
        content: What it will hold, in pieces.
        mode: Its mode.
        workspace: A folder of the same file system, where a crash may leave a temporary file behind.
        prefix: Begins the name of that.

    Raises:
        OSError: It cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=workspace)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            Path(name).unlink()
        raise
    sync_folder(path.parent)


def read_regular(path: Path, max_bytes: int) -> bytes | None:
    """Return the bytes of a file; None for a folder, a pipe or a device, or more than ``max_bytes``.

    Raises:
        FileNotFoundError: There is none.
        OSError: It is a symbolic link, or cannot be read.
    """
    # Without O_NONBLOCK a pipe of that name would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def is_real_folder(path: Path) -> bool:
    """Return whether there is a folder, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _is_there(path: Path, mode: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        # Not followed: a link would lead what is stored here to another place.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if stat.S_IMODE(status.st_mode) == 0o700 != mode and status.st_uid == os.geteuid():
        path.chmod(mode)  # a crash between the two steps of sharing
    return True


def rename_to_new(source: Path, target: Path) -> None:
    """Rename, unless there is something: ``rename`` alone puts a folder in the place of an empty one.

    Another process may be about to use that one, and would find it missing.

    Raises:
        FileExistsError: There is.
        OSError: It cannot be renamed.
    """
    import ctypes  # a folder is made once, and most processes make none

    # The C library of Alpine Linux has no such function, and some network file systems do not know the flag.
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        source.rename(target)
    elif rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        if number not in {errno.EINVAL, errno.ENOSYS}:
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        source.rename(target)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: The file system refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
