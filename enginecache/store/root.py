"""The cache's folder: who may use it, what lies where, and with which modes."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from enginecache.errors import StoreError

ArtefactKind = Literal["timing-caches", "runtime-caches"]
FOLDERS = ("engines", "quarantine", "logs", "locks", "tmp", "uses", *get_args(ArtefactKind))


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
        return 0o2770 if self.is_shared else 0o700

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

    @classmethod
    def open(cls, path: Path, shared: Literal["", "group"] = "") -> Root:
        """Make the folder where it is missing, check it, and return it.

        Idempotent; where all is there it writes nothing, so that a read-only root opens.

        Raises:
            StoreError: It cannot be made, is no folder, is a symbolic link, or everyone may write to it.
        """
        root = cls(path, shared == "group")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_folder(path, root.folder_mode)
            _check(path)
            for name in FOLDERS:
                _make_folder(path / name, root.folder_mode)
                _check(path / name)
        except OSError as error:
            raise _unusable(path, error) from error
        return root

    @classmethod
    def check(cls, path: Path, shared: Literal["", "group"] = "") -> Root:
        """Like :meth:`open` for a folder that is there, without making anything.

        Raises:
            StoreError: It cannot be used.
        """
        try:
            for folder in (path, *(path / name for name in FOLDERS if (path / name).exists())):
                _check(folder)
        except OSError as error:
            raise _unusable(path, error) from error
        return cls(path, shared == "group")


def _unusable(path: Path, error: OSError) -> StoreError:
    if isinstance(error, StoreError):
        return error
    message = f"the cache folder {path} cannot be used: {error.strerror or error}"
    return StoreError(message, "Name another with --dir or ENGINECACHE_DIR, or mend its owner and mode.")


def _make_folder(path: Path, mode: int) -> None:
    if path.is_dir():
        # Private before and shared now, or a crash between the two steps below. No other mode is touched.
        status = path.lstat()
        if stat.S_IMODE(status.st_mode) == 0o700 != mode and status.st_uid == os.geteuid():
            path.chmod(mode)
        return
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return  # another process made it, or it is no folder, which the check says
    path.chmod(mode)  # mkdir's mode is cut by the umask
    sync_folder(path.parent)


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
