"""Carry engines from one cache folder to another: export a bundle, import one."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from enginecache.errors import (
    EngineCacheError,
    IntegrityError,
    InvalidInputError,
    NotCachedError,
    OptionError,
    StoreError,
)
from enginecache.exchange import bundle as format_
from enginecache.exchange.bundle import INDEX_NAME, Bundle
from enginecache.exchange.foreign import open_regular
from enginecache.files.os_errors import describe_os_error, shell_path
from enginecache.key.key import KEY_VERSION
from enginecache.storage.blobs import StagedBlob
from enginecache.storage.durable import sync_folder
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.space import SLACK_BYTES, require_room
from enginecache.storage.storage import BlobState, Storage


@dataclass(frozen=True)
class Exported:
    """A bundle that was written.

    Attributes:
        path: The file.
        size_bytes: Its size.
        records: The entries in it, in the order of their keys.
    """

    path: Path
    size_bytes: int
    records: tuple[EntryRecord, ...]


@dataclass(frozen=True)
class Imported:
    """Result of importing a bundle.

    Attributes:
        taken: Entries that are stored now and were not before.
        present: Entries that were stored before, with the same plan.
        kept: Entries of the bundle whose key was taken by another plan, which stays.
        warnings: What to know about the cache afterwards: that it is above its limit.
    """

    taken: tuple[EntryRecord, ...]
    present: tuple[EntryRecord, ...]
    kept: tuple[EntryRecord, ...]
    warnings: tuple[str, ...] = ()


def export_bundle(storage: Storage, records: Sequence[EntryRecord], target: Path) -> Exported:
    """Write the engines with their records as one tar file: complete under its name, or not there.

    The same engines give the same bytes. Each plan is compared with its digest while it is copied.

    Args:
        storage: The folder.
        records: The entries, each once.
        target: The file; one that is there is replaced only if it is a bundle, or empty.

    Raises:
        OptionError: There is nothing to write, or the target must not be replaced.
        IntegrityError: A plan is damaged; it was set aside.
        NotCachedError: A plan was deleted meanwhile.
        StoreError: The file cannot be written.
    """
    records = sorted({record.key: record for record in records}.values(), key=lambda record: record.key)
    if not records:
        raise OptionError("there is no engine to export", "Name keys, from `enginecache ls`.")
    _require_replaceable(target, storage.root.path)
    temporary = target.parent / f".enginecache-{uuid.uuid4().hex[:16]}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for plan in format_.write_index(records, file):
                    _write_plan(storage, records, plan["digest"], plan["size_bytes"], file)
                format_.write_end(file)
                file.flush()
                os.fsync(file.fileno())
                size_bytes = file.tell()
            temporary.replace(target)
            sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        doing = f"the bundle {target} cannot be written"
        raise StoreError(*describe_os_error(error, doing, target, otherwise="Name another file with -o.")) from error
    return Exported(target, size_bytes, tuple(records))


def _write_plan(
    storage: Storage, records: Sequence[EntryRecord], digest: str, size_bytes: int, target: format_.Sink
) -> None:
    (record, *_) = [record for record in records if record.digest == digest]
    try:
        descriptor = os.open(storage.path(record), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        message = f"the engine {record.key[:12]} ({record.model_name}) was deleted meanwhile"
        raise NotCachedError(message, "Name engines that are there, from `enginecache ls`.") from None
    with os.fdopen(descriptor, "rb", buffering=0) as source:
        is_whole = os.fstat(descriptor).st_size == size_bytes
        if is_whole and format_.write_plan(digest, size_bytes, source, target):
            return
    why = storage.set_aside(record) or f"the engine {record.key[:12]} changed while it was read"
    raise IntegrityError(why, "Build it anew with `enginecache get`, then export again; no bundle was written.")


def _require_replaceable(target: Path, cache_folder: Path) -> None:
    """Refuse a place for a bundle that something else has, or that is the cache's.

    Raises:
        OptionError: It is such a place.
    """
    place = Path(os.path.realpath(target.parent)) / target.name
    if place.is_relative_to(os.path.realpath(cache_folder)):
        raise OptionError(f"-o: {target} lies in the cache folder", "Name a file elsewhere.")
    try:
        with contextlib.suppress(FileNotFoundError):
            status = target.lstat()
            if stat.S_ISDIR(status.st_mode):
                fix = f"Name the file, such as -o {shell_path(target / 'engines.tar')}."
                raise OptionError(f"-o: {target} is a folder", fix)
            with open_regular(target) as file:
                if os.fstat(file.fileno()).st_size and file.read(len(INDEX_NAME)) != INDEX_NAME.encode():
                    message = f"-o: {target} exists and is not a bundle, so it is not replaced"
                    raise OptionError(message, "Name another file, or delete that one first.")
    except InvalidInputError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"-o: {error.what}", error.fix) from error
    if not place.parent.is_dir():
        raise OptionError(
            f"-o: there is no folder {target.parent}", f"Make it: mkdir -p -- {shell_path(target.parent)}"
        )


def import_bundle(storage: Storage, path: Path, make: Callable[[], object]) -> Imported:
    """Take the engines of a bundle into the cache: all of it is verified before anything is stored.

    What is wrong anywhere in it refuses the whole bundle. Its rows are committed at once: a death at any moment leaves
    a valid cache with all of its engines or none, and a second import completes it. An engine that is stored is never
    replaced.

    To import engines is to trust who made them: an engine is code. The bundle's digests and seals find damage and
    mistakes; they are no signature.

    Args:
        storage: The folder.
        path: The bundle.
        make: Makes the folder where it is missing; called for a whole bundle alone.

    Raises:
        InvalidInputError: It is no bundle, or cannot be read.
        BundleError: It is cut off, damaged or edited.
        StoreError: There is no room for it, or the folder cannot be written.
        RegistryError: The registry cannot be written.
    """
    try:
        with open_regular(path) as file:
            opened = format_.open_bundle(path, file)
            _require_key_version(opened)
            if not storage.root.is_made:
                _verify(opened)
            make()
            return _import(storage, opened)
    except OSError as error:
        if isinstance(error, EngineCacheError):
            raise
        raise InvalidInputError(*describe_os_error(error, f"the bundle {path} cannot be read", path)) from error


def _verify(opened: Bundle) -> None:
    """Read the whole bundle, so that none that is damaged leaves a new folder behind."""
    for digest, size_bytes in opened.plans_after_headers():
        format_.read_plan(opened, digest, size_bytes, None)


def _import(storage: Storage, opened: Bundle) -> Imported:
    stored = {record.key: found for record in opened.records if (found := storage.registry.find(record.key))}
    damaged = [found for found in stored.values() if storage.check(found) is not BlobState.INTACT]
    keys = {record.key for record in opened.records} - stored.keys() | {found.key for found in damaged}
    new = [record for record in opened.records if record.key in keys]
    sizes = {record.digest: record.size_bytes for record in new}
    require_room(storage.root, f"import {opened.path.name}", sum(sizes.values()) + SLACK_BYTES)
    staged: dict[str, StagedBlob] = {}
    try:
        for digest, size_bytes in opened.plans_after_headers():
            if digest in sizes:
                staged[digest] = storage.blobs.stage_written(_reader(opened, digest, size_bytes))
            else:
                format_.read_plan(opened, digest, size_bytes, None)
        for found in damaged:
            storage.set_aside(found)
        taken = {record.key for record in storage.admit(staged, new)}
    finally:
        for blob in staged.values():
            storage.blobs.discard(blob)  # no error for what has its name by now
    others = [record for record in opened.records if record.key not in taken]
    present = [record for record in others if _has(storage, record)]
    return Imported(
        tuple(record for record in opened.records if record.key in taken),
        tuple(present),
        tuple(record for record in others if record not in present),
    )


def _reader(opened: Bundle, digest: str, size_bytes: int) -> Callable[[io.BufferedWriter], str]:
    def read(target: io.BufferedWriter) -> str:
        format_.read_plan(opened, digest, size_bytes, target)
        return digest

    return read


def _has(storage: Storage, record: EntryRecord) -> bool:
    found = storage.registry.find(record.key)
    return found is not None and found.digest == record.digest


def _require_key_version(opened: Bundle) -> None:
    """Refuse engines that no request here would ever find.

    Raises:
        InvalidInputError: A key in it is of another version.
    """
    others = sorted({record.key_version for record in opened.records} - {KEY_VERSION})
    if others:
        message = f"{opened.path} has keys of version {others[0]}, and this enginecache makes version {KEY_VERSION}"
        raise InvalidInputError(message, "Export it with the enginecache that will import it; nothing was taken.")
