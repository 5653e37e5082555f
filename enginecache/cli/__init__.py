"""The command line: parse, call one library method, hand the value to one output sink."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line of this process; ends it with the exit code."""
    _open_standard_streams()
    try:
        from enginecache.cli.app import app

        app(prog_name="enginecache")
    except KeyboardInterrupt:  # while the modules were loaded; later it is the application's
        sys.exit(130)


def _open_standard_streams() -> None:
    """Take the descriptors of closed standard streams, before another file gets their numbers and is written to.

    Standard output is opened for reading: what was to be printed must fail, and not vanish.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
