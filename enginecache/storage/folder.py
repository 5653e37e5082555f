"""The cache's folder: its users, its layout and its modes.

Whoever may write to the root or to a folder in it can put code there. So, for each of these folders::

    a symbolic link, or no folder                               refused
    everyone may write to it, with the sticky bit or without    refused
    its owner is this user, or root                             used
    another's, setgid, its group may write and is ours          used: an init container and a server, say
    another's, and what we make there is the same user's        used: the file system keeps no owners (NFS with
                                                                all_squash, CIFS and FUSE with ``uid=``)
    another's otherwise                                         refused, with the ways out

Before any of that, and before anything is made: a folder that holds something and does not carry the marker of a cache
is refused, see :mod:`enginecache.storage.marker`.

The folders above the root are not refused, whoever may write to them: a volume of Kubernetes (``emptyDir``) is writable
by everyone without the sticky bit, and a folder below it is the way to use one. Whoever may write to them can put
another folder in the root's place, but not one that passes for this user's when it is opened. ``enginecache doctor``
warns of them.

Source: Linux, inode(7), for what the bits mean; Kubernetes, "Configure a Security Context", for ``fsGroup``, which
makes a volume root's, setgid, and writable by the group.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from enginecache.errors import StoreError
from enginecache.files.mounts import status_of
from enginecache.files.os_errors import describe_os_error, shell_path
from enginecache.storage import marker
from enginecache.storage.durable import make_folder
from enginecache.storage.names import owned

ArtefactKind = Literal["timing-caches", "runtime-caches"]
FOLDERS = ("engines", "quarantine", "logs", "locks", "tmp", "uses", *get_args(ArtefactKind))

_BUILD_ID = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def build_folder_prefix(build_id: str) -> str:
    """Return the beginning of the name of a build's folder in ``tmp/``."""
    return f"build-{build_id[:12]}-"


@dataclass
class Root:
    """A checked cache folder, or the place where one will be made.

    Attributes:
        path: The folder.
        is_shared: Whether its group may read and write.
        is_made: Whether it is a cache already; if not, it is missing or empty. Both as of the last look.
    """

    path: Path
    is_shared: bool = False
    is_made: bool = False

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
        """Return the path of the SQLite file."""
        return self.path / "registry.sqlite"

    @property
    def engines(self) -> Path:
        """Blobs, by the first two characters of their digest."""
        return self.path / "engines"

    @property
    def quarantine(self) -> Path:
        """Blobs that failed a check, kept for inspection."""
        return self.path / "quarantine"

    @property
    def logs(self) -> Path:
        """Return the folder of the builders' logs, one for each attempt."""
        return self.path / "logs"

    @property
    def locks(self) -> Path:
        """Lock files; never deleted."""
        return self.path / "locks"

    @property
    def tmp(self) -> Path:
        """Work under way; old files there are orphans."""
        return self.path / "tmp"

    @property
    def uses(self) -> Path:
        """Return the folder with one empty file a key, whose modification time is the entry's last use."""
        return self.path / "uses"

    def is_mounted_over(self) -> bool:
        """Return whether ``engines/`` is another mount than the folder, which enginecache never makes.

        The engines may lie hidden under it; and none can be published, as a rename leads from no mount to another.
        """
        try:
            root, engines = (status_of(path, follow_symlinks=False) for path in (self.path, self.engines))
        except OSError:
            return False
        return (root[0], root[5]) != (engines[0], engines[5])

    def artefacts(self, kind: ArtefactKind) -> Path:
        """Return the folder of one kind of side caches: one file a slot."""
        return self.path / kind

    def blob_path(self, digest: str) -> Path:
        """Return where a blob is. Only a digest becomes a path: nothing else from a row or file does.

        Raises:
            StoreError: ``digest`` is not one.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise StoreError(f"{digest!r} is not a digest", "The registry is damaged: run `enginecache verify`.")
        return self.engines / digest[:2] / f"{digest}.engine"

    def log_path(self, build_id: str) -> Path:
        """Return the path of an attempt's log. Only an id becomes a path: a damaged row may hold any string.

        Raises:
            StoreError: ``build_id`` is not one.
        """
        if _BUILD_ID.fullmatch(build_id) is None:
            raise StoreError(
                f"{build_id!r} is not the id of a build", "The registry is damaged: run `enginecache verify`."
            )
        return self.logs / f"{build_id}.log"

    @classmethod
    def find(cls, path: Path, shared: Literal["", "group"] = "") -> Root:
        """Check the folder and return it, whether it is a cache or may become one. Makes and changes nothing.

        Args:
            path: The folder.
            shared: What it will be where it is not made yet. Else the folder itself says so: users with other settings
                would store what the rest cannot read.

        Raises:
            StoreError: It must not be used: see the table of this module.
        """
        root = cls(path, shared == "group")
        root.look()
        return root

    @classmethod
    def open(cls, path: Path, shared: Literal["", "group"] = "") -> Root:
        """Like :meth:`find`, then :meth:`make`."""
        root = cls.find(path, shared)
        root.make(shared)
        return root

    def look(self) -> None:
        """Check the folder again, and find out whether another process has made or shared it meanwhile.

        Raises:
            StoreError: It must not be used.
        """
        with _translated(self.path):
            status = _lstat(self.path)
            self.is_made = status is not None and _is_cache(self.path, status)
            if self.is_made:
                for name in FOLDERS:
                    if os.path.lexists(self.path / name):
                        _check(self.path / name)
                _check_registry(self.registry_path)
                self.is_shared = _is_shared(self.path)
            elif status is not None:
                self.is_shared = self.is_shared or _is_for_group(status)

    def make(self, shared: Literal["", "group"] = "") -> bool:
        """Make the folder, and the folders in it, where they are missing.

        Idempotent; where all is there it writes nothing, so that a read-only root opens. Safe across processes. The
        marker is durable before anything else is made, so a death at any step leaves what the next call accepts.

        Args:
            shared: ``group`` shares the folder, also one that was private; empty leaves it as it is.

        Returns:
            Whether this call made a cache where none was.

        Raises:
            StoreError: It cannot be made, or must not be used.
        """
        with _translated(self.path):
            is_new = not self.is_made and self._mark()
            if shared:
                self.share()
            for name in FOLDERS:
                make_folder(self.path / name, self.folder_mode, self.path)
                _check(self.path / name)
        return is_new

    def share(self) -> None:
        """Open a cache that is private to its group. Idempotent; what was interrupted is finished.

        Raises:
            StoreError: Another user owns it: only the owner may.
        """
        if not self.is_shared:
            with _translated(self.path):
                _share(self.path)
                self.is_shared = True

    def _mark(self) -> bool:
        self.look()
        if self.is_made:
            return False
        marker_mode = self.blob_mode
        if _lstat(self.path) is None:
            _make_parents(self.path)
            is_new = make_folder(
                self.path, self.folder_mode, self.path.parent, lambda folder: marker.write_marker(folder, marker_mode)
            )
        else:
            is_new = marker.write_marker(self.path, marker_mode)
        self.look()
        return is_new


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        otherwise = "Name another with --dir or ENGINECACHE_DIR, or correct its owner and mode."
        doing = f"the cache folder {path} cannot be used"
        raise StoreError(
            *describe_os_error(error, doing, error.filename or path, otherwise=otherwise, in_cache=True)
        ) from error


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _is_cache(path: Path, status: os.stat_result) -> bool:
    """Return whether the folder is a cache; False where it is empty and may become one.

    Raises:
        StoreError: It must not be used.
    """
    _check_kind(path, status)
    try:
        is_marked = marker.is_marked(path)
    except PermissionError:
        if status.st_uid != os.geteuid():
            raise _closed(path, status) from None
        raise
    _check_owner(path, status)  # after the marker: it may make a file for a moment
    return is_marked


def _make_parents(path: Path) -> None:
    """Like ``mkdir(parents=True)``, but never writable by everyone, as an umask of 0 would make them."""
    for parent in reversed(path.parents):
        if not parent.exists():
            with contextlib.suppress(FileExistsError):
                parent.mkdir(mode=0o755)


def _folder_mode(is_shared: bool) -> int:
    return 0o2770 if is_shared else 0o700


def _is_shared(path: Path) -> bool:
    """Return whether the group may use a root. Looks at ``engines/``: the root may be somebody's volume."""
    engines = path / "engines"
    return _is_for_group((engines if engines.exists() else path).lstat())


def _is_for_group(status: os.stat_result) -> bool:
    return status.st_mode & 0o2070 == 0o2070


def _share(path: Path) -> None:
    """Open a root to its group: all that enginecache made in it, and ``engines/`` last, whose mode marks the end.

    Raises:
        StoreError: Another user owns it: only the owner may.
    """
    root = Root(path, is_shared=True)
    status = path.lstat()
    if status.st_uid == os.geteuid():
        path.chmod(stat.S_IMODE(status.st_mode) | 0o2770)
    if root.engines.exists():
        owner = root.engines.lstat().st_uid
        if owner != os.geteuid():
            message = f"{path} is private to {_user_name(owner)}, so it cannot be shared with a group"
            fix = "Let that user open it once with ENGINECACHE_SHARED=group, or name another with --dir."
            raise StoreError(message, fix)
    group = path.lstat().st_gid
    modes = {"folder": root.folder_mode, "blob": root.blob_mode, "file": root.file_mode}
    for found, kind in owned(path):
        _hand_to_group(found, group, modes[kind])


def _hand_to_group(path: str, group: int, mode: int) -> None:
    try:
        # O_PATH: a link that takes the place of the file is not followed, and no lock of SQLite's is dropped.
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # a temporary file that was deleted meanwhile
    try:
        status = os.fstat(descriptor)
        # A file with a second name is that of whoever gave it one, too: it keeps its mode.
        if stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            os.chown(f"/proc/self/fd/{descriptor}", -1, group)
            os.chmod(f"/proc/self/fd/{descriptor}", mode)  # noqa: PTH101  of a descriptor
    finally:
        os.close(descriptor)


def _check(path: Path) -> None:
    status = path.lstat()
    _check_kind(path, status)
    _check_owner(path, status)


def _check_kind(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        message = f"{path} is a symbolic link: whoever may change it chooses which engines are served"
        raise StoreError(message, "Name the folder that it leads to with --dir or ENGINECACHE_DIR.")
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is not a folder", "Name another with --dir or ENGINECACHE_DIR.")
    if status.st_mode & stat.S_IWOTH:
        message = f"everyone may write to {path}: an engine there could be anybody's code"
        raise StoreError(message, "Name a folder below it, which enginecache makes private.")


def _check_registry(path: Path) -> None:
    """Refuse a registry that is no file of the folder: SQLite follows a link, and waits for the writer of a pipe."""
    for file in (path, *(path.with_name(path.name + suffix) for suffix in ("-journal", "-wal", "-shm"))):
        status = _lstat(file)
        if status is not None and not stat.S_ISREG(status.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
            message = f"{file} is {kind}, and enginecache would use it as its registry"
            fix = f"Move it away: look at it with `ls -ld {shell_path(file)}`."
            if file == path:
                fix += "\nThen `enginecache verify --repair --yes` makes the registry anew from the stored engines."
            raise StoreError(message, fix)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if not _is_trusted(path, status):
        raise _foreign(path, status)


def _is_trusted(path: Path, status: os.stat_result) -> bool:
    """Return whether the folder's owner may choose which engines this process runs."""
    if status.st_uid in {os.geteuid(), 0}:
        return True
    if _is_for_group(status) and status.st_gid in {os.getegid(), *os.getgroups()}:
        return True
    return _owner_of_new_file(path) == status.st_uid


def _owner_of_new_file(path: Path) -> int | None:
    """Return the owner of files that this process makes there; None where it can make none."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def _foreign(path: Path, status: os.stat_result) -> StoreError:
    owner = _user_name(status.st_uid)
    message = f"{path} belongs to {owner}, neither to this user nor to root: its owner chooses which engines are served"
    top = path.parent if os.path.lexists(path.parent / marker.NAME) else path
    fix = f"Run as {owner}, or take it over (`chown -R {os.geteuid()} {shell_path(top)}`), or name another with --dir."
    return StoreError(message, f"{fix}\nTo share it: {_sharing(top)}")


def _closed(path: Path, status: os.stat_result) -> StoreError:
    """Return the error for another user's folder that cannot be read: it need not be a cache, so nobody may take it."""
    owner = _user_name(status.st_uid)
    message = f"{path} belongs to {owner}, and user {os.geteuid()} may not look into it"
    fix = f"Run as {owner}, or name another with --dir or ENGINECACHE_DIR."
    return StoreError(message, f"{fix}\nIf it is a cache, it can be shared: {_sharing(path)}")


def _sharing(path: Path) -> str:
    return (
        f"its owner runs `ENGINECACHE_SHARED=group enginecache ls --dir {shell_path(path)}` once; this user joins the "
        f"group {path.lstat().st_gid} (fsGroup or supplementalGroups on Kubernetes)."
    )


def _user_name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"
