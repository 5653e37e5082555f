"""One build per key. What every lock does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Holder:
    """Who has a lock, as far as is known.

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
    """Said about once a second while a lock is held by another.

    Attributes:
        holder: Who has it; None where that is not known.
        waited_seconds: How long we have waited.
        device: Name of the GPU that is waited for, where another key is built on it; empty for the lock of the key.
    """

    holder: Holder | None
    waited_seconds: float
    device: str = ""


WaitingCallback = Callable[[Waiting], None]


class KeyLocks(Protocol):
    """Locks by name. Exclusive over threads and processes; free at once when the holder's process dies."""

    def hold(
        self,
        name: str,
        timeout_s: float | None,
        waiting: WaitingCallback | None = None,
        is_done: Callable[[], bool] | None = None,
    ) -> contextlib.AbstractContextManager[bool]:
        """Hold the lock ``name``, waiting at most ``timeout_s`` seconds (None: as long as it takes).

        Args:
            name: Of the lock.
            timeout_s: Longest wait.
            waiting: Called about once a second while another holds it.
            is_done: Asked many times a second meanwhile; true ends the waiting, without the lock.

        Returns:
            A context whose value says whether the lock is held: always, unless ``is_done`` was true first.

        Raises:
            LockTimeoutError: Another still held it when the time was up.
        """
        ...

    def is_held(self, name: str) -> bool:
        """Whether somebody holds the lock now. Waits for nobody and makes nothing.

        Raises:
            StoreError: It cannot be looked at.
        """
        ...
