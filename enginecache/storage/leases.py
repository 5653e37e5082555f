"""Who uses a stored engine: leases that programs take, and files that processes have open or mapped.

Deleting a blob that is in use frees nothing until its user ends, and the user wants it again when it starts anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from enginecache.errors import LockTimeoutError, NotCachedError, StoreError
from enginecache.files.os_errors import describe_os_error

if TYPE_CHECKING:
    from typing_extensions import Self

LEASE_TIMEOUT_S = 10.0
"""An eviction decides about a blob in milliseconds; one that takes longer waits for the registry, or is stopped."""
SCAN_VALID_S = 1.0
_POLL_S = 0.01
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAPPED = re.compile(rb"/([0-9a-f]{64})\.engine(?: \(deleted\))?$", re.MULTILINE)


class Lease:
    """Says that a blob is in use: while it is held, no eviction takes the blob.

    A shared ``flock`` on the blob itself. Any number of processes hold one at a time, also users who may only read the
    blob, and it is seen from every container that has the folder. It ends with the process, however that ends; what was
    forked from it keeps it until that ends too. It says nothing to ``rm``. An equal blob that is published again is
    another file, which the lease does not cover.

    Not safe on NFS: another client's lease need not be seen.

    Source: flock(2), Linux man-pages 6.x: a lock belongs to the open file description, whatever it was opened for.

    Args:
        path: The blob.
        timeout_s: Longest wait for an eviction that decides about this blob just now.

    Raises:
        NotCachedError: The blob is gone.
        LockTimeoutError: An eviction did not decide in time.
        StoreError: The file cannot be opened or locked.
    """

    def __init__(self, path: Path, timeout_s: float = LEASE_TIMEOUT_S) -> None:
        self.path = path
        self._descriptor = -1
        deadline = time.monotonic() + timeout_s
        while not self._try():
            if time.monotonic() > deadline:
                message = f"an eviction has held {path} for {timeout_s:g} s"
                raise LockTimeoutError(message, "Look for a stopped `enginecache prune`, and try again.")
            time.sleep(_POLL_S)

    def _try(self) -> bool:
        """Take the lock; False if an eviction holds it, or if the path names another file by now."""
        try:
            descriptor = os.open(self.path, _OPEN)
        except FileNotFoundError as error:
            raise NotCachedError(f"the engine {self.path} is gone", "Ask `enginecache get` for it again.") from error
        except OSError as error:
            raise _no_lease(self.path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False)):
                self._descriptor, descriptor = descriptor, -1
                return True
        except (BlockingIOError, FileNotFoundError):
            pass  # the next try tells
        except OSError as error:
            raise _no_lease(self.path, error) from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return False

    def close(self) -> None:
        """End it. Idempotent."""
        # Closed, not unlocked: a forked child that ends its copy must not end its parent's.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _no_lease(path: Path, error: OSError) -> StoreError:
    return StoreError(*describe_os_error(error, f"no lease can be taken on {path}", path, in_cache=True))


@contextlib.contextmanager
def unleased(path: Path) -> Iterator[bool]:
    """Whether nobody has a lease on the blob; if so, nobody gets one before the block ends. Does not wait.

    What cannot be looked at is not known to be free.
    """
    descriptor, is_free = _try_alone(path)
    try:
        yield is_free
    finally:
        _let_go(descriptor, is_locked=is_free)


def _is_leased(path: Path) -> bool:
    descriptor, is_free = _try_alone(path)
    _let_go(descriptor, is_locked=is_free)
    return not is_free


def _try_alone(path: Path) -> tuple[int, bool]:
    """The blob's descriptor, -1 where it cannot be opened; and whether nobody else has a lock on it."""
    try:
        descriptor = os.open(path, _OPEN)
    except OSError as error:
        return -1, isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return descriptor, False
    return descriptor, True


def _let_go(descriptor: int, *, is_locked: bool) -> None:
    if descriptor < 0:
        return
    try:
        if is_locked:
            # Unlocked, not only closed: a child that another thread forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def open_digests(proc: Path = Path("/proc")) -> frozenset[str]:
    """Digests of the blobs that processes of this host have open or mapped.

    Not seen are processes of other users (unless this one is root's), those of other containers, and files under
    another name: for all of these there are leases.

    The name decides, not device and inode: these differ between ``stat`` and ``/proc/*/maps`` on btrfs and overlayfs.
    Nor is an open file asked for its inode: on a network file system that does not answer, the question would hang.

    Args:
        proc: Where the kernel describes the processes.
    """
    found: set[bytes] = set()
    with contextlib.suppress(OSError):
        for process in os.scandir(proc):
            if process.name.isdecimal():
                found.update(_open_names(process.path))
    return frozenset(name.decode() for name in found)


def _open_names(process: str) -> Iterator[bytes]:
    # A process that ends meanwhile, or is another user's, is an OSError.
    with contextlib.suppress(OSError), open(f"{process}/maps", "rb") as maps:  # noqa: PTH123
        yield from _MAPPED.findall(maps.read())
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{process}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                yield from _MAPPED.findall(os.fsencode(os.readlink(f"{process}/fd/{name}")))  # noqa: PTH115


def is_in_use(path: Path) -> bool:
    """Whether a blob is leased, open or mapped, as far as that can be seen from here."""
    return path.stem in open_digests() or _is_leased(path)


class UseScan:
    """Whether blobs are in use; looks at leases each time, at the processes at most once in :data:`SCAN_VALID_S`.

    For one piece of work and one thread.

    Args:
        path: Where the blob of a digest is.
    """

    def __init__(self, path: Callable[[str], Path]) -> None:
        self._path = path
        self._open: frozenset[str] = frozenset()
        self._scanned_at: float | None = None

    def is_in_use(self, digest: str) -> bool:
        """Whether the blob is leased, open or mapped."""
        return digest in self._now_open() or _is_leased(self._path(digest))

    @contextlib.contextmanager
    def unused(self, digest: str) -> Iterator[bool]:
        """Whether the blob is neither; if so, nobody gets a lease on it before the block ends."""
        is_open = digest in self._now_open()  # first: to look at the leases is to open the blob
        with unleased(self._path(digest)) as is_free:
            yield is_free and not is_open

    def _now_open(self) -> frozenset[str]:
        now = time.monotonic()
        if self._scanned_at is None or now - self._scanned_at > SCAN_VALID_S:
            self._open, self._scanned_at = open_digests(), now
        return self._open
