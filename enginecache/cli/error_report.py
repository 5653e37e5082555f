"""Report an exception: its lines on standard error, its object on standard output, its exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import sqlite3
import stat
import sys
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from typing import Any

from enginecache.cli.output import print_json, say
from enginecache.errors import (
    EngineCacheError,
    OutOfMemoryError,
    RegistryError,
    ResourceError,
    StoreError,
    UnexpectedError,
    printable,
)
from enginecache.files.os_errors import RESOURCES, describe_os_error, is_about_memory, is_out_of_descriptors, shell_path

INTERRUPTED = 130
USAGE = 2
_TEXT_CHARACTERS = 500
_SUGGESTED = re.compile(r"`(enginecache (?:ls|show|path|pin|unpin|rm|prune|verify|stats|doctor|db \w+)\b[^`]*)`")
"""Not ``get`` and ``explain``, which are to be given the same options anyway."""


def report_error(error: BaseException, arguments: Sequence[str]) -> int:
    """Print an error, and return its exit code. Never raises.

    An unforeseen exception is one line as well; its traceback goes to a file.

    Args:
        error: What was raised.
        arguments: The command line without the program.
    """
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        print_error("interrupted", INTERRUPTED, "interrupted", "", arguments)
        return INTERRUPTED
    known = error if isinstance(error, EngineCacheError) else _translated(error, arguments)
    what, *rest = _in_folder("\n".join(known.lines()), arguments).splitlines()
    say(f"error: {what}", *(f"  {line}" for line in rest))
    log, check = getattr(known, "log_path", ""), getattr(known, "check", None)
    print_error(
        known.code,
        known.exit_code,
        _in_folder(known.what, arguments),
        _in_folder(known.fix, arguments),
        arguments,
        **({"log": log} if log else {}),
        **({"check": check} if check else {}),
    )
    return known.exit_code


def report_usage(message: str, arguments: Sequence[str]) -> None:
    """Print the object of a command line that could not be parsed; the text is the parser's own."""
    print_error("usage", USAGE, message, "See --help.", arguments)


def print_error(code: str, exit_code: int, message: str, fix: str, arguments: Sequence[str], **more: Any) -> None:
    """Print the object of an error on standard output, if the command line asks for JSON. Never raises."""
    if not wants_json(arguments):
        return
    error: dict[str, Any] = {"code": code, "exit_code": exit_code, "message": message, "fix": fix, **more}
    with contextlib.suppress(EngineCacheError, OSError, ValueError):
        print_json({"error": error})


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for JSON. Looked at as text: it may be one that no parser takes."""
    arguments = list(arguments)
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def _translated(error: BaseException, arguments: Sequence[str]) -> EngineCacheError:
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        what, fix = describe_os_error(OSError(errno.ENOMEM, ""), "the command stopped")
        return OutOfMemoryError(f"out of memory: {what}", fix)
    if is_out_of_descriptors():
        return ResourceError(*describe_os_error(OSError(errno.EMFILE, ""), "the command stopped"))
    if "can't start new thread" in str(error) or "ThreadPoolBuildError" in str(error):  # Python's, and BLAKE3's
        return ResourceError(*describe_os_error(OSError(errno.EAGAIN, ""), "a thread cannot be started"))
    details = _written(error, arguments)
    if isinstance(error, OSError):
        kind = ResourceError if error.errno in RESOURCES else StoreError
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the command stopped"
        what, fix = describe_os_error(error, name)
        return kind(what, "\n".join(filter(None, (fix, details))))
    if isinstance(error, sqlite3.Error):
        return RegistryError(f"the registry is unavailable: {error}", f"Run `enginecache verify`.\n{details}")
    return _unforeseen(error, details)


def _unforeseen(error: BaseException, details: str) -> UnexpectedError:
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "enginecache":
        what = f"a Python package that enginecache needs cannot be imported: {printable(error)[:_TEXT_CHARACTERS]}"
        return UnexpectedError(what, f"Look at what is installed with `pip check`. {details}")
    text = " ".join(filter(None, (type(error).__name__, printable(error)[:_TEXT_CHARACTERS])))
    return UnexpectedError(f"unexpected error: {text}: this is a bug in enginecache", f"{details} Please report it.")


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, whatever the error is called: a failed import says so in its message or cause."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if is_about_memory(str(seen)) or (isinstance(seen, SystemError) and _has_memory_limit()):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _has_memory_limit() -> bool:
    """Return whether the address space of this process is limited.

    Some functions of CPython's report a failed allocation as "returned NULL without setting an exception".
    Source: ``compile`` of CPython 3.11 under ``ulimit -v``, 2026-12.
    """
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _written(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback to a file, and return a sentence that names it."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as second:  # noqa: BLE001  an exception whose text fails
        text = f"{type(error).__name__}, whose text fails: {type(second).__name__}\n"
    data = f"enginecache {' '.join(map(repr, arguments))}\nPython {sys.version}\n{text}".encode(
        errors="backslashreplace"
    )
    for create in (_create_in_cache, _create_elsewhere):
        with contextlib.suppress(Exception):
            descriptor, name = create(arguments)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            return f"Details were written to {name}."
    return "Details could not be written to a file."


def _create_in_cache(arguments: Sequence[str]) -> tuple[int, str]:
    """Create a log in the cache of the command line, if there is one. It is deleted with the other old logs."""
    from enginecache.config import Config

    logs = Config.load(dir=_given_folder(arguments)).dir / "logs"
    for path, is_kind in ((logs, stat.S_ISDIR), (logs.parent / "registry.sqlite", stat.S_ISREG)):
        status = path.lstat()
        if not is_kind(status.st_mode) or status.st_uid not in {0, os.geteuid()}:
            raise FileNotFoundError(path)
    path = logs / f"{uuid.uuid4().hex}.log"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), str(path)


def _in_folder(text: str, arguments: Sequence[str]) -> str:
    """Add the command line's ``--dir`` to the commands that a message suggests, which look elsewhere without it."""
    folder = _given_folder(arguments)
    if folder is None:
        return text

    def add(command: re.Match[str]) -> str:
        return command[0] if "--dir" in command[1] else f"`{command[1]} --dir {shell_path(folder)}`"

    return _SUGGESTED.sub(add, text)


def _given_folder(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--dir" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--dir="):
            return argument.removeprefix("--dir=")
    return None


def _create_elsewhere(_arguments: Sequence[str]) -> tuple[int, str]:
    return tempfile.mkstemp(prefix="enginecache-error-", suffix=".log")
