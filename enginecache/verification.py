"""Is everything as promised? Findings, each with what a repair would do."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from enginecache.eviction import Garbage
from enginecache.memo import BlobState, FileMemo
from enginecache.registry.base import EntryRecord, Registry
from enginecache.store.artefacts import Artefacts
from enginecache.store.base import BlobStore
from enginecache.store.root import ArtefactKind, Root

Kind = Literal["dangling", "size", "digest", "mode", "orphan", "artefact"]

_KINDS: dict[BlobState, Kind] = {
    BlobState.MISSING: "dangling",
    BlobState.WRONG_SIZE: "size",
    BlobState.WRONG_DIGEST: "digest",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: What sort of thing.
        subject: Key of the entry, or path of the file.
        text: What is wrong.
        repair: What ``--repair`` does about it.
        is_repaired: Whether it did.
    """

    kind: Kind
    subject: str
    text: str
    repair: str
    is_repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "text": self.text,
            "repair": self.repair,
            "repaired": self.is_repaired,
        }


@dataclass(frozen=True)
class Verification:
    """What a check found.

    Attributes:
        entries: Entries checked.
        findings: What is wrong.
        young_garbage: Files without a row, within their grace time: a publication may still be under way.
    """

    entries: int
    findings: tuple[Finding, ...]
    young_garbage: tuple[Garbage, ...] = field(default=())

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong, or all of it was repaired."""
        return all(finding.is_repaired for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The record of ``verify --json``, as plain JSON values."""
        return {
            "schema": 1,
            "entries": self.entries,
            "clean": self.is_clean,
            "findings": [finding.to_json() for finding in self.findings],
            "garbage_in_grace": [
                {"path": str(item.path), "size_bytes": item.size_bytes, "what": item.what}
                for item in self.young_garbage
            ],
        }


Repair = Callable[[], bool]


def check_entries(
    registry: Registry,
    root: Root,
    store: BlobStore,
    memo: FileMemo,
    set_aside: Callable[[EntryRecord], object],
    *,
    deep: bool,
) -> Iterator[tuple[Finding, Repair]]:
    """Compare every entry with its blob; each finding with the function that repairs it.

    Args:
        registry: The entries.
        root: For the modes that blobs should have.
        store: The blobs.
        memo: Which blobs need no reading.
        set_aside: Quarantines an entry's blob and forgets its entries.
        deep: Read every blob's bytes, also where its fingerprint was verified before.
    """
    for record in registry.entries():
        state = memo.check_blob(record.digest, record.size_bytes, force=deep)
        if state is BlobState.INTACT:
            path = store.path(record.digest)
            try:
                mode = stat.S_IMODE(path.lstat().st_mode)
            except FileNotFoundError:
                continue  # removed since it was checked
            if mode != root.blob_mode:
                text = f"{path} has mode {mode:04o}, not {root.blob_mode:04o}"
                finding = Finding("mode", record.key, text, "set the mode")
                yield finding, lambda path=path: _set_mode(path, root.blob_mode)  # type: ignore[misc]
            continue
        current = registry.find(record.key)
        if current is None or current.digest != record.digest:
            continue  # removed or replaced since the list was read
        what = "its file is gone" if state is BlobState.MISSING else state.value
        text = f"the engine {record.digest[:12]} of {record.model_name}: {what}"
        repair = "forget the entry" if state is BlobState.MISSING else "quarantine the file and forget the entry"
        finding = Finding(_KINDS[state], record.key, text, f"{repair}; the next get builds it anew")
        yield finding, lambda record=record: (set_aside(record), True)[1]  # type: ignore[misc]


def check_artefacts(root: Root) -> Iterator[tuple[Finding, Repair]]:
    """Read every timing cache and runtime cache; each that is not whole with the function that deletes it."""
    for kind in get_args(ArtefactKind):
        for path, problem in Artefacts(root, kind).check():
            finding = Finding("artefact", str(path), f"{path}: {problem}", "delete the file; later work is slower once")
            yield finding, lambda path=path: _delete(path)  # type: ignore[misc]


def _delete(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _set_mode(path: Any, mode: int) -> bool:
    try:
        path.chmod(mode)
    except OSError:
        return False
    return True
