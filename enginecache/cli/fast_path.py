"""Entry point of the console script: answers a repeated command line without importing the rest of the package.

It parses nothing. The full path alone decides which command lines are remembered, see
:mod:`enginecache.cli.remember`, and records everything that the answer depends on, as it was then: the files, the
folders that modules come from, the GPUs. Here the same things are looked at again. If one of them differs, or anything
is unexpected, the full path answers.

Imports only ctypes, SQLite and modules that every Python has loaded: that is why it is fast.
"""

from __future__ import annotations

import os
import stat
import sys
import time

from enginecache.cli.streams import UnwrittenError, write_all
from enginecache.host.evidence import ELAPSED, command_of, folder_of, is_as_it_was, note_use, seal_of

TYPE_CHECKING = False  # see enginecache/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from sqlite3 import Connection

SELECT = """
SELECT answers.key, answers.watched, answers.said, answers.printed, answers.seal
FROM answers JOIN entries ON entries.key = answers.key AND entries.build_id = answers.build_id
WHERE answers.command = ? AND (answers.siblings IS NULL OR answers.siblings = (
    SELECT group_concat(build_id) FROM (
        SELECT o.build_id FROM entries AS o WHERE o.model_digest = entries.model_digest ORDER BY o.key
    )
))
"""
"""The answer, while its entry is there; and if that has a wider reach than was asked, no new entry of its model."""
BUSY_TIMEOUT_S = 0.05


def main() -> None:
    """Answer the command line, or let the full path do it."""
    try:
        _main()
    except KeyboardInterrupt:  # outside the full path, which has a word for it
        try:  # noqa: SIM105  contextlib would have to be loaded
            os.write(2, b"interrupted\n")
        except OSError:
            pass
        sys.exit(130)


def _main() -> None:
    try:
        is_answered = answer(sys.argv[1:], os.environ)
    except UnwrittenError as error:
        # Not the full path: it would say again what was said.
        from enginecache.cli.main import report_unwritten

        sys.exit(report_unwritten(error, is_answer=True))
    except Exception:  # noqa: BLE001  whatever it is, the full path says what is wrong
        is_answered = False
    if not is_answered:
        from enginecache.cli.main import main

        main()


def answer(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Print the answer to the same command line again, if everything that it depends on is as it was.

    Returns:
        Whether it did; False also for a command line that is not remembered.

    Raises:
        UnwrittenError: Standard output cannot be written.
        Exception: Anything else is wrong; nothing was printed.
    """
    started_s = time.monotonic()
    if not arguments or arguments[0] != "get" or None in (sys.stdin, sys.stdout, sys.stderr):
        return False
    folder = folder_of(arguments, environ)
    registry = f"{folder}/registry.sqlite"
    if not (_is_trusted(folder) and _is_trusted(registry) and _is_own_file(registry)):
        return False
    import _sqlite3

    command = command_of(arguments, environ)
    connection = _sqlite3.connect(
        f"file:{_quoted(registry)}?mode=ro", timeout=BUSY_TIMEOUT_S, isolation_level=None, uri=True
    )
    try:
        found = _remembered(connection, folder, command)
    finally:
        connection.close()
    if found is None:
        return False
    said, printed = found
    elapsed_s = time.monotonic() - started_s
    try:
        write_all(2, said.replace(ELAPSED.encode(), b"%.2f" % elapsed_s))
    except UnwrittenError:  # nobody to talk to, as on the full path
        said = b""
    write_all(1, printed.replace(ELAPSED.encode(), b"%.6f" % elapsed_s))
    return True


def _remembered(connection: Connection, folder: str, command: str) -> tuple[bytes, bytes] | None:
    """Return what was printed to standard error and output for a command line, if it still holds; note the use."""
    found = connection.execute(SELECT, (command,)).fetchone()
    if found is None:
        return None
    key, watched, said, printed, seal = found
    if seal != seal_of(command, key, watched, said, printed) or not is_as_it_was(watched):
        return None
    # The use is noted before the row is read for good: a prune that takes the row after this sees the use, and leaves
    # the blob.
    note_use(f"{folder}/uses/{key}")
    if connection.execute(SELECT, (command,)).fetchone() != found or not is_as_it_was(watched):
        return None
    return said, printed


def _is_trusted(path: str) -> bool:
    """Return whether, by its owner and mode, only this user and root can have written it."""
    found = os.stat(path)
    return found.st_uid in {os.geteuid(), 0} and not found.st_mode & 0o022


def _is_own_file(registry: str) -> bool:
    """Return whether the file is a regular one: SQLite follows links, and waits for the writer of a pipe."""
    try:
        is_regular = stat.S_ISREG(os.lstat(f"{registry}-journal").st_mode)
    except FileNotFoundError:
        is_regular = True  # nothing was written yet
    return is_regular and stat.S_ISREG(os.lstat(registry).st_mode)


def _quoted(path: str) -> str:
    """Quote a path for a URI."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


if __name__ == "__main__":
    main()
