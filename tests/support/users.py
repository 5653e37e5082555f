"""Work done as another user, for tests that run as root."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def as_user(user: int, group: int, work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a process of another user, with everything imported that this one has."""
    reader, writer = FORK.Pipe(duplex=False)

    def run() -> None:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        try:
            writer.send(work())
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            writer.send(f"{type(error).__name__}: {error}")

    child = FORK.Process(target=run)
    child.start()
    found = reader.recv()
    child.join()
    return found
