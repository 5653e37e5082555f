"""Status of a file, like ``stat``, with the boot and the mount in which it is seen.

Another file system that is mounted on a path may contain other bytes under the same numbers: an image has the times
that its maker wrote, and numbers of devices, inodes and mounts are reused. The kernel's unique number of a mount is
never reused within a boot.

Imports only ctypes, which costs the start of a command 1.5 ms.
"""

from __future__ import annotations

import ctypes
import os
import struct

Status = tuple[int, int, int, int, int, int, int]
"""Device, inode, size in bytes, mtime and ctime in nanoseconds, unique number of the mount or 0, mode."""

BOOT_ID = "/proc/sys/kernel/random/boot_id"

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_BASIC_STATS = 0x7FF
_MNT_ID_UNIQUE = 0x4000
"""Since Linux 6.8. The plain number, STATX_MNT_ID, is reused by the next mount at once.

Source: statx(2), Linux man-pages 6.9; ``include/uapi/linux/stat.h`` for the masks and offsets.
"""
_RESULT = struct.Struct("=I 24x H 2x Q Q 48x q I 4x q I 4x 8x I I Q 104x")
"""Mask, mode, inode, size, ctime and mtime as seconds and nanoseconds, device's major and minor number, mount."""
_Buffer = ctypes.c_char * _RESULT.size

_STATMOUNT = 457
"""Since Linux 6.8; the same number on every processor. Source: statmount(2), Linux man-pages 6.10; the same header for
``struct mnt_id_req`` and ``struct statmount``.
"""
_SB_BASIC_AND_FS_TYPE = 0x1 | 0x20
_SB_RDONLY = 1
_TEXTS_AT = 512
_MOUNT = struct.Struct("=8x Q 16x I I")
"""Mask, the file system's flags, offset of the name of its kind among the strings."""

_libc = ctypes.CDLL(None)
_statx = getattr(_libc, "statx", None)
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


def status_of(file: str | os.PathLike[str] | int, *, follow_symlinks: bool = True) -> Status:
    """Return the status of a file or of an open descriptor, all of one moment.

    The mount is 0 if the kernel, the C library or a seccomp profile does not provide its unique number.

    Raises:
        OSError: There is no such file.
        ValueError: The path contains a NUL.
    """
    path = b"" if isinstance(file, int) else os.fsencode(file)
    descriptor = file if isinstance(file, int) else _AT_FDCWD
    flags = _AT_EMPTY_PATH if isinstance(file, int) else 0 if follow_symlinks else _AT_SYMLINK_NOFOLLOW
    result = _Buffer()
    if _statx is None or b"\0" in path or _statx(descriptor, path, flags, _BASIC_STATS | _MNT_ID_UNIQUE, result):
        return _by_stat(file, follow_symlinks=follow_symlinks)  # raises the right error
    mask, mode, inode, size, ctime_s, ctime_ns, mtime_s, mtime_ns, major, minor, mount = _RESULT.unpack(result)
    if not mask & _MNT_ID_UNIQUE:
        mount = 0
    device = os.makedev(major, minor)
    return device, inode, size, mtime_s * 1_000_000_000 + mtime_ns, ctime_s * 1_000_000_000 + ctime_ns, mount, mode


def _by_stat(file: str | os.PathLike[str] | int, *, follow_symlinks: bool) -> Status:
    found = os.fstat(file) if isinstance(file, int) else os.stat(file, follow_symlinks=follow_symlinks)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, 0, found.st_mode


def file_system_of(mount: int) -> tuple[str, bool] | None:
    """Return the kind of file system in a mount, and whether it is writable; None if the kernel does not report it.

    Args:
        mount: Its unique number.
    """
    request = struct.pack("=IIQQ", 24, 0, mount, _SB_BASIC_AND_FS_TYPE)
    found = ctypes.create_string_buffer(1024)
    if _libc.syscall(ctypes.c_long(_STATMOUNT), request, found, ctypes.c_size_t(len(found)), ctypes.c_long(0)):
        return None
    mask, flags, kind = _MOUNT.unpack_from(found)
    if mask & _SB_BASIC_AND_FS_TYPE != _SB_BASIC_AND_FS_TYPE:
        return None
    return found.raw[_TEXTS_AT + kind :].partition(b"\0")[0].decode("ascii", "replace"), not flags & _SB_RDONLY


def boot_id() -> str:
    """Return the id of the host's current boot; empty if the kernel does not provide one."""
    try:
        descriptor = os.open(BOOT_ID, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 64).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)
