"""Explain errors of the operating system: one table from errno to the cause and to advice that fits it.

An errno has several causes: ``ENOSPC`` means no bytes or no inodes, ``EACCES`` concerns some folder of a path. So the
functions in the table look at the machine, and the advice is for the cause that they find.

Source: Linux, errno(3), path_resolution(7), statvfs(3), getrlimit(2), fork(2); measured for the limits, 2026-11.
"""

from __future__ import annotations

import errno
import os
import resource
import shlex
import threading
from collections.abc import Callable
from pathlib import Path

from enginecache.errors import EngineCacheError, printable

FEW_INODES = 16
"""Files that one build makes at most: with fewer free inodes, a file system counts as out of inodes."""
_FEW_BYTES = 1 << 20
_NAME_BYTES = 255
_PATH_BYTES = 4095
_SPARE_DESCRIPTORS = 8

RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""Errors of a process that has reached a limit: no path is at fault."""

_NO_MEMORY = (
    "bad_alloc",
    "MemoryError",
    "Cannot allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "OpenBLAS blas_thread_init",
    "OpenBLAS error: Memory allocation",
)
"""Words of C++, Python, the loader of shared libraries and OpenBLAS. Source: glibc, dl-load.c; OpenBLAS 0.3."""

_NO_THREADS = ("can't start new thread", "pthread_create", "Resource temporarily unavailable")
"""Words of Python, OpenBLAS and C++ (``std::system_error``) for a thread that cannot be started."""

_ABOUT_FOLDER = {
    errno.EACCES,
    errno.EEXIST,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""Errors that another cache folder avoids."""

_AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def describe_os_error(
    error: OSError | ValueError,
    doing: str,
    path: _AnyPath | None = None,
    *,
    otherwise: str = "See `enginecache doctor`.",
    in_cache: bool = False,
) -> tuple[str, str]:
    """Return ``what`` and ``fix`` of an ``EngineCacheError``: the failure with its cause, and advice.

    Call it in the handler of the error, before anything is cleaned up: it looks at the file system, the path and the
    limits of this process.

    Args:
        error: The error; a ``ValueError`` is an impossible path.
        doing: The failed action as the beginning of a sentence, such as ``the engine cannot be copied to x.plan``.
        path: The file or folder; default: the one that the error names.
        otherwise: Advice for an errno that is not in the table.
        in_cache: Whether the path is in the cache folder; then the advice includes ``enginecache prune`` or ``--dir``.
    """
    if isinstance(error, EngineCacheError):
        return error.what, error.fix  # it is explained already
    where = _path_of(error, path)
    explain = _TABLE.get(error.errno or 0) if isinstance(error, OSError) else _not_a_path
    if explain is None:
        return f"{doing}: {_text_of(error)}", otherwise
    why, fix = explain(where)
    what = ": ".join(filter(None, (doing, _text_of(error), why)))
    return what, _in_cache(error, fix) if in_cache else fix


def shell_path(path: _AnyPath) -> str:
    r"""Return a path as one word of a suggested command line: a shell reads exactly this path.

    Escaped characters have the form that bash, zsh and ksh read (``$'\\x1b'``), and a leading dash is protected.
    """
    text = os.fsdecode(path)
    text = f"./{text}" if text.startswith("-") else text
    if printable(text) == text:
        return shlex.quote(text)
    plain = set(range(0x20, 0x7F)) - set(b"\\'")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(text)) + "'"


def is_about_memory(text: str) -> bool:
    """Return whether a message of a library, or a line of a log, says that memory ran out."""
    return any(words in text for words in _NO_MEMORY)


def is_about_threads(text: str) -> bool:
    """Return whether a line of a log says that no more threads may be started."""
    return any(words in text for words in _NO_THREADS)


def is_out_of_descriptors() -> bool:
    """Return whether this process can open hardly any more files: SQLite and ``import`` hide that errno."""
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(_SPARE_DESCRIPTORS))
    except OSError as error:
        return error.errno in {errno.EMFILE, errno.ENFILE}
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return False


def can_start_threads(count: int) -> bool:
    """Return whether this process can start ``count`` more threads, by starting them: the limit is per user and host.

    For native code that does not report it: BLAKE3 panics, and TensorRT waits forever for a thread that it lacks.
    """
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(count)]
    started = 0
    try:
        for thread in threads:
            thread.start()
            started += 1
    except (RuntimeError, MemoryError):
        return False
    finally:
        end.set()
        for thread in threads[:started]:
            thread.join()
    return True


def free_inodes(path: _AnyPath) -> int | None:
    """Return the number of files that this user may still create on the path's file system; None if it is unlimited.

    Raises:
        OSError: The file system does not say.
    """
    status = os.statvfs(path)
    return status.f_favail if status.f_files else None


def explain_full_disk(path: _AnyPath | None) -> tuple[str, str]:
    """Return why the path's file system is full, and advice: bytes and inodes run out separately.

    Raises:
        OSError: The file system does not say.
    """
    folder = _existing(path)
    if folder is None:
        return "its file system is full", "Free some room on it, or name a place on another file system."
    status = os.statvfs(folder)
    free = f"{status.f_bavail * status.f_frsize / (1 << 20):.1f} MiB"
    if status.f_files and status.f_favail < FEW_INODES and status.f_bavail * status.f_frsize >= _FEW_BYTES:
        why = (
            f"the file system of {folder} has no inodes left ({status.f_favail} of {status.f_files} are free), so no "
            f"more files fit, although {free} are free"
        )
        return (
            why,
            f"Delete files there (`df -i {shell_path(folder)}` counts them), or name a place on another file system.",
        )
    why = f"the file system of {folder} is full ({free} are free)"
    shows = f"`df {shell_path(folder)}` shows how much there is"
    return why, f"Free some room on it ({shows}), or name a place on another file system."


def _explain_descriptors(_path: _AnyPath | None = None) -> tuple[str, str]:
    """Return the limit of open files as the cause, and how to raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    why = f"this process may open {soft}"
    if hard == resource.RLIM_INFINITY or hard > soft:
        more = 4096 if hard == resource.RLIM_INFINITY else min(hard, max(4096, 2 * soft))
        return why, f"Raise the limit first (`ulimit -n {more}`), or close files that this program holds open."
    return why, (
        "Raise the limit in what starts this program (`ulimit -n 4096`; LimitNOFILE= of systemd; --ulimit nofile= of a "
        "container), or close files that this program holds open."
    )


def _path_of(error: OSError | ValueError, path: _AnyPath | None) -> _AnyPath | None:
    if path is None and isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        return error.filename
    return path


def _text_of(error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error) or type(error).__name__


def _in_cache(error: OSError | ValueError, fix: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return (
            f"{fix}\n`enginecache doctor` shows what is free; `enginecache prune --older-than 30d` deletes the engines "
            "that were not used for that long."
        )
    if number == errno.ENOENT:
        return "See `enginecache doctor`; the next `enginecache get` makes what is missing in the cache's folder."
    if number in _ABOUT_FOLDER:
        return f"{fix}\nOr name another folder for the cache with --dir or ENGINECACHE_DIR."
    return fix


def _existing(path: _AnyPath | None) -> Path | None:
    """Return the path, or the first folder above it that exists and may be read."""
    if path is None:
        return None
    try:
        whole = Path(os.path.abspath(os.fsdecode(path)))
    except (OSError, ValueError):
        return None
    for folder in (whole, *whole.parents):
        try:
            os.statvfs(folder)
        except (OSError, ValueError):
            continue
        return folder
    return None


def _steps(path: _AnyPath | None) -> list[Path]:
    """Return the folders of a path from the root on, and the path."""
    if path is None:
        return []
    try:
        whole = Path(os.path.abspath(os.fsdecode(path)))
    except (OSError, ValueError):
        return []
    return [*reversed(whole.parents), whole]


def _named(path: _AnyPath | None, otherwise: str = "the path") -> str:
    return otherwise if path is None else os.fsdecode(path)


def _closed(path: _AnyPath | None) -> tuple[str, str]:
    who = f"user {os.geteuid()}"
    for folder in _steps(path)[:-1]:
        if os.path.isdir(folder) and not os.access(folder, os.X_OK, effective_ids=True):
            return f"{who} may not enter {folder}", (
                f"Let this user enter it (chmod or chown; `ls -ld {shell_path(folder)}`), or name another place."
            )
    steps = _steps(path)
    found = _existing(path)
    if found is not None and steps and found != steps[-1]:
        return f"{who} may not write to {found}", (
            f"Let this user write there (chmod or chown; `ls -ld {shell_path(found)}`), or name another place."
        )
    named = _named(path)
    return f"for {who}", f"Give this user permission on {named} and its folder (`ls -ld`)."


def _not_permitted(path: _AnyPath | None) -> tuple[str, str]:
    named = _named(path)
    return "", (
        f"Check whether {named} belongs to another user (`ls -ld`), is immutable (`lsattr -d`), or is denied to this "
        "process by a container's security settings."
    )


def _too_long(path: _AnyPath | None) -> tuple[str, str]:
    whole = os.fsencode(path) if path is not None else b""
    for part in whole.split(b"/"):
        if len(part) > _NAME_BYTES:
            return f"a name in it has {len(part)} bytes, and file systems allow {_NAME_BYTES}", "Use a shorter name."
    if len(whole) > _PATH_BYTES:
        why = f"the path has {len(whole)} bytes, and the kernel allows {_PATH_BYTES}"
        return why, "Use a shorter path, for example one relative to a nearer working folder."
    return "", "Use a shorter name."


def _not_a_folder(path: _AnyPath | None) -> tuple[str, str]:
    for step in _steps(path)[:-1]:
        if os.path.exists(step) and not os.path.isdir(step):
            return f"{step} is a file, not a folder", "Check the path; a name in it may be mistyped."
    return "", "Check the path; a name in it may be mistyped."


def _missing(path: _AnyPath | None) -> tuple[str, str]:
    for step in _steps(path):
        if not os.path.lexists(step):
            return (
                f"there is no {step}",
                "Check the path: a name in it may be mistyped, or a volume may not be mounted.",
            )
        if os.path.islink(step) and not os.path.exists(step):
            return (
                f"{step} is a link to {os.readlink(step)}, which does not exist",
                "Repair the link, or name the file.",
            )
    return "", "Check the path: a name in it may be mistyped, or a volume may not be mounted."


def _not_a_path(_path: _AnyPath | None) -> tuple[str, str]:
    return "no file can have that name", "Check the source of the path."


def explain_threads(_path: _AnyPath | None = None) -> tuple[str, str]:
    """Return the limit of threads as the cause, and how to raise it."""
    return "no more processes or threads may be started", (
        "End some, or raise the limit (`ulimit -u`; the pids limit of the container; TasksMax= of systemd)."
    )


def _memory(_path: _AnyPath | None) -> tuple[str, str]:
    return (
        "this process is out of memory",
        "Free memory, or raise the limit (`ulimit -v`; the memory limit of the container).",
    )


def _fixed(why: str, fix: str) -> Callable[[_AnyPath | None], tuple[str, str]]:
    def explain(path: _AnyPath | None) -> tuple[str, str]:
        return why, fix.format(path="PATH" if path is None else shell_path(path))

    return explain


_TABLE: dict[int, Callable[[_AnyPath | None], tuple[str, str]]] = {
    errno.EMFILE: _explain_descriptors,
    errno.ENFILE: _fixed("", "End programs that hold many open, or raise `sysctl fs.file-max`."),
    errno.ENOSPC: explain_full_disk,
    errno.EDQUOT: _fixed(
        "",
        "Delete files there (`quota -s` shows what counts), or have the quota raised.",
    ),
    errno.EFBIG: _fixed(
        "the limit is this process's (`ulimit -f`) or its file system's",
        "Raise `ulimit -f`, or name a place on another file system.",
    ),
    errno.ENAMETOOLONG: _too_long,
    errno.EACCES: _closed,
    errno.EPERM: _not_permitted,
    errno.EROFS: _fixed("", "Name a place that can be written, or mount it for writing."),
    errno.ELOOP: _fixed("", "Check the links with `namei -l {path}`."),
    errno.EIO: _fixed("the disk reports the error", "Look for a failing disk in `dmesg`."),
    errno.EUCLEAN: _fixed("its file system is damaged", "Look in `dmesg`, and check the file system (fsck)."),
    errno.ENOTDIR: _not_a_folder,
    errno.EISDIR: _fixed("", "Name the file inside it."),
    errno.ENOENT: _missing,
    errno.EEXIST: _fixed("", "Something else has that name: look at it with `ls -ld {path}`, and move it away."),
    errno.ESTALE: _fixed("its network file system lost the file", "Try again; if the error persists, mount it again."),
    errno.ENOTCONN: _fixed("the program behind its file system (FUSE) died", "Mount it again."),
    errno.EHOSTDOWN: _fixed("the server of its network file system does not answer", "Try again later."),
    errno.ETIMEDOUT: _fixed("its network file system does not answer in time", "Try again later."),
    errno.ETXTBSY: _fixed("the program is being written, or is running", "Try again when it is finished."),
    errno.EBUSY: _fixed("it is in use by the system, as a mount point is", "Name another place, or unmount it."),
    errno.EXDEV: _fixed(
        "the two places are in different mounts",
        "Mount the whole cache folder as one, and none of the folders in it (`findmnt -R` lists what is mounted).",
    ),
    errno.ENOEXEC: _fixed("it is not a program that this machine can run", "Name a program for this machine."),
    errno.ENXIO: _fixed("it is a device or pipe with nothing behind it", "Name a regular file."),
    errno.ENODEV: _fixed("", "Name a regular file."),
    errno.ENOLCK: _fixed(
        "its file system has no locks left, or does not support them",
        "Keep the cache on a local disk: name one with --dir.",
    ),
    errno.ENOTSUP: _fixed("", "Name a place on a local disk."),
    errno.E2BIG: _fixed("the environment and arguments are too long", "Unset large variables of the environment."),
    errno.EAGAIN: explain_threads,
    errno.ENOMEM: _memory,
}
