"""Locks by ``flock`` on files, for the processes of one host."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from enginecache.errors import LockTimeoutError, StoreError
from enginecache.files.os_errors import describe_os_error
from enginecache.storage.durable import make_folder
from enginecache.storage.folder import Root

if TYPE_CHECKING:
    import filelock

SAY_EVERY_S = 1.0
POLL_S = 0.05


@dataclass(frozen=True)
class Holder:
    """The holder of a lock, as far as it is known.

    Attributes:
        host: Name of the host.
        pid: Process.
        since: Seconds since the epoch.
    """

    host: str
    pid: int
    since: float


@dataclass(frozen=True)
class Waiting:
    """A report, about once a second, while another holds a lock.

    Attributes:
        holder: Who has it; None where that is not known.
        waited_seconds: How long it has taken so far.
        device: Name of the GPU that is waited for, where another key is built on it; empty for the lock of the key.
    """

    holder: Holder | None
    waited_seconds: float
    device: str = ""


WaitingCallback = Callable[[Waiting], None]


class FileLocks:
    """Locks by name, one file each, which is never deleted. Exclusive over threads and processes.

    Not safe on NFS: ``flock`` does not exclude across its clients. The kernel frees the lock when the process ends,
    however it ends.
    """

    def __init__(self, root: Root) -> None:
        self._root = root

    @contextlib.contextmanager
    def hold(
        self,
        name: str,
        timeout_s: float | None,
        waiting: WaitingCallback | None = None,
        is_done: Callable[[], bool] | None = None,
    ) -> Iterator[bool]:
        """Hold the lock ``name``. Not reentrant.

        Args:
            name: Of the lock.
            timeout_s: Longest wait in seconds; None waits as long as it takes.
            waiting: Called about once a second while another holds it.
            is_done: Called many times a second meanwhile; true ends the wait, without the lock.

        Returns:
            A context whose value says whether the lock is held: always, unless ``is_done`` was true first.

        Raises:
            LockTimeoutError: Another still held it when the time was up.
            StoreError: It cannot be taken.
        """
        path = self._root.locks / f"{name}.lock"
        self._make_folder(path)
        if self._root.is_shared:
            self._open_to_group(path)
        import filelock  # here, since a hit takes no lock

        # A soft lock would outlive its process.
        lock = filelock.FileLock(path, mode=self._root.file_mode, thread_local=False, fallback_to_soft=False)
        if not self._acquire(lock, name, timeout_s, waiting, is_done):
            yield False
            return
        try:
            self._write_holder(name)
            yield True
        finally:
            # Before the release: after it, this file may speak of the next holder.
            with contextlib.suppress(OSError):  # a note that stays must not keep the lock
                self._holder_path(name).unlink()
            lock.release()

    def is_held(self, name: str) -> bool:
        """Return whether somebody holds the lock now. Waits for nobody and makes no file.

        Raises:
            StoreError: The lock cannot be looked at.
        """
        path = self._root.locks / f"{name}.lock"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _not_taken(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            raise _not_taken(path, error) from error
        finally:
            os.close(descriptor)
        return False

    def _make_folder(self, path: Path) -> None:
        """Make the folder of a lock where it is missing: filelock would make it with the mode that the umask leaves."""
        try:
            make_folder(self._root.locks, self._root.folder_mode, self._root.path)
        except OSError as error:
            raise _not_taken(path, error) from error

    def _acquire(
        self,
        lock: filelock.BaseFileLock,
        name: str,
        timeout_s: float | None,
        waiting: WaitingCallback | None,
        is_done: Callable[[], bool] | None,
    ) -> bool:
        """Return whether the lock was taken; False if ``is_done`` was true first."""
        started: float | None = None
        said = 0
        while True:
            try:
                lock.acquire(timeout=0)
            except TimeoutError:  # filelock's Timeout is one
                if is_done is not None and is_done():
                    return False
            except OSError as error:
                raise _not_taken(Path(lock.lock_file), error) from error
            else:
                return True
            now = time.monotonic()
            # Waiting begins when the first try has failed: however busy the machine is, the holder is reported.
            started = now if started is None else started
            waited = now - started
            if timeout_s is not None and waited >= timeout_s:
                raise self._timed_out(name, timeout_s)
            if waiting is not None and waited >= said * SAY_EVERY_S:  # at once, too
                said += 1
                waiting(Waiting(self.holder(name), waited))
            time.sleep(POLL_S if timeout_s is None else min(POLL_S, timeout_s - waited))

    def _timed_out(self, name: str, timeout_s: float) -> LockTimeoutError:
        holder = self.holder(name)
        message = f"timed out after {timeout_s:g} s of waiting for {describe_holder(holder)}{describe_age(holder)}"
        return LockTimeoutError(message, "Wait longer with --timeout, or look at that process; it may still succeed.")

    def holder(self, name: str) -> Holder | None:
        """Return who wrote that it holds the lock. For display: a killed holder's note stays until the next one."""
        try:
            found = json.loads(self._holder_path(name).read_text(encoding="utf-8"))
            return Holder(str(found["host"]), int(found["pid"]), float(found["since"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _holder_path(self, name: str) -> Path:
        return self._root.locks / f"{name}.holder"

    def _write_holder(self, name: str) -> None:
        text = json.dumps({"host": platform.node(), "pid": os.getpid(), "since": time.time()})
        with contextlib.suppress(OSError):  # a full disk must not stop a build for the sake of a note
            descriptor, temporary = tempfile.mkstemp(prefix="holder-", dir=self._root.tmp)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                    os.fchmod(file.fileno(), self._root.file_mode)
                Path(temporary).rename(self._holder_path(name))
            except BaseException:
                Path(temporary).unlink()
                raise

    def _open_to_group(self, path: Path) -> None:
        """Make a lock file that has its mode when it gets its name, or give this user's file the mode that it lacks.

        filelock makes one with the mode that the umask leaves, and changes it then: a crash between the two would keep
        the rest of the group out forever.
        """
        try:
            status = path.lstat()
            is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if is_own and stat.S_IMODE(status.st_mode) != self._root.file_mode:
                path.chmod(self._root.file_mode)
        except FileNotFoundError:
            self._make_file(path)
        except OSError as error:
            raise _not_taken(path, error) from error

    def _make_file(self, path: Path) -> None:
        try:
            descriptor, temporary = tempfile.mkstemp(prefix="lock-", dir=self._root.tmp)
            try:
                os.fchmod(descriptor, self._root.file_mode)
                os.link(temporary, path)
            finally:
                os.close(descriptor)
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()
        except OSError as error:
            # Another process made it, or the file system has no hard links: then filelock makes it as well as it can.
            if error.errno not in {errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
                raise _not_taken(path, error) from error


def _not_taken(path: Path, error: OSError) -> StoreError:
    return StoreError(*describe_os_error(error, f"the lock {path} cannot be taken", path, in_cache=True))


def describe_holder(holder: Holder | None) -> str:
    """Return the holder's name for messages."""
    return "another process" if holder is None else f"process {holder.pid} on {holder.host}"


def describe_age(holder: Holder | None) -> str:
    """Return how long the holder has had the lock, to go on from its name; empty where that is not known.

    Others may have waited for less, or for more: for the holders before it.
    """
    return "" if holder is None else f", which began {max(time.time() - holder.since, 0.0):.0f} s ago"
