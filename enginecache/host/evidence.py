"""Evidence behind a remembered answer: a digest of the command line, and snapshots of the things it depends on.

Imports only modules that every Python has loaded, and ctypes.
"""

from __future__ import annotations

import os
import sys
import time

from enginecache.environment import is_keyed
from enginecache.files.mounts import boot_id, status_of

TYPE_CHECKING = False  # see enginecache/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VARIABLES = frozenset(
    {
        *("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
        *("NVIDIA_VISIBLE_DEVICES", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES"),
        *("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONWARNINGS", "PYTHONHOME", "PYTHONPATH"),
    }
)
"""Variables that an answer may depend on, besides those that begin with ``ENGINECACHE_`` and those of a key."""

ELAPSED = "\0elapsed\0"
"""Placeholder in an answer for the seconds that it took."""

_NVIDIA = "/proc/driver/nvidia"
_MAX_BYTES = 1 << 16


def folder_of(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Guess the cache folder of a command line. A wrong guess finds no answer, and costs one failed open."""
    folder = environ.get("ENGINECACHE_DIR") or ""
    for index, argument in enumerate(arguments):
        if argument == "--dir":
            folder = arguments[index + 1]
        elif argument.startswith("--dir="):
            folder = argument[len("--dir=") :]
    if not folder:
        folder = (environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) + "/enginecache"
    return os.path.abspath(os.path.expanduser(folder))


def command_of(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the digest of a command line and of everything that decides its meaning, 64 hex characters."""
    from _blake2 import blake2b

    version: str = sys.modules["enginecache"].__version__  # not by import: the package names what is above this module
    variables = sorted(
        f"{name}={value}"
        for name, value in environ.items()
        if name in VARIABLES or name.startswith("ENGINECACHE_") or is_keyed(name)
    )
    # The boot and the root's mount, so that containers that share a cache folder do not overwrite each other's answers.
    here = (boot_id(), str(status_of("/")[5]))
    place = (version, sys.version, sys.prefix, os.getcwd(), str(os.geteuid()), str(os.isatty(1)), *here)
    parts = (*place, "", *sys.path, "", *variables, "", *arguments)
    return str(blake2b(b"\0".join(map(os.fsencode, parts)), digest_size=32).hexdigest())


def seal_of(command: str, key: str, watched: bytes, said: bytes, printed: bytes) -> str:
    """Return the digest of an answer, so that a flipped bit in the registry invalidates it."""
    from _blake2 import blake2b

    parts = (command.encode(), key.encode(), watched, said, printed)
    sizes = b",".join(b"%d" % len(part) for part in parts)
    return str(blake2b(sizes + b"".join(parts), digest_size=32).hexdigest())


# A snapshot is a sequence of (kind of look, thing, what was seen).


def look(how: str, thing: str) -> bytes:
    """Look at a thing, and return what is seen."""
    return LOOKS[how](thing)


def note_use(path: str) -> None:
    """Note a use now in the times of a file. Follows no link, neither the file's nor its folder's.

    A note never moves back: under a clock that is behind, only ctime shows the use.

    Raises:
        OSError: There is no such file, or it cannot be written.
    """
    folder, _, name = path.rpartition("/")
    place = os.open(folder or "/", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.stat(name, dir_fd=place, follow_symlinks=False)
        if found.st_mtime_ns <= time.time_ns():
            os.utime(name, dir_fd=place, follow_symlinks=False)
            return
        try:
            os.utime(name, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=place, follow_symlinks=False)
        except PermissionError:
            return  # only its owner may, and the note is ahead as it is
    finally:
        os.close(place)


def is_as_it_was(watched: bytes) -> bool:
    """Return whether every thing in a snapshot looks the same as then."""
    parts = watched.split(b"\0")
    return all(
        look(how.decode(), os.fsdecode(thing)) == seen
        for how, thing, seen in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    )


def watch(things: Sequence[tuple[str, str]]) -> bytes:
    """Look at things, and return the snapshot.

    Raises:
        ValueError: What is seen has a NUL in it.
    """
    seen = [(how.encode(), os.fsencode(thing), look(how, thing)) for how, thing in things]
    if any(b"\0" in part for row in seen for part in row):
        raise ValueError("a thing to watch has a NUL in it")
    return b"\0".join(part for row in seen for part in row)


def _stat(path: str) -> bytes:
    try:
        found = status_of(path)
    except OSError as error:
        return b"error %d" % (error.errno or 0)
    return b" ".join(b"%d" % number for number in found)


def _names(path: str, beginning: bytes | tuple[bytes, ...] = b"") -> bytes:
    """Return the names in a folder that have a given beginning."""
    try:
        names = os.listdir(os.fsencode(path))
    except OSError as error:
        return b"error %d" % (error.errno or 0)
    return b"/".join(sorted(name for name in names if name.startswith(beginning)))


def _driver(path: str) -> bytes:
    """Return the names in a folder that are the _NVIDIA driver's: devices, and the libraries that list the GPUs."""
    return _names(path, (b"nvidia", b"libnvidia-ml.", b"libcuda."))


def _content(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return b"error %d" % (error.errno or 0)
    try:
        return os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)


def _variable(name: str) -> bytes:
    """Return ``=`` and a variable's value, or ``unset``, which no value can produce."""
    return b"unset" if name not in os.environ else b"=" + os.fsencode(os.environ[name])


LOOKS = {"stat": _stat, "names": _names, "driver": _driver, "content": _content, "variable": _variable}


def gpu_things() -> list[tuple[str, str]]:
    """Return the things that identify the GPUs and their driver, without a call to the driver's libraries."""
    things = [("content", f"{_NVIDIA}/version"), ("names", f"{_NVIDIA}/gpus"), ("driver", "/dev")]
    things += [("names", f"{_NVIDIA}/capabilities"), ("stat", "/etc/ld.so.cache")]
    # Not their times: a container gets the driver's libraries in an image, whose times prove nothing.
    libraries = os.environ.get("LD_LIBRARY_PATH", "")
    folders = dict.fromkeys(libraries.split(os.pathsep)) if libraries else {}
    things += [("driver", folder or os.getcwd()) for folder in folders]
    try:
        gpus = sorted(os.listdir(f"{_NVIDIA}/gpus"))
    except OSError:
        gpus = []
    things += [("content", f"{_NVIDIA}/gpus/{name}/information") for name in gpus]
    return things + [("names", f"{_NVIDIA}/capabilities/gpu{number}/mig") for number in range(len(gpus))]
