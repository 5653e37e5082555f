"""Locks by ``flock`` on files, for the processes of one host."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from enginecache.errors import LockTimeoutError, StoreError
from enginecache.locks.base import Holder, Waiting, WaitingCallback
from enginecache.store.root import Root

SAY_EVERY_S = 1.0
POLL_S = 0.05


class LocalKeyLocks:
    """Implements :class:`~enginecache.locks.base.KeyLocks` with one file a name, which is never deleted.

    Not safe on NFS: ``flock`` does not exclude across its clients. The kernel frees the lock when the process ends,
    however it ends.
    """

    def __init__(self, root: Root) -> None:
        self._root = root

    @contextlib.contextmanager
    def hold(self, name: str, timeout_s: float | None, waiting: WaitingCallback | None = None) -> Iterator[None]:
        """Hold the lock; not reentrant."""
        lock = filelock.FileLock(
            self._root.locks / f"{name}.lock",
            mode=self._root.file_mode,
            thread_local=False,
            poll_interval=POLL_S,
            # A soft lock would outlive its process.
            fallback_to_soft=False,
        )
        self._acquire(lock, name, timeout_s, waiting)
        try:
            self._write_holder(name)
            yield
        finally:
            # Before the release: after it, this file may speak of the next holder.
            with contextlib.suppress(OSError):  # a note that stays must not keep the lock
                self._holder_path(name).unlink()
            lock.release()

    def _acquire(
        self, lock: filelock.BaseFileLock, name: str, timeout_s: float | None, waiting: WaitingCallback | None
    ) -> None:
        started = time.monotonic()
        wait_s = 0.0  # the first try does not wait: who waits should hear at once for whom
        while True:
            try:
                lock.acquire(timeout=wait_s)
            except filelock.Timeout:
                waited = time.monotonic() - started
                if timeout_s is not None and waited >= timeout_s:
                    raise self._timed_out(name, timeout_s) from None
                if waiting is not None:
                    waiting(Waiting(self.holder(name), waited))
                wait_s = SAY_EVERY_S if timeout_s is None else min(SAY_EVERY_S, timeout_s - waited)
            except OSError as error:
                message = f"the lock {lock.lock_file} cannot be taken: {error.strerror or error}"
                raise StoreError(message, "Make the cache folder writable, or name another with --dir.") from error
            else:
                return

    def _timed_out(self, name: str, timeout_s: float) -> LockTimeoutError:
        message = f"timed out after {timeout_s:g} s of waiting for {describe_holder(self.holder(name))}"
        return LockTimeoutError(message, "Wait longer with --timeout, or look at that process; it may still succeed.")

    def holder(self, name: str) -> Holder | None:
        """Who wrote that it has the lock; for people, since a killed holder's note stays until the next one."""
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


def describe_holder(holder: Holder | None) -> str:
    """The holder for people."""
    if holder is None:
        return "another process"
    age = max(time.time() - holder.since, 0.0)
    return f"process {holder.pid} on {holder.host} ({age:.0f} s so far)"
