"""Consistency checks of the folder and the registry. Each finding comes with the function that repairs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

from enginecache.errors import EngineCacheError, StoreError
from enginecache.files.units import WRONG_CLOCK_S, utc_now
from enginecache.maintenance.findings import Finding, Found, Kept, Kind
from enginecache.storage.folder import FOLDERS, ArtefactKind, Root
from enginecache.storage.locks import FileLocks
from enginecache.storage.names import files_in, folders_in, is_engines_folder, is_file_of, is_quarantined
from enginecache.storage.rebuild import Rebuilt, find_registry_damage
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import BuildRecord, EntryRecord, ExaminedRow
from enginecache.storage.side_caches import Artefacts
from enginecache.storage.storage import MOUNTED_OVER, BlobState, Storage

_KINDS: dict[BlobState, Kind] = {
    BlobState.MISSING: "dangling",
    BlobState.WRONG_SIZE: "size",
    BlobState.WRONG_DIGEST: "digest",
}
_SHARED_FIELDS = {"model_name", "size_bytes", "is_pinned", "seal"}
"""Not in the record (the pin, the seal), or from a row that others share (the model's first name, the blob's size)."""
_RESTORE = "take it from the record next to the engine"
_KEY = re.compile(r"[0-9a-f]{64}")


def check_registry(root: Root, rebuild: Callable[[], Rebuilt | None], *, repair: bool) -> Finding | None:
    """Check that the registry is whole as a file; return what is wrong with it, repaired if ``repair`` is true.

    Raises:
        SchemaError: A newer release wrote it.
        RegistryError: It cannot be looked at, or made anew.
        StoreError: It cannot be set aside.
    """
    why = find_registry_damage(root)
    if not why:
        return None
    text = f"the registry {root.registry_path} is damaged: {why}"
    what = "keep it in quarantine/, and make it anew from the records next to the engines and the pins that can be read"
    finding = Finding("registry", str(root.registry_path), text, what)
    if not repair:
        return finding
    done = rebuild()
    if done is not None:
        text = (
            f"{text}; back are {done.entries} entries and {done.pins} pins; {done.lost_blobs} stored engines have no "
            f"whole record and go after their grace time; attempts, misses and loadings are forgotten"
        )
        text += "" if done.kept is None else f"; the old file is kept as {done.kept}"
    return dataclasses.replace(finding, text=text, is_repaired=True)


class EntryChecks:
    """Compares rows, blobs and records.

    Safe while others publish and remove: an entry that changed since the rows were listed is checked again before it is
    reported, and again, with the store's lock held, before it is repaired.

    Args:
        storage: The folder.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._root = root = storage.root
        self._registry = storage.registry
        self._blobs = storage.blobs
        self._records = storage.records
        self._owner = (root.engines if root.engines.exists() else root.path).lstat().st_uid

    def check(self, rows: Iterable[ExaminedRow], *, deep: bool) -> Found:
        """Yield each finding with the function that repairs it.

        Args:
            rows: All rows, from :meth:`~enginecache.storage.registry.registry.Registry.examine`.
            deep: Read every blob's bytes, also where its fingerprint was verified before.
        """
        sound: list[EntryRecord] = []
        for row in rows:
            problem = row.problem or ("" if row.record is None else row.record.flaw)
            if row.record is None or problem:
                yield from self._row(row, problem)
            else:
                sound.append(row.record)
        # After the damaged rows: the records that repair them may be next to these blobs.
        for digest, entries in _by_digest(sound).items():
            is_whole = True
            for entry in entries:  # one by one: the repair of the first one's blob removes the others' rows too
                for finding, fix in self._blob(entry, deep=deep):
                    is_whole = is_whole and finding.kind in {"mode", "owner"}
                    yield finding, fix
            if is_whole:
                yield from self._record(digest, entries)

    def _row(self, row: ExaminedRow, problem: str) -> Found:
        subject = str(row.key)
        text = f"the row of {subject[:12]} is damaged: {problem}"
        recorded = self._recorded(row)
        if recorded is None:
            forget = "forget the entry; the next get builds it anew"
            yield Finding("row", subject, text, forget), lambda: self._storage.forget_row(row)
        else:
            yield Finding("row", subject, text, _RESTORE), lambda: self._storage.restore_row(recorded)

    def _recorded(self, row: ExaminedRow) -> EntryRecord | None:
        """Return what a damaged row held, from the record next to a whole blob. The row's digest may be damaged too."""
        digests = list(self._records.digests())
        for digest in sorted(digests, key=lambda digest: digest != row.digest):
            found = self._records.entries(digest)
            entry = None if isinstance(found, str) else next((entry for entry in found if entry.key == row.key), None)
            if entry is not None:
                with contextlib.suppress(StoreError):
                    read = self._blobs.read(digest)
                    return entry if read is not None and read.digest == digest else None
        return None

    def _blob(self, record: EntryRecord, *, deep: bool) -> Found:
        try:
            state = self._storage.check(record, force=deep)
        except StoreError as error:
            yield from self._unreadable(record, error)
            return
        if state is BlobState.INTACT:
            yield from self._status(record)
            return
        current = self._registry.find(record.key)
        if current is None or current.digest != record.digest:
            return  # removed or replaced since the list was read
        if state is BlobState.WRONG_SIZE and self._has_recorded_size(record):
            row = ExaminedRow(record.key, record.digest, record)
            yield from self._row(row, f"it says {record.size_bytes} bytes, and the engine is whole with another size")
            return
        text = f"the engine {record.digest[:12]} of {record.model_name}: {state.value}"
        if state is BlobState.MISSING and self._root.is_mounted_over():
            text += f", and may be hidden: {MOUNTED_OVER} {self._root.engines}"
            leave = f"leave it: unmount that first, or run `enginecache rm {record.key[:12]}` to forget the entry"
            yield Finding("dangling", record.key, text, leave), lambda: False
            return
        repair = "forget the entry" if state is BlobState.MISSING else "quarantine the file and forget the entry"
        finding = Finding(_KINDS[state], record.key, text, f"{repair}; the next get builds it anew")
        yield finding, lambda: (self._storage.set_aside(record), True)[1]

    def _has_recorded_size(self, record: EntryRecord) -> bool:
        recorded = self._recorded(ExaminedRow(record.key, record.digest, record))
        fingerprint = self._blobs.fingerprint(record.digest)
        return recorded is not None and fingerprint is not None and recorded.size_bytes == fingerprint.size_bytes

    def _unreadable(self, record: EntryRecord, error: StoreError) -> Found:
        found = tuple(self._status(record))
        if found:
            yield from found  # a mode that shuts this user out, say
            return
        repair = "quarantine the file and forget the entry; the next get builds it anew"
        yield (
            Finding("unreadable", record.key, f"the engine {record.digest[:12]}: {error.what}", repair),
            lambda: self._storage.quarantine(record, error.what),
        )

    def _status(self, record: EntryRecord) -> Found:
        """Yield what is wrong with a blob's mode and owner."""
        path = self._blobs.path(record.digest)
        try:
            status = path.lstat()
        except OSError:
            return  # removed since it was checked
        mode = stat.S_IMODE(status.st_mode)
        if mode != self._root.blob_mode:
            text = f"{path} has mode {mode:04o}, not {self._root.blob_mode:04o}"
            yield Finding("mode", record.key, text, "set the mode"), lambda: self._blobs.retire(record.digest)
        if status.st_uid != self._owner and not self._root.is_shared:
            text = f"{path} belongs to user {status.st_uid}, and the cache to user {self._owner}"
            yield (
                Finding("owner", record.key, text, "replace it by this user's copy"),
                lambda: self._storage.own(record.digest, self._owner),
            )

    def _record(self, digest: str, listed: Sequence[EntryRecord]) -> Found:
        """Yield what differs between a blob's record and its rows."""
        if not _compared(self._records.entries(digest), listed):
            return
        found = _compared(*self._storage.recorded_and_sound(digest))
        for subject, what, recorded in found:
            if recorded is None:
                text = f"the repair record of the engine {digest[:12]} {what}"
                repair = "write it anew from the row, and keep what else has its name in quarantine/"
                yield Finding("record", subject, text, repair), lambda: self._storage.write_record(digest)
            else:
                text = f"the row of {subject[:12]} is damaged: {what}"
                yield Finding("row", subject, text, _RESTORE), lambda entry=recorded: self._storage.restore_row(entry)  # type: ignore[misc]


def _compared(
    recorded: list[EntryRecord] | str, rows: Sequence[EntryRecord]
) -> list[tuple[str, str, EntryRecord | None]]:
    """Return what differs: the subject, a sentence, and the entry as it should be where the row is damaged."""
    if not rows:
        return []
    if isinstance(recorded, str):
        return [(rows[0].key, recorded, None)]
    found: list[tuple[str, str, EntryRecord | None]] = []
    by_key = {entry.key: entry for entry in recorded}
    for row in rows:
        entry = by_key.get(row.key)
        if entry is None or entry.build_id != row.build_id:
            return [(row.key, "is not that of its last build", None)]
        differing = _differing(row, entry)
        if differing:
            # A row never changes after its attempt, and the record has a digest of its own: the row is to blame.
            found.append((row.key, f"it differs from its record in {', '.join(differing)}", entry))
    return found


def _by_digest(entries: Iterable[EntryRecord]) -> dict[str, list[EntryRecord]]:
    found: dict[str, list[EntryRecord]] = {}
    for entry in entries:
        found.setdefault(entry.digest, []).append(entry)
    return found


def _differing(row: EntryRecord, entry: EntryRecord) -> list[str]:
    names = [item.name for item in dataclasses.fields(row) if item.name not in _SHARED_FIELDS]
    return [name for name in names if getattr(row, name) != getattr(entry, name)]


def check_folders(root: Root) -> Found:
    """Yield wrong modes of the folders below the root; the root was checked when it was opened."""
    inner = [Path(path) for path, name in sorted(folders_in(root.engines)) if is_engines_folder(name)]
    for path in (*(root.path / name for name in FOLDERS), *inner):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode) and mode != root.folder_mode:
                text = f"{path} has mode {mode:04o}, not {root.folder_mode:04o}"
                finding = Finding("mode", str(path), text, "set the mode")
                yield finding, functools.partial(_set_mode, path, root.folder_mode)


def check_builds(registry: Registry, locks: FileLocks, grace_s: float) -> Found:
    """Yield the attempts that say ``running`` and began before the grace time, though nobody holds their key's lock."""
    now = utc_now()
    for build in registry.unfinished_builds():
        age_s = (now - build.started_at).total_seconds()
        # One that began ahead of the clock was begun by another clock, or this one was set back: the lock tells.
        if -WRONG_CLOCK_S <= age_s < grace_s or is_under_way(build, locks):
            continue
        text = f"the attempt {build.id[:12]} of {build.started_at:%Y-%m-%d} says running, but its process has ended"
        finding = Finding("build", build.id, text, "record that it was abandoned")
        yield finding, lambda build=build: _abandon(registry, locks, build.id, build.key)  # type: ignore[misc]


def is_under_way(build: BuildRecord, locks: FileLocks) -> bool:
    """Return whether an attempt that says ``running`` does run: its key's lock is held, or cannot be looked at."""
    if _KEY.fullmatch(build.key) is None:
        return True
    try:
        return locks.is_held(build.key)
    except EngineCacheError:
        return True


def _abandon(registry: Registry, locks: FileLocks, build_id: str, key: str) -> None:
    with locks.hold(key, 0.0):
        registry.abandon_build(build_id)


def check_artefacts(root: Root) -> Found:
    """Yield each timing cache and runtime cache that is not whole, with the function that deletes it. Reads all."""
    for kind in get_args(ArtefactKind):
        for path, problem in Artefacts(root, kind).check():
            is_ours = _is_regular(path)
            repair = "delete the file; later work is slower once" if is_ours else "leave it: move it away yourself"
            finding = Finding("artefact", str(path), f"{path}: {problem}", repair)
            yield finding, lambda path=path: _delete(path)  # type: ignore[misc]


def count_kept(root: Root, registry: Registry) -> Kept:
    """Count what is there for a reason."""
    kept = [name for _, name in files_in(root.quarantine) if is_file_of("quarantine", name)]
    return Kept(
        quarantined=sum(map(is_quarantined, kept)),
        set_asides=tuple(registry.set_asides()),
        registries=sum(name.endswith(".sqlite") for name in kept),
        failures=registry.lasting_failures(),
        unfinished_builds=len(registry.unfinished_builds()),
    )


def _delete(path: Path) -> bool:
    """Delete a file; return False for a link, a folder or a pipe of its name, which enginecache does not make."""
    is_ours = _is_regular(path)
    if is_ours:
        path.unlink(missing_ok=True)
    return is_ours


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _set_mode(path: Path, mode: int) -> bool:
    """Change a folder's mode. A link that took its place is not followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
    return True
