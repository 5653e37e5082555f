"""Rows for a registry, made from a letter: everything about ``a`` differs from everything about ``b``."""

from __future__ import annotations

import datetime as dt
from typing import Any

import blake3
import sqlalchemy as sa

from enginecache.files.canonical import canonical_json
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import BuildRecord, EntryRecord, LoadRecord, Standing
from enginecache.storage.registry.tables import loads

EPOCH = dt.datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=dt.timezone.utc)


def hex_of(text: str) -> str:
    return blake3.blake3(text.encode()).hexdigest()


def fields_of(name: str, **model: str) -> dict[str, Any]:
    return {"model": {"structure": hex_of(f"structure {name}"), "weights": hex_of(f"weights {name}"), **model}}


def attempt(name: str, number: int = 1, **values: Any) -> BuildRecord:
    """The ``number``-th attempt at the key of ``name``."""
    given = {"state": "running", "started_at": EPOCH + dt.timedelta(seconds=number), "host": "here", "pid": 7, **values}
    return BuildRecord(id=hex_of(f"build {name} {number}")[:32], key=hex_of(f"key {name}"), **given)


def entry(name: str, number: int = 1, **values: Any) -> EntryRecord:
    """Return the publication of the ``number``-th attempt at the key of ``name``."""
    given: dict[str, Any] = {
        "key": hex_of(f"key {name}"),
        "key_json": canonical_json(fields_of(name)),
        "key_version": 1,
        "model_digest": hex_of(f"model {name}"),
        "model_name": f"{name}.onnx",
        "digest": hex_of(f"blob {name} {number}"),
        "size_bytes": 1000,
        "backend": "tensorrt-rtx",
        "tensorrt_version": "1.7.1.116",
        "compute_capabilities": ("8.9", "12.0"),
        "device_name": None,
        "driver_version": None,
        "build_id": attempt(name, number).id,
        "build_seconds": 2.5,
        "created_at": EPOCH + dt.timedelta(minutes=number),
        **values,
    }
    return EntryRecord(**given)


def standing(record: EntryRecord, last_used_at: dt.datetime) -> Standing:
    """Return the properties of an entry that eviction weighs."""
    values = {name: getattr(record, name) for name in Standing._fields if name != "last_used_at"}
    return Standing(last_used_at=last_used_at, **values)


def loads_of(registry: Registry, digest: str) -> list[LoadRecord]:
    """Return the recorded results of loading a blob, latest first."""
    chosen = sa.select(loads).where(loads.c.digest == digest).order_by(loads.c.at.desc(), loads.c.device)
    with registry._database.reading() as connection:
        return [LoadRecord(**row._mapping) for row in connection.execute(chosen)]


def publish(registry: Registry, name: str, number: int = 1, **values: Any) -> EntryRecord:
    """Record an attempt and publish its entry."""
    record = entry(name, number, **values)
    registry.start_build(attempt(name, number))
    registry.publish(record)
    return record


def check_of(digest: str, **values: object) -> dict[str, object]:
    """The result of a check of a plan, as plain JSON values."""
    found = {"verdict": "passed", "scope": "engine", "digest": digest, "reference": "onnxruntime 1.32.0", "reason": ""}
    return {**found, "checked_at": "2026-12-01T05:00:00Z", "tolerance": 0.05, "device": None, "outputs": [], **values}
