"""Standard output for both ways in of the command line: all of the data, or how much of it and why not the rest.

Loads nothing but what every Python has loaded.
"""

from __future__ import annotations

import os


class UnwrittenError(Exception):
    """Data that could not be written, or not all of it.

    Attributes:
        written_bytes: How much was.
        cause: Why not the rest.
    """

    def __init__(self, written_bytes: int, cause: OSError) -> None:
        super().__init__(written_bytes, cause)
        self.written_bytes = written_bytes
        self.cause = cause


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; waits where the descriptor was set not to block.

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
