"""Side caches: TensorRT's timing caches and TensorRT-RTX's runtime caches, which save time and decide nothing.

Losing one costs a slower build or start, and never an engine. So one that is not whole counts as absent: it is never
given to TensorRT, and is no error.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enginecache.errors import StoreError
from enginecache.files.canonical import Fields, canonical_json
from enginecache.files.digest import digest_of
from enginecache.files.os_errors import describe_os_error
from enginecache.host.evidence import note_use
from enginecache.storage.durable import read_regular, replace_file
from enginecache.storage.folder import ArtefactKind, Root

MAX_BYTES = 256 << 20
"""Nothing larger is kept or read: each is held in memory two or three times over, in every process that uses it."""

_SLOT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artefact:
    """The content of a slot.

    Attributes:
        data: TensorRT's bytes.
        digest: BLAKE3 of them, 64 hex characters.
    """

    data: bytes
    digest: str


class Artefacts:
    """Artefacts of one kind, one file a slot, in a folder of the root.

    A file is one line, ``enginecache <kind> v1 <slot> <digest>``, and the bytes: what was cut, flipped, or copied from
    another slot does not match its line. Replacing is atomic and durable: a reader sees the old or the new file. Safe
    across threads and processes; of two that replace one at a time, the last one's stays. Not safe on NFS.

    Args:
        root: The cache folder.
        kind: Which ones; also the name of their folder.
    """

    def __init__(self, root: Root, kind: ArtefactKind) -> None:
        self._root = root
        self._kind = kind
        self._folder = root.artefacts(kind)

    def slot(self, fields: Fields) -> str:
        """Return the name of the slot for these fields: 64 hex characters."""
        return digest_of(f"enginecache/{self._kind}/v1\n{canonical_json(fields)}".encode("ascii"))

    def read(self, slot: str) -> Artefact | None:
        """Return what the slot holds; None where that is nothing, or not whole. Notes the use, which renews it.

        Raises:
            StoreError: ``slot`` is no name of one.
        """
        path = self._path(slot)
        found = self._inspect(path)
        if not isinstance(found, Artefact):
            return None
        with contextlib.suppress(OSError):
            note_use(os.fspath(path))
        return found

    def replace(self, slot: str, data: bytes) -> str:
        """Put ``data`` in the slot, whatever was there; return its digest.

        Raises:
            StoreError: It cannot be written, or is larger than :data:`MAX_BYTES`.
        """
        path = self._path(slot)
        if len(data) > MAX_BYTES:
            message = f"{len(data)} bytes are too many to keep in {self._folder}: the limit is {MAX_BYTES}"
            raise StoreError(message, "Nothing needs to be done: later work is slower, and just as correct.")
        digest = digest_of(data)
        try:
            content = (self._first_line(slot, digest), data)
            replace_file(path, content, self._root.file_mode, self._root.tmp, prefix=f"{self._kind}-")
        except OSError as error:
            doing = f"nothing can be kept in {self._folder}"
            raise StoreError(*describe_os_error(error, doing, self._folder, in_cache=True)) from error
        return digest

    def check(self) -> Iterator[tuple[Path, str]]:
        """Yield each file of a slot's name that is not whole, with what is wrong; all may be deleted. Reads all."""
        names = os.listdir(self._folder) if self._folder.exists() else []  # noqa: PTH208  only the names are looked at
        for name in sorted(filter(_SLOT.fullmatch, names)):
            found = self._inspect(self._folder / name)
            if isinstance(found, str):
                yield self._folder / name, found

    def _path(self, slot: str) -> Path:
        if _SLOT.fullmatch(slot) is None:
            raise StoreError(f"{slot!r} is not the name of a slot", "Please report it.")
        return self._folder / slot

    def _first_line(self, slot: str, digest: str) -> bytes:
        return f"enginecache {self._kind} v1 {slot} {digest}\n".encode("ascii")

    def _inspect(self, path: Path) -> Artefact | str | None:
        """Return what a file holds, or what is wrong with it; None where there is none."""
        try:
            content = read_regular(path, MAX_BYTES + 1024)
        except FileNotFoundError:
            return None
        except OSError as error:
            return describe_os_error(error, "it cannot be read", path)[0]
        if content is None:
            return f"it is not a file, or larger than {MAX_BYTES} bytes"
        data = content[len(self._first_line(path.name, "0" * 64)) :]
        digest = digest_of(data)
        if not content.startswith(self._first_line(path.name, digest)):
            return "its bytes are not those that its first line names"
        return Artefact(data, digest)
