"""One engine file of anybody's: what it is, as far as its bytes say.

Only a few pages of a file are read, whatever its size, and then all of it for the digest, if that is wanted. Nothing is
mapped: a file that shrinks would kill the process.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from enginecache.errors import InvalidInputError
from enginecache.exchange.headers import (
    HEAD_BYTES,
    OLD_MAGIC,
    RTX_MAGIC,
    TRT_MAGIC,
    Bytes,
    PlanHeader,
    is_timing_cache,
    read_plan_header,
    timing_cache_size,
)
from enginecache.exchange.onnx_contexts import Context, OnnxFile, read_onnx
from enginecache.exchange.wrappers import Wrapper, find_wrapper
from enginecache.files.digest import SMALL_BYTES, StreamDigest
from enginecache.files.os_errors import describe_os_error

Kind = Literal["plan", "onnx", "ep_context", "timing_cache", "unknown"]

_WINDOW_BYTES = 1 << 16
_MAGIC_BYTES = 4
_PICKLE_STOP = b"."
"""Ends every pickle, the only wrapper that goes on after its plan."""
_BLOB_NAME = re.compile(r"([0-9a-f]{64})(?:\.\d+)?\.engine")
_ORT_NAME = re.compile(
    r".+?_\d+_\d+_\d+(?P<tags>(?:_[a-z0-9]+)*?)_sm(?P<sm>\d+)\.(?:engine|profile)"
    r"|TensorrtExecutionProvider_cache_sm(?P<timing_sm>\d+)\.timing"
)
"""Source: the TensorRT execution provider of ONNX Runtime 1.32, ``TRTGenerateId`` and ``GetCachePath``."""

_KNOWN = (
    (b"enginecache-bundle.json", "a bundle of enginecache's: `enginecache import` takes its engines"),
    (b"PK\x03\x04", "a zip archive, such as PyTorch's .pt"),
    (b"\x1f\x8b", "a gzip file: decompress it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file: decompress it"),
    (b"\x7fELF", "a shared library or a program"),
    (b"version https://git-lfs", "a Git LFS pointer, and not the file: run `git lfs pull`"),
    (b"<!DOCTYPE", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
)


class Note(NamedTuple):
    """Something to know about a file.

    Attributes:
        code: Stable, for programs.
        text: For readers.
    """

    code: str
    text: str


DAMAGE = frozenset({"cut", "longer", "empty", "zeros", "digest"})
"""Codes of notes that say that a file is damaged."""


@dataclass(frozen=True)
class ContextPlan:
    """An EPContext node, and the plan that it holds or names.

    Attributes:
        context: The node.
        path: The file next to the model that it names; None where the plan is in the model.
        size_bytes: Size of the plan; None where it cannot be read.
        header: Its header; None where it is no plan of TensorRT, or cannot be read.
        problem: Why it cannot be read; empty where it can.
    """

    context: Context
    path: str | None
    size_bytes: int | None
    header: PlanHeader | None
    problem: str = ""

    @property
    def is_complete(self) -> bool | None:
        """True if the plan has the size that its header declares; None where that is not known."""
        declared = None if self.header is None else self.header.declared_size_bytes
        return None if declared is None or self.size_bytes is None else declared == self.size_bytes


@dataclass(frozen=True)
class ForeignFile:
    """A file, as far as its bytes say what it is.

    Attributes:
        path: As it was given.
        kind: A plan, wrapped or not; an ONNX model, with EPContext nodes or without; a timing cache; or something else.
        size_bytes: Size of the file.
        header: The plan's header; None where no plan was found.
        wrapper: What is around the plan; None for nothing.
        is_complete: Whether the size is the one that the file declares; None where none is declared.
        contexts: The EPContext nodes.
        notes: What else there is to know; a code of :data:`DAMAGE` says that it is damaged.
        digest: BLAKE3 of the file, which names a blob of the cache; None where it was not asked for.
        plan_digest: The same of the plan inside a wrapper; that of the file where there is no wrapper.
    """

    path: Path
    kind: Kind
    size_bytes: int
    header: PlanHeader | None = None
    wrapper: Wrapper | None = None
    is_complete: bool | None = None
    contexts: tuple[ContextPlan, ...] = ()
    notes: tuple[Note, ...] = ()
    digest: str | None = None
    plan_digest: str | None = None

    @property
    def is_damaged(self) -> bool:
        """True if the file is cut, longer than it says, empty, or not what its name says."""
        return any(note.code in DAMAGE for note in self.notes)

    @property
    def plan_offset(self) -> int | None:
        """Offset of the plan in bytes; None for no plan."""
        if self.wrapper is not None:
            return self.wrapper.offset
        return 0 if self.kind == "plan" else None

    @property
    def plan_size_bytes(self) -> int | None:
        """Return the size of the plan in the file; None for no plan."""
        if self.plan_offset is None:
            return None
        if self.wrapper is not None and self.wrapper.size_bytes is not None:
            return self.wrapper.size_bytes
        return max(self.size_bytes - self.plan_offset, 0)


class FileBytes:
    """A file's bytes by slices, without reading all of them.

    Args:
        descriptor: The open file.
        size_bytes: Its size.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._window = b""
        self._window_at = 0

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice, /) -> bytes:
        start, stop, _ = part.indices(self._size_bytes)
        if stop <= start:
            return b""
        if start < self._window_at or stop > self._window_at + len(self._window):
            self._window = self._read(start, max(stop - start, _WINDOW_BYTES))
            self._window_at = start
        return self._window[start - self._window_at : stop - self._window_at]

    def _read(self, start: int, size: int) -> bytes:
        pieces: list[bytes] = []
        while size:
            piece = os.pread(self._descriptor, size, start)
            if not piece:
                break
            pieces.append(piece)
            start += len(piece)
            size -= len(piece)
        return b"".join(pieces)


class _Part:
    """Some bytes of others.

    Args:
        data: The others.
        start: The first.
        stop: After the last.
    """

    def __init__(self, data: Bytes, start: int, stop: int) -> None:
        self._data = data
        self._start = min(start, len(data))
        self._stop = min(max(stop, self._start), len(data))

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice, /) -> bytes:
        start, stop, _ = part.indices(len(self))
        return self._data[self._start + start : self._start + max(start, stop)]


def examine_file(path: str | os.PathLike[str], *, with_digest: bool = True) -> ForeignFile:
    """Find out what a file is. Imports nothing of TensorRT or CUDA, needs no GPU, and unpickles nothing.

    Args:
        path: The file.
        with_digest: Read all of it for the digest; without, a few pages are read whatever its size.

    Raises:
        InvalidInputError: It cannot be read, is no regular file, or changes while it is read.
    """
    path = Path(path)
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            found = _named(examine(FileBytes(file.fileno(), size_bytes), path))
            return _digested(found, file) if with_digest else found
        except OSError as error:
            raise InvalidInputError(*describe_os_error(error, f"{path} cannot be read", path)) from error


@contextmanager
def open_regular(path: Path) -> Iterator[io.FileIO]:
    """Open a regular file for reading, without waiting for anybody.

    Raises:
        InvalidInputError: It is missing, may not be read, or is no regular file.
    """
    try:
        _require_regular(path, os.stat(path))
        # O_NONBLOCK: a pipe that took the file's place since would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except InvalidInputError:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInputError(*describe_os_error(error, f"{path} cannot be read", path)) from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        _require_regular(path, os.fstat(descriptor))
        yield file


def _require_regular(path: Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
    raise InvalidInputError(f"{path} is {kind}, not a file", "Name a regular file.")


def examine(data: Bytes, path: Path) -> ForeignFile:
    """Find out what bytes are, without a digest. Never raises for what is in them.

    Args:
        data: The bytes.
        path: The file that they are from; files that it names are looked for next to it.
    """
    head = bytes(data[0:HEAD_BYTES])
    if not head:
        return ForeignFile(path, "unknown", 0, notes=(Note("empty", "it is empty"),))
    if is_timing_cache(head, len(data)):
        return _timing_cache(data, path, head)
    header = read_plan_header(head)
    if header is not None:
        return _plan(ForeignFile(path, "plan", len(data), header), data)
    wrapper = find_wrapper(data)
    if wrapper is not None:
        return _wrapped(data, path, wrapper)
    model = read_onnx(data)
    if model is not None:
        return _onnx(data, path, model)
    return ForeignFile(path, "unknown", len(data), notes=(_unknown(head),))


def _timing_cache(data: Bytes, path: Path, head: bytes) -> ForeignFile:
    declared = timing_cache_size(head)
    note = Note("timing_cache", "a timing cache of TensorRT: it speeds up builds, and is not an engine")
    sizes = _size_notes(declared, len(data))
    return ForeignFile(path, "timing_cache", len(data), is_complete=not sizes, notes=(note, *sizes))


def _plan(found: ForeignFile, data: Bytes) -> ForeignFile:
    """Return a file with a plan in it, its header read, with what is to be said of the two."""
    header, size = found.header, found.plan_size_bytes
    if header is None or size is None:
        return found
    notes = list(found.notes)
    is_complete: bool | None = None
    if header.declared_size_bytes is not None:
        sizes = _size_notes(header.declared_size_bytes, size)
        is_complete = not sizes
        notes += sizes
    elif size < 64 and header.tensorrt_version is None:
        is_complete = False
        notes.append(Note("cut", f"it is cut off: {header.doubt}"))
    elif header.doubt:
        notes.append(Note("layout", header.doubt))
    if found.wrapper is not None and found.wrapper.offset is not None and found.wrapper.size_bytes is not None:
        end = found.wrapper.offset + found.wrapper.size_bytes
        if end > len(data):
            is_complete = False
            notes.append(Note("cut", f"it is cut off: {end} bytes are needed, and there are {len(data)}"))
        elif bytes(data[len(data) - 1 : len(data)]) != _PICKLE_STOP:
            is_complete = False
            notes.append(Note("cut", "it is cut off after the plan, which is whole"))
    if is_complete is not False and header.declared_size_bytes is not None and header.doubt:
        notes.append(Note("layout", header.doubt))
    return replace(found, is_complete=is_complete, notes=tuple(notes))


def _size_notes(declared: int, size: int) -> list[Note]:
    if size < declared:
        return [Note("cut", f"it is cut off: {size} of {declared} bytes are there")]
    if size > declared:
        return [Note("longer", f"{size - declared} bytes follow the {declared} that the header declares")]
    return []


def _wrapped(data: Bytes, path: Path, wrapper: Wrapper) -> ForeignFile:
    kind: Kind = "unknown" if wrapper.name == "pickle" else "plan"
    found = ForeignFile(path, kind, len(data), wrapper=wrapper, notes=(Note("wrapper", wrapper.program),))
    if wrapper.offset is None:
        return found
    if wrapper.offset >= len(data):
        note = Note("cut", f"it is cut off: the plan would begin at byte {wrapper.offset}, and there are {len(data)}")
        return replace(found, is_complete=False, notes=(*found.notes, note))
    size = found.plan_size_bytes or 0
    header = read_plan_header(_Part(data, wrapper.offset, wrapper.offset + size))
    if header is None:
        note = Note("no_plan", f"no plan of TensorRT begins at byte {wrapper.offset}, where one should")
        return replace(found, kind="unknown", notes=(*found.notes, note))
    return _plan(replace(found, header=header), data)


def _onnx(data: Bytes, path: Path, model: OnnxFile) -> ForeignFile:
    contexts = tuple(_context(data, path, context) for context in model.contexts)
    notes = [] if model.is_complete else [Note("cut", "it is cut off: its last field has fewer bytes than it says")]
    if not model.is_whole:
        notes.append(Note("many_fields", "it has more fields than are looked at: more EPContext nodes may follow"))
    notes += [Note("context", one.problem) for one in contexts if one.problem]
    for one in contexts:
        if one.header is not None and one.header.declared_size_bytes is not None and one.size_bytes is not None:
            notes += _size_notes(one.header.declared_size_bytes, one.size_bytes)
    header = next((one.header for one in contexts if one.header is not None), None)
    is_complete = model.is_complete and all(one.is_complete is not False for one in contexts)
    kind: Kind = "ep_context" if contexts else "onnx"
    return ForeignFile(path, kind, len(data), header, None, is_complete, contexts, tuple(notes))


def _context(data: Bytes, path: Path, context: Context) -> ContextPlan:
    if context.content is None:
        # A further node of the same context, in the design of EPContext: the main one has the content.
        problem = "" if context.attributes.get("main_context") == 0 else "an EPContext node has no ep_cache_context"
        return ContextPlan(context, None, None, None, problem)
    start, size = context.content
    if context.is_embedded:
        header = read_plan_header(_Part(data, start, start + size))
        return ContextPlan(context, None, size, header)
    name = bytes(data[start : start + min(size, HEAD_BYTES)]).decode("utf-8", "surrogateescape")
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        problem = f"an EPContext node names a path that ONNX Runtime refuses: {name!r}"
        return ContextPlan(context, name, None, None, problem)
    try:
        with open_regular(path.parent / name) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            header = read_plan_header(FileBytes(file.fileno(), size_bytes))
    except (InvalidInputError, OSError) as error:
        problem = error.what if isinstance(error, InvalidInputError) else str(error)
        return ContextPlan(context, name, None, None, f"the file that an EPContext node names: {problem}")
    return ContextPlan(context, name, size_bytes, header)


def _unknown(head: bytes) -> Note:
    known = next((text for magic, text in _KNOWN if head.startswith(magic)), None)
    if known is not None:
        return Note("known", known)
    if not head.strip(b"\0"):
        return Note("zeros", f"its first {len(head)} bytes are zero, as a crash or a full disk leaves a file")
    if head[:_MAGIC_BYTES] == OLD_MAGIC:
        return Note("layout", "it begins as plans before TensorRT 8.6 do, and is of no version that is known")
    text = f"it begins with {head[:8].hex(' ')}, as no plan does ({TRT_MAGIC.decode()} or {RTX_MAGIC.decode()})"
    return Note("unknown", text)


def _named(found: ForeignFile) -> ForeignFile:
    """Return the file with what its name says, as ONNX Runtime's cache gives it."""
    match = _ORT_NAME.fullmatch(found.path.name)
    if match is None or found.kind not in {"plan", "timing_cache", "unknown"}:
        return found
    sm = match["sm"] or match["timing_sm"]
    tags = (match["tags"] or "").replace("_", ", ")
    text = f"named as ONNX Runtime's TensorRT cache does: sm_{sm}{tags}"
    notes = [*found.notes, Note("ort_cache", f"{text}; nothing in such a name is a digest of the weights")]
    listed = () if found.header is None else found.header.compute_capabilities
    if listed and f"{sm[:-1]}.{sm[-1]}" not in listed:
        notes.append(Note("name", f"its name says sm_{sm}, and its header {', '.join(listed)}"))
    return replace(found, notes=tuple(notes))


def _digested(found: ForeignFile, file: io.FileIO) -> ForeignFile:
    digest = _digest(file, found.path, 0, found.size_bytes)
    plan_digest = digest if found.plan_offset == 0 else None
    notes = found.notes
    if found.wrapper is not None and found.header is not None and found.plan_offset is not None:
        size = min(found.plan_size_bytes or 0, found.size_bytes - found.plan_offset)
        plan_digest = _digest(file, found.path, found.plan_offset, size)
    match = _BLOB_NAME.fullmatch(found.path.name)
    if match is not None and match[1] != digest:
        text = f"it is named as an engine of the cache, and its bytes do not have that digest, but {digest}: damaged"
        notes = (*notes, Note("digest", text))
    return replace(found, digest=digest, plan_digest=plan_digest, notes=notes)


def _digest(file: io.FileIO, path: Path, offset: int, size: int) -> str:
    file.seek(offset)
    with closing(StreamDigest(is_short=size < SMALL_BYTES)) as stream:
        if stream.read_from(file, size) != size or os.fstat(file.fileno()).st_size < offset + size:
            raise InvalidInputError(f"{path} changed while it was read", "Run it again when nothing writes to it.")
        return stream.hexdigest()


def context_json(plan: ContextPlan) -> dict[str, Any]:
    """Return an EPContext node as plain JSON values."""
    attributes = plan.context.attributes
    header = plan.header
    return {
        "source": attributes.get("source"),
        "embedded": plan.context.is_embedded,
        "path": plan.path,
        "hardware_architecture": attributes.get("hardware_architecture"),
        "backend": None if header is None else header.flavour,
        "tensorrt_version": None if header is None else header.tensorrt_version,
        "compute_capabilities": [] if header is None else list(header.compute_capabilities),
        "size_bytes": plan.size_bytes,
        "is_complete": plan.is_complete,
    }


__all__ = ["DAMAGE", "ContextPlan", "ForeignFile", "Kind", "Note", "context_json", "examine", "examine_file"]
