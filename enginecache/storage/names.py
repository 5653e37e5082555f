"""The names that enginecache gives in a cache folder, as strict patterns.

Nothing else in the folder is ever deleted, moved, or given another mode or group: a user's file in ``engines/`` or
``tmp/`` stays, and so does a link or a folder under the name of a file. Links are not followed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["folder", "blob", "file"]

TEMPORARY_PREFIX = ".enginecache-"
"""Begins temporary names next to the final ones, which files and folders get as soon as they are complete."""

_HEX = r"[0-9a-f]{64}"
_RANDOM = r"[a-z0-9_]{8}"
"""The characters that ``tempfile`` appends to a prefix. Source: CPython, ``tempfile._RandomNameSequence``."""

_STAGED = re.compile(re.escape(TEMPORARY_PREFIX) + _RANDOM)
_TEMPORARY_FILE = re.compile(rf"(?:blob|record|holder|lock|timing-caches|runtime-caches)-{_RANDOM}")
_TEMPORARY_FOLDER = re.compile(rf"(?:registry|check|build-[0-9a-f]{{12}})-{_RANDOM}")
_ENGINES_FOLDER = re.compile(r"[0-9a-f]{2}")
_BLOB = re.compile(rf"({_HEX})\.engine")
_RECORD = re.compile(rf"({_HEX})\.json")
_QUARANTINED = re.compile(rf"{_HEX}\.\d+\.engine")
_SLOT = re.compile(_HEX)

_FILES = {
    "": re.compile(r"CACHEDIR\.TAG|reserve|registry\.sqlite(?:-journal|-wal|-shm)?"),
    "quarantine": re.compile(rf"{_QUARANTINED.pattern}|registry\.\d+\.sqlite(?:-journal|-wal|-shm)?"),
    "logs": re.compile(r"[0-9a-f]{32}\.log"),
    "locks": re.compile(rf"(?:store|repair|{_HEX}|device-[A-Za-z0-9-]+)\.(?:lock|holder)"),
    "tmp": _TEMPORARY_FILE,
    "uses": _SLOT,
    "timing-caches": _SLOT,
    "runtime-caches": _SLOT,
}


def is_staged(name: str) -> bool:
    """Return whether a process that died in making a cache, or a folder in it, left this name behind."""
    return _STAGED.fullmatch(name) is not None


def is_temporary_file(name: str) -> bool:
    """Return whether a file of this name in ``tmp/`` is work under way, or was left by a crash."""
    return _TEMPORARY_FILE.fullmatch(name) is not None


def is_temporary_folder(name: str) -> bool:
    """Return whether a folder of this name in ``tmp/`` is a build's, or that of other work."""
    return _TEMPORARY_FOLDER.fullmatch(name) is not None


def is_engines_folder(name: str) -> bool:
    """Return whether a folder of this name in ``engines/`` holds blobs."""
    return _ENGINES_FOLDER.fullmatch(name) is not None


def digest_of_blob(folder: str, name: str) -> str | None:
    """Return the digest in the name of a blob in this folder of ``engines/``; None for any other name."""
    return _digest_in(_BLOB, folder, name)


def digest_of_record(folder: str, name: str) -> str | None:
    """Return the digest in the name of a repair record in this folder of ``engines/``; None for any other name."""
    return _digest_in(_RECORD, folder, name)


def _digest_in(pattern: re.Pattern[str], folder: str, name: str) -> str | None:
    found = pattern.fullmatch(name)
    return found[1] if found is not None and found[1][:2] == folder else None


def is_quarantined(name: str) -> bool:
    """Return whether a file of this name in ``quarantine/`` is an engine that was set aside."""
    return _QUARANTINED.fullmatch(name) is not None


def is_file_of(folder: str, name: str) -> bool:
    """Return whether enginecache makes files of this name in this folder of the root; an empty folder is the root."""
    return folder in _FILES and _FILES[folder].fullmatch(name) is not None


def files_in(folder: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Yield path and name of each regular file; none where the folder cannot be listed. Links are not followed."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        yield from [(item.path, item.name) for item in found if item.is_file(follow_symlinks=False)]


def folders_in(folder: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Yield path and name of each folder; none where the parent cannot be listed. Links are not followed."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        yield from [(item.path, item.name) for item in found if item.is_dir(follow_symlinks=False)]


def owned(root: Path) -> Iterator[tuple[str, Kind]]:
    """Yield path and kind of all that enginecache made below a root, ``engines/`` itself last; not the root.

    All that is in a temporary folder counts, whatever its name.
    """
    for path, name in files_in(root):
        if is_file_of("", name):
            yield path, "blob" if name == "CACHEDIR.TAG" else "file"
    for folder, name in sorted(folders_in(root), key=lambda item: item[1] == "engines"):
        if name == "engines":
            yield from _in_engines(folder)
        elif name in _FILES:
            yield from _in_folder(folder, name)
        else:
            continue
        yield folder, "folder"


def _in_folder(folder: str, name: str) -> Iterator[tuple[str, Kind]]:
    for path, inner in files_in(folder):
        if is_file_of(name, inner):
            yield path, "blob" if is_quarantined(inner) else "file"
    for path, inner in folders_in(folder):
        if name == "tmp" and is_temporary_folder(inner):
            yield path, "folder"
            yield from _all_in(path)


def _in_engines(engines: str) -> Iterator[tuple[str, Kind]]:
    for folder, name in folders_in(engines):
        if not is_engines_folder(name):
            continue
        yield folder, "folder"
        for path, inner in files_in(folder):
            if digest_of_blob(name, inner) is not None:
                yield path, "blob"
            elif digest_of_record(name, inner) is not None:
                yield path, "file"


def _all_in(folder: str) -> Iterator[tuple[str, Kind]]:
    for path, _ in files_in(folder):
        yield path, "file"
    for path, _ in folders_in(folder):
        yield path, "folder"
        yield from _all_in(path)
