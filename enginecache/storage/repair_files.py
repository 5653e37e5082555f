"""Repair records: a small file next to each blob with the rows that name it, in case the registry is lost.

Only a repair reads them; the row stays the one truth. So a publication succeeds without its record, and one that is not
whole counts as absent.
"""

from __future__ import annotations

import contextlib
import json
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import blake3

from enginecache.errors import StoreError
from enginecache.files.canonical import Fields, canonical_json
from enginecache.files.os_errors import describe_os_error
from enginecache.storage.durable import is_real_folder, read_regular, replace_file, sync_folder
from enginecache.storage.folder import Root
from enginecache.storage.names import digest_of_record, files_in, folders_in
from enginecache.storage.registry.rows import EntryRecord

RECORD_SCHEMA = 1
MAX_BYTES = 64 << 20
"""Nothing larger is read: a record of a thousand entries has some 2 MiB."""


class RepairRecords:
    """One file ``engines/<2 hex>/<digest>.json`` a blob. Safe across threads and processes.

    A file is one line of canonical JSON with the BLAKE3 of its other fields: what was cut, flipped, or copied from
    another blob's is not taken for a record. Replacing is atomic and durable. Whoever writes holds the store's lock.

    Args:
        root: The cache folder.
    """

    def __init__(self, root: Root) -> None:
        self._root = root

    def path(self, digest: str) -> Path:
        """Return where the record of a blob is, whether it is there or not.

        Raises:
            StoreError: ``digest`` is not one.
        """
        return self._root.blob_path(digest).with_suffix(".json")

    def write(self, digest: str, entries: Sequence[Fields]) -> None:
        """Put the record in place, whatever was there.

        Raises:
            StoreError: It cannot be written.
        """
        path = self.path(digest)
        if path.parent.is_symlink():
            raise StoreError(f"{path.parent} is a link, and not followed", "Move it away, and run the command again.")
        body = {"schema": RECORD_SCHEMA, "digest": digest, "entries": list(entries)}
        text = canonical_json({**body, "blake3": _seal(body)})
        try:
            replace_file(path, [f"{text}\n".encode("ascii")], self._root.file_mode, self._root.tmp, prefix="record-")
        except OSError as error:
            raise StoreError(
                *describe_os_error(error, f"the record {path} cannot be written", path, in_cache=True)
            ) from error

    def read(self, digest: str) -> list[Fields] | str:
        """Return the rows as they were recorded; or a string that goes on from "its repair record"."""
        try:
            content = read_regular(self.path(digest), MAX_BYTES)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return describe_os_error(error, "cannot be read")[0]
        if content is None:
            return "is not a regular file, or too large"
        try:
            body = json.loads(content)
            seal = body.pop("blake3")
            if body["schema"] != RECORD_SCHEMA or body["digest"] != digest or seal != _seal(body):
                return "is not as it was written"
            return list(body["entries"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "is not as it was written"

    def entries(self, digest: str) -> list[EntryRecord] | str:
        """Return the entries in a blob's record; or a string that goes on from "its repair record"."""
        found = self.read(digest)
        if isinstance(found, str):
            return found
        try:
            entries = [EntryRecord.from_json(fields) for fields in found]
        except ValueError as error:
            return f"cannot be used: {error}"
        if any(entry.digest != digest or entry.flaw for entry in entries):
            return "cannot be used: it is not about this engine"
        return entries

    def set_aside(self, digest: str) -> None:
        """Move what is no regular file out of a record's place into ``quarantine/``: no record could be written there.

        Raises:
            StoreError: It cannot be moved.
        """
        path = self.path(digest)
        try:
            if is_real_folder(path.parent) and not stat.S_ISREG(path.lstat().st_mode):
                path.rename(self._root.quarantine / f"{digest}.{time.time_ns()}.json")
                sync_folder(self._root.quarantine)
        except FileNotFoundError:
            return
        except OSError as error:
            doing = f"what is in the place of the record {path} cannot be moved away"
            raise StoreError(*describe_os_error(error, doing, path, in_cache=True)) from error

    def delete(self, digest: str) -> None:
        """Delete the record; no error if it is missing, or cannot be deleted: it is an orphan then."""
        with contextlib.suppress(OSError):
            path = self.path(digest)
            if is_real_folder(path.parent) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink()

    def digests(self) -> Iterator[str]:
        """Yield the digests that have a record, whether their blobs are there or not, in their order."""
        for folder, prefix in sorted(folders_in(self._root.engines)):
            found = (digest_of_record(prefix, name) for _, name in files_in(folder))
            yield from sorted(digest for digest in found if digest is not None)


def _seal(body: Fields) -> str:
    return blake3.blake3(canonical_json(body).encode("ascii")).hexdigest()
