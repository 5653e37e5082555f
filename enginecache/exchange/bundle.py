"""The format of bundles: engines with their records as one tar file, the same bytes for the same engines.

::

    enginecache-bundle.json                 the index: every record, and the digest and size of every plan
    engines/<2 hex>/<digest>.engine         the plans, in the order of their digests

An uncompressed tar file of regular files with fixed owner, mode and time, so ``tar -tf`` lists it and an image builder
can carry it. From the index follows every other byte but the plans': a bundle is compared with what this module would
have written, header by header. So nothing in it can name a path, a link or a device, and no name in it is ever used.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from enginecache.errors import BundleError, InvalidInputError
from enginecache.exchange.headers import HEAD_BYTES, read_plan_header
from enginecache.exchange.loads_here import is_same_release
from enginecache.files.canonical import Fields, canonical_json
from enginecache.files.digest import BUFFER_BYTES, SMALL_BYTES, StreamDigest, digest_of
from enginecache.files.units import format_size
from enginecache.key.key import KEY_VERSION, is_key_form
from enginecache.storage.registry.rows import EntryRecord

INDEX_NAME = "enginecache-bundle.json"
FORMAT = 1
"""Raised where an older release could not read it any more."""

MAX_INDEX_BYTES = 64 << 20
"""Of some 40,000 engines."""

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_GET_ANOTHER = "Get the bundle again, or export it again; nothing was taken from it."


class Sink(Protocol):
    """Takes bytes."""

    def write(self, data: Any, /) -> object:
        """Take some."""
        ...


def bundle_index(records: Sequence[EntryRecord]) -> bytes:
    """Return the index of a bundle with these entries: the same bytes in whatever order they come.

    It carries a digest of itself, which finds an edited record; it is no signature.
    """
    entries = [record.to_json() for record in sorted(records, key=lambda one: one.key)]
    body = {"bundle": FORMAT, "entries": entries, "plans": _plans(records)}
    seal = digest_of(canonical_json(body).encode("ascii"))
    return (canonical_json({**body, "blake3": seal}) + "\n").encode("ascii")


def _plans(records: Iterable[EntryRecord]) -> list[Fields]:
    sizes = {record.digest: record.size_bytes for record in records}
    return [{"digest": digest, "size_bytes": sizes[digest]} for digest in sorted(sizes)]


def member_header(name: str, size_bytes: int) -> bytes:
    """Return the tar header of a member, from its name and size alone."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, 0o444
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def member_name(digest: str) -> str:
    """Return the name of a plan in a bundle."""
    return f"engines/{digest[:2]}/{digest}.engine"


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _BLOCK)


def _padded(size_bytes: int) -> int:
    return _BLOCK + size_bytes + len(_padding(size_bytes))


def bundle_size(index_bytes: int, plans: Iterable[Fields]) -> int:
    """Return the size of the whole bundle, which its index decides."""
    return _padded(index_bytes) + sum(_padded(plan["size_bytes"]) for plan in plans) + len(_END)


def write_index(records: Sequence[EntryRecord], target: Sink) -> list[Fields]:
    """Write the beginning of a bundle; return its plans in their order, as digest and size."""
    index = bundle_index(records)
    for piece in (member_header(INDEX_NAME, len(index)), index, _padding(len(index))):
        target.write(piece)
    return _plans(records)


def write_plan(digest: str, size_bytes: int, source: io.FileIO, target: Sink) -> bool:
    """Write one plan; return whether it has its size and digest, without which the bundle is void."""
    target.write(member_header(member_name(digest), size_bytes))
    found = _copied(source, size_bytes, target)
    target.write(_padding(size_bytes))
    return found == digest


def write_end(target: Sink) -> None:
    """Write the end of a bundle."""
    target.write(_END)


def _copied(source: io.FileIO, size_bytes: int, target: Sink | None) -> str:
    """Copy the next bytes of ``source``, if there is a target; return their digest."""
    with closing(StreamDigest(is_short=size_bytes < SMALL_BYTES)) as stream:
        left = size_bytes
        while left:
            piece = source.read(min(left, BUFFER_BYTES))
            if not piece:
                break
            stream.write(piece)
            if target is not None:
                target.write(piece)
            left -= len(piece)
        return stream.hexdigest() if not left else ""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose index has been read and checked; of the plans nothing has been.

    Attributes:
        path: The file.
        file: It, open.
        records: Its entries.
        plans: Digest and size of its plans, in their order.
        plans_at: Offset of the first plan's header in bytes.
    """

    path: Path
    file: io.FileIO
    records: tuple[EntryRecord, ...]
    plans: tuple[Fields, ...]
    plans_at: int

    def plans_after_headers(self) -> Iterator[tuple[str, int]]:
        """Yield digest and size of each plan, with the file at its first byte; read or skip that many.

        Raises:
            BundleError: A header is not the one that follows from the index.
        """
        at = self.plans_at
        for plan in self.plans:
            digest, size = plan["digest"], plan["size_bytes"]
            self.file.seek(at)
            _require_header(self.path, self.file.read(_BLOCK), member_name(digest), size)
            yield digest, size
            at += _padded(size)
            self.file.seek(at - len(_padding(size)))
            if self.file.read(len(_padding(size))) != _padding(size):
                raise _edited(self.path, "there are bytes between its members")
        self.file.seek(at)
        if self.file.read(len(_END)) != _END:
            raise _edited(self.path, "its end is not one")


def read_plan(bundle: Bundle, digest: str, size_bytes: int, target: Sink | None) -> None:
    """Read the plan at which the file stands, into ``target`` if there is one, and check its digest and header.

    Raises:
        BundleError: It does not have its digest, or its header contradicts its record.
    """
    at = bundle.file.tell()
    head = bundle.file.read(min(size_bytes, HEAD_BYTES))
    bundle.file.seek(at)
    if _copied(bundle.file, size_bytes, target) != digest:
        raise BundleError(f"{bundle.path} is damaged: the plan {digest} does not have its digest", _GET_ANOTHER)
    for record in bundle.records:
        if record.digest == digest:
            why = contradiction(head, record)
            if why:
                raise _edited(bundle.path, f"the record of {record.key[:12]} contradicts its plan: {why}")


def contradiction(head: bytes, record: EntryRecord) -> str:
    """Return how a plan's header contradicts its record; empty where it does not, or is of no known layout."""
    header = read_plan_header(head)
    if header is None or header.doubt:
        return ""
    if header.flavour != record.backend:
        return f"a plan of {header.flavour}, and not of {record.backend}"
    if header.tensorrt_version is not None and not is_same_release(header.tensorrt_version, record.tensorrt_version):
        return f"built by {header.tensorrt_version}, and not by {record.tensorrt_version}"
    if header.declared_size_bytes not in {None, record.size_bytes}:
        return f"of {header.declared_size_bytes} bytes, and not of {record.size_bytes}"
    if header.reach is not None and not header.reach.covers(record.reach):
        return f"for compute capability {header.reach}, and not for {record.reach}"
    return ""


def open_bundle(path: Path, file: io.FileIO) -> Bundle:
    """Read and check the index of a bundle, and the size of the file.

    Args:
        path: For messages.
        file: It, at its beginning.

    Raises:
        InvalidInputError: It is no bundle, or one of a later release.
        BundleError: It is cut off, damaged or edited.
    """
    size_bytes = os.fstat(file.fileno()).st_size
    first = file.read(_BLOCK)
    index_bytes = _index_size(path, first)
    index = file.read(index_bytes)
    if len(index) < index_bytes:
        raise _cut(path, f"{size_bytes} bytes are too few for its index")
    padding = file.read(len(_padding(index_bytes)))
    if padding != _padding(index_bytes):
        raise _edited(path, "there are bytes after its index")
    records, plans = _read_index(path, index)
    whole = bundle_size(index_bytes, plans)
    if size_bytes < whole:
        raise _cut(path, f"{format_size(size_bytes)} of {format_size(whole)} are there ({size_bytes} of {whole} bytes)")
    if size_bytes > whole:
        raise _edited(path, f"{size_bytes - whole} bytes follow its end")
    return Bundle(path, file, records, plans, file.tell())


def _index_size(path: Path, header: bytes) -> int:
    not_one = InvalidInputError(
        f"{path} is not a bundle of enginecache's" + _kind_of(header), "`enginecache export KEY -o FILE` makes one."
    )
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError):
        raise not_one from None
    if info.name != INDEX_NAME:
        raise not_one
    if not 0 < info.size <= MAX_INDEX_BYTES or header != member_header(INDEX_NAME, info.size):
        raise _edited(path, "the header of its index is not one")
    return info.size


def _kind_of(header: bytes) -> str:
    if header.startswith(b"\x1f\x8b"):
        return ": it is compressed (gzip); decompress it first"
    if header.startswith((b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return ": it is compressed; decompress it first"
    return ": a bundle begins with its index" if header[257:262] == b"ustar" else ""


def _read_index(path: Path, index: bytes) -> tuple[tuple[EntryRecord, ...], tuple[Fields, ...]]:
    try:
        body = json.loads(index)
        number = body["bundle"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _edited(path, "its index cannot be read") from None
    if isinstance(number, int) and number > FORMAT:
        message = f"{path} is a bundle of format {number}, made by a newer enginecache; this one knows {FORMAT}"
        raise InvalidInputError(message, "Upgrade enginecache.")
    try:
        records = tuple(map(_record, body["entries"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _edited(path, f"a record in its index is not one: {error}") from None
    if not records:
        raise _edited(path, "it has no engines")
    sizes = {record.digest: record.size_bytes for record in records}
    if any(sizes[record.digest] != record.size_bytes for record in records):
        raise _edited(path, "two records of one plan give it two sizes")
    # Whatever else could be there, twice or in another order, would make another text.
    if len({record.key for record in records}) != len(records) or bundle_index(records) != index:
        raise _edited(path, "its index is not as it was written")
    return records, tuple(_plans(records))


def _record(fields: Fields) -> EntryRecord:
    """Read one record of an index.

    Raises:
        ValueError: It is not as it was written.
    """
    record = EntryRecord.from_json(fields)
    if record.flaw:
        raise ValueError(record.flaw)
    if record.key_version != KEY_VERSION:
        return record  # which the import refuses, and says so
    if not is_key_form(record.fields):
        raise ValueError("its key is not one of enginecache's")
    flavour = record.fields["toolchain"].get("flavour")
    if flavour != record.backend:
        raise ValueError(f"its key is of {flavour}, and it says {record.backend}")
    return record


def _require_header(path: Path, header: bytes, name: str, size_bytes: int) -> None:
    if header == member_header(name, size_bytes):
        return
    found = "something that is not a header of a tar file"
    with contextlib.suppress(tarfile.HeaderError, UnicodeDecodeError, ValueError):
        info = tarfile.TarInfo.frombuf(header, "ascii", "backslashreplace")
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.DIRTYPE: "a folder"}
        kinds |= {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe"}
        kinds |= {tarfile.REGTYPE: "a file", tarfile.AREGTYPE: "a file"}
        kind = kinds.get(info.type, f"a member of type {info.type!r}")
        found = f"{kind} {info.name!r} of {info.size} bytes"
    raise _edited(path, f"it has {found} where {name} of {size_bytes} bytes belongs")


def _cut(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} is cut off: {why}", _GET_ANOTHER)


def _edited(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} is damaged, or was edited: {why}", _GET_ANOTHER)
