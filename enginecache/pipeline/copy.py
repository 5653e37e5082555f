"""Copy a plan to a place outside the cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import uuid
from pathlib import Path

from enginecache.errors import OptionError, StoreError
from enginecache.files.os_errors import describe_os_error, shell_path

_FICLONE = 0x40049409
"""Share the blocks of another file, copy on write. Source: Linux, ioctl_ficlone(2)."""

PLAN_MAGICS = (b"ftrt", b"ptrt", b"vtrt")
"""First bytes of a plan: TensorRT 8.6 and later, TensorRT before, TensorRT-RTX. Measured, 2026-11."""


def check_target(target: Path, keep_out: Path, model: Path) -> None:
    """Refuse a place for a copy that :func:`export_plan` could not fill, or must not, before anything is built.

    A file is replaced only if it is a TensorRT plan, or empty: so neither the model nor anything else that a build
    reads, by whatever name, link or hard link, nor a file that merely has a name like a plan's.

    Args:
        target: A file to make or replace.
        keep_out: The cache folder, in which no copy may land.
        model: The model, for a clearer message.

    Raises:
        OptionError: It is such a place; the message says why.
    """
    place = _real(target)
    _require_outside(place, keep_out)
    try:
        status = target.stat()  # of what a link leads to
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise OptionError(*_unusable(target, error)) from error
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise OptionError(
            f"-o: {target} is a folder", f"Name the file, such as -o {shell_path(target / 'model.plan')}."
        )
    if not place.parent.is_dir():
        make = f"mkdir -p -- {shell_path(target.parent)}"
        raise OptionError(f"-o: there is no folder {target.parent}", f"Make it: {make}")
    if status is not None:
        _require_plan(target, status, keep_out, model)
    try:
        _require_room(place)
    except OSError as error:
        raise OptionError(*_unusable(target, error)) from error


def _unusable(target: Path, error: OSError) -> tuple[str, str]:
    what, fix = describe_os_error(error, f"-o: {target} cannot be written", target, otherwise="")
    return what, "\n".join(filter(None, (fix, "Or name another file with -o.")))


def _require_plan(target: Path, status: os.stat_result, keep_out: Path, model: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        if os.path.samestat(status, model.stat()):
            raise OptionError(f"-o: {target} is the model", "Name another file.")
    if not stat.S_ISREG(status.st_mode):
        raise OptionError(f"-o: {target} is not a regular file, and a plan would take its place", "Name another file.")
    if status.st_nlink > 1 and any(_is_same(status, blob) for blob in keep_out.glob("engines/*/*")):
        raise OptionError(f"-o: {target} is a hard link to a stored engine", "Delete that link, or name another file.")
    try:
        is_plan = _is_plan_or_empty(target)
    except OSError as error:
        raise OptionError(*_unusable(target, error)) from error
    if not is_plan:
        message = f"-o: {target} exists and is not a TensorRT plan, so it is not replaced"
        raise OptionError(message, "Name another file, or delete that one first.")


def _is_plan_or_empty(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PLAN_MAGICS[0])) in (b"", *PLAN_MAGICS)


def _is_same(status: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(status, path.lstat())
    except OSError:
        return False


def _require_room(place: Path) -> None:
    """Make and delete a file there, as only the file system knows whether that works.

    Raises:
        OSError: It does not, or the file system is full, or the name is too long.
    """
    with contextlib.suppress(FileNotFoundError):
        place.lstat()  # a name that is too long
    temporary = _temporary(place)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, 1)
    finally:
        os.close(descriptor)
        temporary.unlink()


def _temporary(target: Path) -> Path:
    # Short: the target's own name may be as long as a name can be.
    return target.parent / f".enginecache-{uuid.uuid4().hex[:16]}"


def _real(target: Path) -> Path:
    """Return ``target`` in its real folder; a link of that name stays one, since a copy takes its place."""
    try:
        return Path(os.path.realpath(target.parent)) / target.name
    except (OSError, ValueError) as error:
        what, fix = describe_os_error(error, f"-o: {target} cannot be written", target)
        raise OptionError(what, fix) from error


def _require_outside(place: Path, keep_out: Path) -> None:
    for folder, what in ((Path(os.path.realpath(keep_out)), "the cache folder"), (Path("/dev"), "/dev")):
        # /dev/stdout is a link, and may lead to a regular file. Shared memory is a file system like another.
        if place.is_relative_to(folder) and (what != "/dev" or not place.is_relative_to("/dev/shm")):  # noqa: S108
            raise StoreError(f"the engine cannot be copied to {place}: it lies in {what}", "Name another file with -o.")


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
    target = _real(target)
    _require_outside(target, keep_out)
    try:
        _require_replaceable(target)
        temporary = _temporary(target)
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
        what, fix = describe_os_error(
            error, f"the engine cannot be copied to {target}", error.filename or target, otherwise=""
        )
        kept = "The engine is in the cache; name a writable file with -o."
        raise StoreError(what, "\n".join(filter(None, (fix, kept)))) from error


def _require_replaceable(target: Path) -> None:
    # A rename would put a file in the place of a device such as /dev/stdout.
    if target.exists() and not target.is_file():
        message = f"the engine cannot be copied to {target}: it is there and is not a regular file"
        raise StoreError(message, "Name another file with -o.")
    # Again: a build takes minutes, in which another program may have written a file there.
    if target.is_file() and not target.is_symlink() and not _is_plan_or_empty(target):
        message = f"the engine is not copied to {target}: a file that is not a TensorRT plan is there"
        raise StoreError(message, "The engine is in the cache; name another file with -o.")
