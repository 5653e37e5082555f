"""Write to a descriptor: all of the data, or an error that says how much was written and why not the rest.

The fast path and the full path share it. It imports only modules that every Python has loaded.
"""

from __future__ import annotations

import os


class UnwrittenError(Exception):
    """An error of writing: the data was written in part, or not at all.

    Attributes:
        written_bytes: How much was.
        cause: Why not the rest.
    """

    def __init__(self, written_bytes: int, cause: OSError) -> None:
        super().__init__(written_bytes, cause)
        self.written_bytes = written_bytes
        self.cause = cause


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; wait where the descriptor was set not to block.

    Raises:
        UnwrittenError: It cannot be written.
    """
    written = 0
    while written < len(data):
        try:
            written += os.write(descriptor, memoryview(data)[written:])
        except BlockingIOError:
            _wait_for(descriptor)
        except OSError as error:
            raise UnwrittenError(written, error) from error


def _wait_for(descriptor: int) -> None:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
