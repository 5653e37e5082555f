"""The cache's folder: who may use it, what lies where, and with which modes.

Whoever may write to the root or to a folder in it can put code there. So, for each of these folders::

    a symbolic link, or no folder                               refused
    everyone may write to it, with the sticky bit or without    refused
    its owner is this user, or root                             used
    another's, setgid, its group may write and is ours          used: an init container and a server, say
    another's, and what we make there is the same user's        used: the file system keeps no owners (NFS with
                                                                all_squash, CIFS and FUSE with ``uid=``)
    another's otherwise                                         refused, with the ways out

The folders above the root are not refused, whoever may write to them: a volume of Kubernetes (``emptyDir``) is writable
by everyone without the sticky bit, and a folder below it is the way to use one. Whoever may write to them can put
another folder in the root's place, but not one that passes for this user's when it is opened. ``enginecache doctor``
warns of them.

Source: Linux, inode(7), for what the bits mean; Kubernetes, "Configure a Security Context", for ``fsGroup``, which
makes a volume root's, setgid, and writable by the group.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from enginecache.errors import StoreError
from enginecache.os_errors import describe_os_error

ArtefactKind = Literal["timing-caches", "runtime-caches"]
FOLDERS = ("engines", "quarantine", "logs", "locks", "tmp", "uses", *get_args(ArtefactKind))

_BUILD_ID = re.compile(r"[0-9a-f]{32}")
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def build_folder_prefix(build_id: str) -> str:
    """What the name of a build's folder in ``tmp/`` begins with."""
    return f"build-{build_id[:12]}-"


@dataclass(frozen=True)
class Root:
    """A checked cache folder.

    Attributes:
        path: The folder.
        is_shared: Whether its group may read and write.
    """

    path: Path
    is_shared: bool = False

    @property
    def folder_mode(self) -> int:
        """Mode of every folder: ``rwx`` for the owner, and for a shared root for the group, which new files inherit."""
        return _folder_mode(self.is_shared)

    @property
    def file_mode(self) -> int:
        """Mode of files that change: registry, locks, logs."""
        return 0o660 if self.is_shared else 0o600

    @property
    def blob_mode(self) -> int:
        """Mode of blobs, which never change."""
        return 0o440 if self.is_shared else 0o400

    @property
    def registry_path(self) -> Path:
        """The SQLite file."""
        return self.path / "registry.sqlite"

    @property
    def engines(self) -> Path:
        """Blobs, by the first two characters of their digest."""
        return self.path / "engines"

    @property
    def quarantine(self) -> Path:
        """Blobs that failed a check, kept for whoever wants to know why."""
        return self.path / "quarantine"

    @property
    def logs(self) -> Path:
        """One builder's log an attempt."""
        return self.path / "logs"

    @property
    def locks(self) -> Path:
        """Lock files; never deleted."""
        return self.path / "locks"

    @property
    def tmp(self) -> Path:
        """Work under way; what is old there is garbage."""
        return self.path / "tmp"

    @property
    def uses(self) -> Path:
        """One empty file a key; its modification time is the entry's last use."""
        return self.path / "uses"

    def artefacts(self, kind: ArtefactKind) -> Path:
        """What only saves time: one file a slot."""
        return self.path / kind

    def log_path(self, build_id: str) -> Path:
        """The log of an attempt. Only an id becomes a path: a damaged row's may be any text.

        Raises:
            StoreError: ``build_id`` is not one.
        """
        if _BUILD_ID.fullmatch(build_id) is None:
            raise StoreError(
                f"{build_id!r} is not the id of a build", "The registry is damaged: run `enginecache verify`."
            )
        return self.logs / f"{build_id}.log"

    @classmethod
    def open(cls, path: Path, shared: Literal["", "group"] = "") -> Root:
        """Make the folder where it is missing, check it, and return it.

        Idempotent; where all is there it writes nothing, so that a read-only root opens. Safe across processes.

        Args:
            path: The folder.
            shared: ``group`` shares it, also one that was private; empty leaves it as it is: the folder itself says
                whether it is shared, or users with other settings would store what the rest cannot read.

        Raises:
            StoreError: It cannot be made, or must not be used: see the table of this module.
        """
        try:
            _make_parents(path)
            make_folder(path, _folder_mode(shared == "group"), path.parent)
            _check(path)
            root = cls(path, _is_shared(path))
            if shared and not root.is_shared:
                root = _share(path)
            for name in FOLDERS:
                make_folder(path / name, root.folder_mode, path)
                _check(path / name)
        except OSError as error:
            raise _unusable(path, error) from error
        return root

    @classmethod
    def check(cls, path: Path) -> Root:
        """Like :meth:`open` for a folder that is there, without making anything.

        Raises:
            StoreError: It cannot be used.
        """
        try:
            for folder in (path, *(path / name for name in FOLDERS if os.path.lexists(path / name))):
                _check(folder)
            return cls(path, _is_shared(path))
        except OSError as error:
            raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> StoreError:
    if isinstance(error, StoreError):
        return error
    otherwise = "Name another with --dir or ENGINECACHE_DIR, or change its owner and mode."
    doing = f"the cache folder {path} cannot be used"
    return StoreError(*describe_os_error(error, doing, error.filename or path, otherwise=otherwise, in_cache=True))


def _make_parents(path: Path) -> None:
    """Like ``mkdir(parents=True)``, but never writable by everyone, as an umask of 0 would make them."""
    for parent in reversed(path.parents):
        if not parent.exists():
            with contextlib.suppress(FileExistsError):
                parent.mkdir(mode=0o755)


def make_folder(path: Path, mode: int, workspace: Path) -> None:
    """Make a folder with exactly this mode, durably, or leave the one that is there. Idempotent; safe across processes.

    It appears under its name with its mode: ``mkdir`` alone gives the mode that the umask leaves, and a crash before
    the ``chmod`` would shut the group out for ever.

    Args:
        path: The folder.
        mode: Its mode.
        workspace: A folder of the same file system, where a crash may leave an empty folder behind.

    Raises:
        OSError: It cannot be made.
    """
    if path.is_dir():
        # An earlier release left this mode in a shared root, if it crashed between its two steps.
        status = path.lstat()
        if stat.S_IMODE(status.st_mode) == 0o700 != mode and status.st_uid == os.geteuid():
            path.chmod(mode)
        return
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=workspace))
    try:
        temporary.chmod(mode)
        _rename_to_new(temporary, path)
    except OSError as error:
        temporary.rmdir()
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        return  # another process made it, or it is no folder, which the check says
    sync_folder(path.parent)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename, unless there is something: ``rename`` alone puts a folder in the place of an empty one.

    Another process may be about to use that one, and would find it gone.

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


def _folder_mode(is_shared: bool) -> int:
    return 0o2770 if is_shared else 0o700


def _is_shared(path: Path) -> bool:
    """Whether the group may use a root. ``engines/`` tells, as the root itself may be a volume that somebody made."""
    engines = path / "engines"
    return _is_for_group((engines if engines.exists() else path).lstat())


def _is_for_group(status: os.stat_result) -> bool:
    return status.st_mode & 0o2070 == 0o2070


def _share(path: Path) -> Root:
    """Open a root to its group: everything in it, then ``engines/``, whose mode says that it is done.

    Raises:
        StoreError: What is in it is another user's: only its owner may.
    """
    root = Root(path, is_shared=True)
    status = path.lstat()
    if status.st_uid == os.geteuid():
        path.chmod(stat.S_IMODE(status.st_mode) | 0o2770)
    if not root.engines.exists():
        return root
    owner = root.engines.lstat().st_uid
    if owner != os.geteuid():
        message = f"{path} is private to {_user_name(owner)}, so it cannot be shared with a group"
        raise StoreError(
            message, "Let that user open it once with ENGINECACHE_SHARED=group, or name another with --dir."
        )
    group = path.lstat().st_gid
    for folder, names, files in os.walk(path):
        for name in names:
            if Path(folder, name) != root.engines:
                _hand_to_group(Path(folder, name), group, root.folder_mode)
        for name in files:
            is_blob = name.endswith(".engine")
            _hand_to_group(Path(folder, name), group, root.blob_mode if is_blob else root.file_mode)
    _hand_to_group(root.engines, group, root.folder_mode)
    return root


def _hand_to_group(path: Path, group: int, mode: int) -> None:
    try:
        # O_PATH: a link that takes the place of the file is not followed, and no lock of SQLite's is dropped.
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # a temporary file that is gone by now
    try:
        if not stat.S_ISLNK(os.fstat(descriptor).st_mode):
            os.chown(f"/proc/self/fd/{descriptor}", -1, group)
            os.chmod(f"/proc/self/fd/{descriptor}", mode)  # noqa: PTH101  no path of ours
    finally:
        os.close(descriptor)


def _check(path: Path) -> None:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        message = f"{path} is a symbolic link: whoever may change it chooses which engines are served"
        raise StoreError(message, "Name the folder that it leads to with --dir or ENGINECACHE_DIR.")
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is not a folder", "Name another with --dir or ENGINECACHE_DIR.")
    if status.st_mode & stat.S_IWOTH:
        message = f"everyone may write to {path}: an engine there could be anybody's code"
        raise StoreError(message, "Name a folder below it, which enginecache makes private.")
    if not _is_trusted(path, status):
        raise _foreign(path, status)


def _is_trusted(path: Path, status: os.stat_result) -> bool:
    """Whether the folder's owner may choose which engines this process runs."""
    if status.st_uid in {os.geteuid(), 0}:
        return True
    if _is_for_group(status) and status.st_gid in {os.getegid(), *os.getgroups()}:
        return True
    return _owner_of_new_file(path) == status.st_uid


def _owner_of_new_file(path: Path) -> int | None:
    """Who owns what this process makes there; None where it can make nothing."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def _foreign(path: Path, status: os.stat_result) -> StoreError:
    owner = _user_name(status.st_uid)
    message = f"{path} belongs to {owner}, neither to this user nor to root: its owner chooses which engines are served"
    fix = (
        f"Run as {owner}, or make the folder this user's (chown), or name another with --dir.\n"
        "To share one: let its owner set ENGINECACHE_SHARED=group, and be a member of its group."
    )
    return StoreError(message, fix)


def _user_name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


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
