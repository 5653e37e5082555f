"""The way in of the command line: what was asked before, and has the same answer, is answered here.

It parses nothing. The full path alone decides which command lines are remembered, see
:mod:`enginecache.cli.remember`; it writes down what the answer rests on, as it looked then. Here the same things are
looked at again: the files, the folders that modules come from, the GPUs. If one of them differs, or anything at all is
odd, the full path answers.

Loads nothing but what every Python has loaded, ctypes and SQLite: that is what it is for.
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
    """Answer, or let the full path do it. The entry point of the console script."""
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
    """Print what was printed for the same command line before, if all that it rests on is as it was.

    Returns:
        Whether it did; False also where nothing is known of it.

    Raises:
        UnwrittenError: Standard output cannot be written.
        Exception: Something else is not as it should be; nothing was printed.
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
        found = connection.execute(SELECT, (command,)).fetchone()
        if found is None:
            return False
        key, watched, said, printed, seal = found
        if seal != seal_of(command, key, watched, said, printed) or not is_as_it_was(watched):
            return False
        # The use is noted before the row is read for good: a prune that takes the row after this sees the use, and
        # leaves the blob.
        note_use(f"{folder}/uses/{key}")
        if connection.execute(SELECT, (command,)).fetchone() != found or not is_as_it_was(watched):
            return False
    finally:
        connection.close()
    elapsed_s = time.monotonic() - started_s
    try:
        write_all(2, said.replace(ELAPSED.encode(), b"%.2f" % elapsed_s))
    except UnwrittenError:  # nobody to talk to, as on the full path
        said = b""
    write_all(1, printed.replace(ELAPSED.encode(), b"%.6f" % elapsed_s))
    return True


def _is_trusted(path: str) -> bool:
    """Whether nobody but this user and root could have written it, as far as its owner and mode tell."""
    found = os.stat(path)
    return found.st_uid in {os.geteuid(), 0} and not found.st_mode & 0o022


def _is_own_file(registry: str) -> bool:
    """Whether SQLite meets no link, which it follows, and no pipe, whose writer it waits for."""
    try:
        is_regular = stat.S_ISREG(os.lstat(f"{registry}-journal").st_mode)
    except FileNotFoundError:
        is_regular = True  # nothing was written yet
    return is_regular and stat.S_ISREG(os.lstat(registry).st_mode)


def _quoted(path: str) -> str:
    """A path inside a URI."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


if __name__ == "__main__":
    main()
