"""Blobs: immutable bytes, named by their digest, in a local folder."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from enginecache.errors import StoreError
from enginecache.files.digest import SMALL_BYTES, StreamDigest
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.mounts import status_of
from enginecache.files.os_errors import describe_os_error
from enginecache.storage.durable import is_real_folder, make_folder, sync_folder
from enginecache.storage.folder import Root
from enginecache.storage.names import digest_of_blob, files_in, folders_in
from enginecache.storage.repair_files import RepairRecords

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class StagedBlob:
    """A plan that is durable but does not have its name yet.

    Attributes:
        digest: BLAKE3 of the bytes, 64 hex characters.
        size_bytes: How many.
        path: The temporary file.
    """

    digest: str
    size_bytes: int
    path: Path


@dataclass(frozen=True)
class ReadBlob:
    """The result of reading a whole blob.

    Attributes:
        digest: BLAKE3 of the bytes that are there.
        fingerprint: The file's, the same before and after reading.
        is_settled: Whether the fingerprint may stand for the bytes from now on.
    """

    digest: str
    fingerprint: Fingerprint
    is_settled: bool


class Blobs:
    """The blobs below a root's ``engines/``, each with its repair record. Safe across threads and processes.

    Not safe on NFS: whether a rename survives a crash there is the server's choice.

    Args:
        root: The cache folder.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._records = RepairRecords(root)

    def path(self, digest: str) -> Path:
        """Return where the blob is, whether it is there or not.

        Raises:
            StoreError: ``digest`` is not one.
        """
        return self._root.blob_path(digest)

    def stage(self, source: Path) -> StagedBlob:
        """Copy ``source`` to a durable temporary file while hashing it; the source is left alone."""
        with _translated("an engine cannot be stored"), source.open("rb", buffering=0) as plan:
            return self.stage_written(lambda target: _copy(plan, target))

    def stage_written(self, write: Callable[[io.BufferedWriter], str]) -> StagedBlob:
        """Let ``write`` fill a durable temporary file; it returns the digest of what it wrote."""
        with _translated("an engine cannot be stored"):
            descriptor, name = tempfile.mkstemp(prefix="blob-", dir=self._root.tmp)
            try:
                with os.fdopen(descriptor, "wb") as target:
                    digest = write(target)
                    target.flush()
                    os.fchmod(target.fileno(), self._root.blob_mode)
                    os.fsync(target.fileno())
                    size = target.tell()
            except BaseException:
                _drop(Path(name))
                raise
        return StagedBlob(digest, size, Path(name))

    def adopt(self, plan: Path) -> StagedBlob:
        """Hash a plan where its builder left it, and make it durable; nobody has it open for writing any more.

        It is copied if another file system or another user has it, or if it has a second name.
        """
        with _translated("an engine cannot be stored"):
            descriptor = os.open(plan, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
                if not is_ours or status.st_dev != self._root.tmp.stat().st_dev:
                    return self.stage(plan)
                with contextlib.closing(StreamDigest()) as stream:
                    stream.read_from(file, status.st_size)
                    digest = stream.hexdigest()
                os.fchmod(descriptor, self._root.blob_mode)
                os.fsync(descriptor)
        return StagedBlob(digest, status.st_size, plan)

    def publish(self, staged: StagedBlob) -> Path:
        """Give staged bytes their name.

        A blob that is there already is replaced by its equal: readers keep the old inode, and damage is healed.
        """
        target = self.path(staged.digest)
        with _translated("an engine cannot be stored"):
            make_folder(target.parent, self._root.folder_mode, self._root.tmp)
            staged.path.rename(target)
            sync_folder(target.parent)
        return target

    def discard(self, staged: StagedBlob) -> None:
        """Delete staged bytes. Never fails: a leftover is an orphan, and another error led here."""
        _drop(staged.path)

    def fingerprint(self, digest: str) -> Fingerprint | None:
        """Return the blob's fingerprint; None where there is no regular file, or its folder is a link."""
        if not is_real_folder(self.path(digest).parent):
            return None
        with _translated("an engine cannot be read"):
            try:
                *numbers, mode = status_of(self.path(digest), follow_symlinks=False)
            except FileNotFoundError:
                return None
        return Fingerprint(*numbers) if stat.S_ISREG(mode) else None

    def read(self, digest: str) -> ReadBlob | None:
        """Hash the whole blob, in pieces; None where there is no regular file."""
        now_ns = time.time_ns()
        if self.fingerprint(digest) is None:
            return None
        with _translated("an engine cannot be read"):
            try:
                descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                before = Fingerprint.of_descriptor(file.fileno())
                with contextlib.closing(StreamDigest(is_short=before.size_bytes < SMALL_BYTES)) as stream:
                    stream.read_from(file, before.size_bytes)
                    found = stream.hexdigest()
                after = Fingerprint.of_descriptor(file.fileno())
        return ReadBlob(found, after, before == after and after.is_conclusive(now_ns))

    def quarantine(self, digest: str) -> Path | None:
        """Move the blob to ``quarantine/``, keeping its bytes but not its record: it is never served again.

        Returns:
            Where it is now, with the time in its name, as the same digest may fail twice; None if it was missing.
        """
        if not is_real_folder(self.path(digest).parent):
            return None  # what a link leads to is not enginecache's
        target = self._root.quarantine / f"{digest}.{time.time_ns()}.engine"
        with _translated("a damaged engine cannot be set aside"):
            try:
                self.path(digest).rename(target)
            except FileNotFoundError:
                self._records.delete(digest)
                return None
            sync_folder(self.path(digest).parent)
            sync_folder(self._root.quarantine)
        self._records.delete(digest)
        return target

    def retire(self, digest: str) -> None:
        """Move the blob's ctime, from which an orphan's age counts: its path may be in use. No error if missing."""
        if self.fingerprint(digest) is None:
            return  # chmod would follow a link
        with _translated("an engine cannot be retired"), contextlib.suppress(FileNotFoundError):
            try:
                self.path(digest).chmod(self._root.blob_mode)
            except PermissionError:
                # Another user's, in a shared folder. Only a new file is young: a user who may only read it can neither
                # set its times nor link it (fs.protected_hardlinks), and a rename leaves a moment without it.
                self._replace_by_copy(digest)

    def _replace_by_copy(self, digest: str) -> None:
        staged = self.stage(self.path(digest))
        if staged.digest == digest:
            self.publish(staged)
        else:
            self.discard(staged)  # damaged: whoever is given its path gets an error

    def delete(self, digest: str) -> int:
        """Delete the blob and its record; readers that have it mapped keep their bytes.

        Returns:
            The bytes freed; 0 if it was missing.
        """
        freed = self._delete(digest)
        self._records.delete(digest)
        return freed

    def _delete(self, digest: str) -> int:
        path = self.path(digest)
        if not is_real_folder(path.parent):
            return 0
        with _translated("an engine cannot be deleted"):
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    return 0
                path.unlink()
            except FileNotFoundError:
                return 0
            sync_folder(path.parent)
        return status.st_size

    def digests(self) -> Iterator[str]:
        """Yield the digests of all blobs; files of other names are not blobs."""
        with _translated("the engines cannot be listed"):
            for folder, prefix in sorted(folders_in(self._root.engines)):
                found = (digest_of_blob(prefix, name) for _, name in files_in(folder))
                yield from sorted(digest for digest in found if digest is not None)


def _copy(source: io.FileIO, target: io.BufferedWriter) -> str:
    """Copy ``source`` to ``target``; return the digest of what was copied."""
    with contextlib.closing(StreamDigest()) as stream:
        while piece := source.read(CHUNK_BYTES):
            stream.write(piece)
            target.write(piece)
        return stream.hexdigest()


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _store_error(what: str, error: OSError) -> StoreError:
    # A rename names two files, and either may be the one that is in the way: a mount point, say.
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f" ({' to '.join(names)})" if names else ""
    return StoreError(*describe_os_error(error, f"{what}{where}", in_cache=True))


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _store_error(what, error) from error
