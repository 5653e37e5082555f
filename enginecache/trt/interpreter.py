"""The choice of the Python that runs a child process, made before anything is started.

``sys.executable`` is not always a Python: it is the application in a frozen program (PyInstaller, cx_Freeze, Nuitka),
the host where Python is embedded in a program (uWSGI, an application server), empty or None where Python does not know.
To start such a program with ``-m enginecache...`` would start a second copy of it. So a file is started only if its
name is that of an interpreter. Whether it can run a child is seen when the child reports itself: see
:mod:`enginecache.trt.child`.

Source: Python documentation, ``sys.executable``; PyInstaller, "Run-time Information" (``sys.frozen`` and
``LD_LIBRARY_PATH``); uWSGI, "Python plugin", 2026-11.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from enginecache.errors import InterpreterError

_NAME = re.compile(
    r"\.?(?:python|pypy|graalpy)w?(?P<version>\d*(?:\.\d+)*)[a-z]{0,2}(?:-dbg|-intel64|-wrapped)?", re.ASCII
)
"""Names of interpreters: ``python``, ``python3``, ``python3.12``, ``python3.13t``, ``pypy3.10``."""

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
T = TypeVar("T")

NAME_ONE = "Name a Python that has enginecache with the setting `python` or ENGINECACHE_PYTHON=/path/to/python3."


class Interpreter(NamedTuple):
    """A Python that a child may be run with.

    Attributes:
        path: The file to start.
        has_our_modules: Whether it is to look for modules where this process does; else it has its own.
    """

    path: str
    has_our_modules: bool = True


def interpreters(named: str | os.PathLike[str] | None = None) -> tuple[Interpreter, ...]:
    """Return the interpreters to try, the best first; at least one.

    Nothing is started.

    Args:
        named: The one that the user names; then there is no other.

    Raises:
        InterpreterError: None is known, or the named one cannot be run.
    """
    if named is not None:
        path = os.fspath(named)
        path = path if os.sep in path else shutil.which(path) or path
        if not _is_program(path):
            message = f"{path}, which is named to run the builder, is not a program that this user may run"
            raise InterpreterError(message, NAME_ONE)
        own = Interpreter(path, has_our_modules=False)
        # The modules of a frozen program are in its own archive.
        return (own,) if _is_frozen() else (Interpreter(path), own)
    found: dict[str, Interpreter] = {}
    for path in _candidates():
        if _is_interpreter(path):
            found.setdefault(os.path.realpath(path), Interpreter(path))
    if not found:
        raise InterpreterError(f"no Python to run the builder with is known: {_why()}", NAME_ONE)
    return tuple(found.values())


def run_with(named: str | os.PathLike[str] | None, attempt: Callable[[Interpreter], T]) -> T:
    """Return the result of the first interpreter that can run a child.

    Args:
        named: As for :func:`interpreters`.
        attempt: Runs a child, and raises an :class:`InterpreterError` where the interpreter could not.

    Raises:
        InterpreterError: None of them could.
    """
    failed: list[InterpreterError] = []
    for interpreter in interpreters(named):
        try:
            return attempt(interpreter)
        except InterpreterError as error:
            failed.append(error)
    reasons = list(dict.fromkeys(error.what for error in failed))
    if named is None or len(reasons) == 1:
        raise failed[0]
    raise InterpreterError(f"{reasons[0]}; with its own modules: {reasons[1]}", failed[0].fix)


def _candidates() -> Iterator[str]:
    if _is_frozen():
        return
    yield _executable()
    for prefix in (sys.prefix, sys.exec_prefix, sys.base_prefix):
        # Of an embedded Python, which has its modules and packages from there.
        yield f"{prefix}/bin/python{_VERSION}"
        yield f"{prefix}/bin/python{sys.version_info.major}"
    yield getattr(sys, "_base_executable", None) or ""


def _is_interpreter(path: str) -> bool:
    """Return whether a file is an interpreter of this version by its name, with links followed."""
    if not (Path(path).is_absolute() and _is_program(path)):
        return False
    match = _NAME.fullmatch(Path(os.path.realpath(path)).name)
    is_named = match is not None and ("." not in match["version"] or match["version"] == _VERSION)
    return is_named and not _embeds_python(path)


def _embeds_python(path: str) -> bool:
    """Return whether a file is this process's program, which only embeds Python, whatever its name.

    ``Py_Initialize`` looks for ``python3`` on PATH, and may find a program of that name. Python's own has arguments.
    """
    return not any(sys.orig_argv) and os.path.realpath(path) == os.path.realpath("/proc/self/exe")


def _executable() -> str:
    """Return ``sys.executable``, or nothing: a program that embeds Python may set it to anything, or delete it."""
    found = getattr(sys, "executable", None)
    return found if isinstance(found, str) else ""


def _is_program(path: str) -> bool:
    # Not Path.is_file, which raises an error for a file in another user's closed folder.
    return os.path.isfile(path) and os.access(path, os.X_OK)  # noqa: PTH113


def _is_frozen() -> bool:
    """Return whether this process runs an application that has Python inside."""
    return bool(getattr(sys, "frozen", False)) or hasattr(sys, "oxidized")


def _why() -> str:
    if _is_frozen():
        return f"this program is frozen, and {_executable()} would start it again"
    if not _executable():
        return "sys.executable is empty, as in a program that embeds Python"
    return f"sys.executable is {_executable()}, which is not a Python interpreter"


def environment_for(interpreter: Interpreter, environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of a child for an interpreter, made from one for this process's modules."""
    if interpreter.has_our_modules:
        return environment
    own = {name: value for name, value in environment.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    if _is_frozen():
        # A frozen program puts its own libraries first, and keeps what was there before.
        own.pop("LD_LIBRARY_PATH", None)
        before = own.pop("LD_LIBRARY_PATH_ORIG", None)
        own |= {} if before is None else {"LD_LIBRARY_PATH": before}
    return own
