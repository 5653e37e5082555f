"""Everything known of one file: its bytes, the entry that has the same bytes, and whether it would load here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginecache.errors import EngineCacheError, InvalidInputError
from enginecache.exchange.foreign import ForeignFile, Note, context_json, examine_file
from enginecache.exchange.loads_here import Host, Loadability, judge_file
from enginecache.storage.registry.rows import EntryRecord, LoadRecord
from enginecache.storage.storage import Storage
from enginecache.trt.load.request import driver_of


@dataclass(frozen=True)
class Inspection:
    """One inspected file.

    Attributes:
        path: As it was given.
        file: What its bytes say; None where it cannot be read.
        record: The entry of the cache with the same bytes, the newest if there are several.
        loads_here: Whether it would load here.
        error: Why it cannot be read; None where it can.
    """

    path: Path
    file: ForeignFile | None
    record: EntryRecord | None
    loads_here: Loadability
    error: EngineCacheError | None = None

    @property
    def is_damaged(self) -> bool:
        """True if the file is cut off, or damaged in another way that shows."""
        return self.file is not None and self.file.is_damaged

    def to_json(self, entry: dict[str, Any] | None) -> dict[str, Any]:
        """Return plain JSON values.

        Args:
            entry: The record of the entry, as a listing has it.
        """
        found = self.file
        header = None if found is None else found.header
        wrapper = None if found is None else found.wrapper
        built_on = None if header is None or header.built_on is None else header.built_on
        error = self.error
        return {
            "path": str(self.path),
            "kind": "unknown" if found is None else found.kind,
            "backend": None if header is None else header.flavour,
            "tensorrt_version": None if header is None else header.tensorrt_version,
            "compute_capabilities": [] if header is None else list(header.compute_capabilities),
            "size_bytes": None if found is None else found.size_bytes,
            "declared_size_bytes": None if header is None else header.declared_size_bytes,
            "is_complete": None if found is None else found.is_complete,
            "is_damaged": self.is_damaged,
            "wrapper": None if wrapper is None else wrapper.name,
            "wrapper_facts": {} if wrapper is None else wrapper.facts,
            "plan_offset": None if found is None else found.plan_offset,
            "plan_size_bytes": None if found is None else found.plan_size_bytes,
            "plan_digest": None if found is None else found.plan_digest,
            "cuda_version": None if header is None else header.cuda_version,
            "weights_bytes": None if header is None else header.weights_bytes,
            "built_on": None
            if built_on is None
            else {
                "compute_capability": str(built_on.compute_capability),
                "sm_count": built_on.sm_count,
                "memory_bytes": built_on.memory_bytes,
                "l2_bytes": built_on.l2_bytes,
            },
            "ep_context": [] if found is None else list(map(context_json, found.contexts)),
            "digest": None if found is None else found.digest,
            "entry": entry,
            "loads_here": {"verdict": self.loads_here.verdict, "reasons": _notes(self.loads_here.reasons)},
            "notes": [] if found is None else _notes(found.notes),
            "error": None
            if error is None
            else {"code": error.code, "exit_code": error.exit_code, "message": error.what, "fix": error.fix},
        }


def _notes(notes: tuple[Note, ...]) -> list[dict[str, str]]:
    return [note._asdict() for note in notes]


def inspect_file(
    path: str | os.PathLike[str], host: Host, storage: Storage | None, *, with_digest: bool = True
) -> Inspection:
    """Find out what a file is, whether it is stored, and whether it would load here. Changes nothing.

    Args:
        path: The file.
        host: What it would be loaded with.
        storage: The cache to look in; None for none.
        with_digest: Read the whole file for its digest, without which no entry is found.
    """
    path = Path(path)
    try:
        found = examine_file(path, with_digest=with_digest)
    except InvalidInputError as error:
        return Inspection(path, None, None, Loadability("no", (Note("unreadable", error.what),)), error)
    record = None if storage is None or found.plan_digest is None else _entry(storage, found.plan_digest)
    loaded = () if storage is None or record is None else _loaded(storage, record, host)
    return Inspection(path, found, record, judge_file(found, host, loaded))


def _entry(storage: Storage, digest: str) -> EntryRecord | None:
    entries = storage.registry.entries_of(digest)
    return max(entries, key=lambda record: record.created_at, default=None)


def _loaded(storage: Storage, record: EntryRecord, host: Host) -> tuple[Note, ...]:
    """Return what is on record of loading exactly these bytes on this GPU, under this driver, by this TensorRT."""
    device = host.device
    toolchain = host.finding(record.backend).toolchain
    if device is None or toolchain is None or toolchain.version != record.tensorrt_version:
        return ()
    asked = (record.digest, device.device_class, f"{record.backend} {record.tensorrt_version}", driver_of(device))
    load: LoadRecord | None = storage.registry.find_load(*asked)
    if load is None:
        return ()
    why = "" if load.outcome == "loaded" else f": {load.reason.splitlines()[0]}"
    return (
        Note(load.outcome, f"TensorRT {_DONE[load.outcome]} it on {device.name} at {load.at:%Y-%m-%d %H:%M} UTC{why}"),
    )


_DONE = {"loaded": "loaded", "refused": "refused", "bad": "found fault with"}
