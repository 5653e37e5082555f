"""The command line: parse, call one library method, hand the value to one output sink."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from enginecache.cli.streams import UnwrittenError, write_all

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ENDING = (signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the command line of this process; ends it with the exit code."""
    _open_standard_streams()
    with _ended_in_order():
        try:
            # NumPy moves bytes here and computes nothing: threads would cost memory and time. Where memory is short,
            # OpenBLAS raises SIGINT for want of them, which nobody could tell from Ctrl-C: so not even if they are set.
            # Source: OpenBLAS 0.3, driver/others/blas_server.c, ``blas_thread_init``.
            os.environ["OPENBLAS_NUM_THREADS"] = "1"
            gc.disable()  # a sixth of the time that loading takes, and nothing that it makes is garbage
            from enginecache.cli.app import app

            app(prog_name="enginecache")
        except (BrokenPipeError, SystemExit):
            raise
        except UnwrittenError as error:
            sys.exit(report_unwritten(error, is_answer=False))
        except BaseException as error:  # noqa: BLE001  while modules were loaded, or by the parser
            sys.exit(_report(error))


def _report(error: BaseException) -> int:
    """Print an error that the application did not get to see; its exit code."""
    try:
        from enginecache.cli.error_report import report_error

        return report_error(error, sys.argv[1:])
    except BaseException:  # noqa: BLE001  there may be no memory or no descriptor to import it with
        if isinstance(error, KeyboardInterrupt):
            return 130
        text = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            os.write(2, f"error: the command cannot be loaded: {text}\n".encode(errors="backslashreplace"))
        return 1


def report_unwritten(error: UnwrittenError, *, is_answer: bool) -> int:
    """Print why standard output could not be written; the exit code. See :func:`enginecache.cli.output.unwritten`."""
    from enginecache.cli.output import unwritten

    failure = unwritten(error, is_answer=is_answer)
    return 0 if failure is None else _report(failure)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Lets a signal that ends the process do so as Ctrl-C does: the builder is ended, the attempt recorded first.

    Then the process dies of that signal after all, as who sent it expects. A second one ends it at once. What was
    ignored from the start, as under nohup, stays ignored.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        received.append(number)
        raise KeyboardInterrupt

    handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])


def _open_standard_streams() -> None:
    """Take the descriptors of closed standard streams, before another file gets their numbers and is written to.

    Standard output is opened for reading: what was to be printed must fail, and not vanish.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)
    is_own = sys.stdout is None or sys.stdout is sys.__stdout__  # and no stand-in of a program that runs this in itself
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if is_own:
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_StandardOutput()),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=os.isatty(1),
        )


class _StandardOutput(io.RawIOBase):
    """Standard output whose errors differ from those of all other files, whoever prints: the parser prints help."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def isatty(self) -> bool:
        return os.isatty(1)

    def write(self, data: Buffer) -> int:
        with memoryview(data) as view:
            write_all(1, view)
            return view.nbytes
