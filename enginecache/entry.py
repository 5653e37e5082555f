"""What a caller gets: an engine, and how it came about."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from enginecache.matching import Difference
from enginecache.model import ModelSource
from enginecache.registry.base import EntryRecord

SCHEMA = 1
"""Version of the JSON record; changes within it are additive."""

Outcome = Literal["hit", "built", "compatible"]


class Reason(NamedTuple):
    """Why something came out as it did.

    Attributes:
        code: Stable, for programs.
        text: For people.
    """

    code: str
    text: str


@dataclass(frozen=True)
class Entry:
    """A stored engine that serves the request.

    Attributes:
        outcome: ``hit``, or ``built`` just now by this call.
        path: The plan's file: pure plan bytes, never changed; any standard TensorRT loader reads it.
        record: Its row.
        source: The model that was asked for.
        elapsed_seconds: How long the call took.
        reasons: Why this outcome, and warnings.
    """

    outcome: Outcome
    path: Path
    record: EntryRecord
    source: ModelSource
    elapsed_seconds: float
    reasons: tuple[Reason, ...]

    @property
    def key(self) -> str:
        """What was asked, 64 hex characters."""
        return self.record.key

    @property
    def digest(self) -> str:
        """What was stored: BLAKE3 of the plan, 64 hex characters."""
        return self.record.digest

    @property
    def size_bytes(self) -> int:
        """Size of the plan."""
        return self.record.size_bytes

    def to_json(self) -> dict[str, Any]:
        """The record of ``get --json``, as plain JSON values."""
        model = {"path": None if self.source.path is None else str(self.source.path)}
        return {
            "schema": SCHEMA,
            "outcome": self.outcome,
            **record_json(self.record, self.path),
            "model": {**model, "digest": self.record.model_digest, "name": self.source.name},
            "elapsed_seconds": self.elapsed_seconds,
            "reasons": reasons_json(self.reasons),
        }


def record_json(record: EntryRecord, path: Path) -> dict[str, Any]:
    """What every JSON record says of a stored engine."""
    fields = record.fields
    return {
        "key": record.key,
        "digest": record.digest,
        "path": str(path),
        "size_bytes": record.size_bytes,
        "backend": record.backend,
        "tensorrt_version": record.tensorrt_version,
        "compute_capabilities": list(record.compute_capabilities),
        "device": record.device_name,
        "model": {"path": None, "digest": record.model_digest, "name": record.model_name},
        "profiles": [
            {name: {corner: shapes[corner] for corner in ("min", "opt", "max")} for name, shapes in profile.items()}
            for profile in fields.get("profiles", [])
        ],
        "options": fields.get("options", {}),
        "build_seconds": record.build_seconds,
        "created_at": time_json(record.created_at),
    }


def time_json(time: dt.datetime | None) -> str | None:
    """RFC 3339, UTC."""
    return None if time is None else time.astimezone(dt.timezone.utc).isoformat().replace("+00:00", "Z")


def reasons_json(reasons: Sequence[Reason]) -> list[dict[str, str]]:
    """Reasons as plain JSON values."""
    return [{"code": reason.code, "text": reason.text} for reason in reasons]


@dataclass(frozen=True)
class Neighbour:
    """A stored engine that does not serve the request, and why not.

    Attributes:
        record: Its row.
        differing: Every field that differs.
    """

    record: EntryRecord
    differing: tuple[Difference, ...]


@dataclass(frozen=True)
class Explanation:
    """What ``get`` would do now, and why.

    Attributes:
        verdict: ``hit`` or ``miss``.
        key: The key's digest.
        fields: The key's fields, plain JSON values.
        reasons: Why.
        entry: The row that serves the request, or None.
        neighbours: The nearest stored engines of a miss, nearest first.
        failure: Why the last attempt at this key failed, or an empty text.
        failure_log: Its log, or None.
    """

    verdict: Literal["hit", "miss"]
    key: str
    fields: dict[str, Any]
    reasons: tuple[Reason, ...]
    entry: EntryRecord | None
    neighbours: tuple[Neighbour, ...]
    failure: str = ""
    failure_log: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The record of ``explain --json``, as plain JSON values."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "key": self.key,
            "fields": self.fields,
            "reasons": reasons_json(self.reasons),
            "digest": None if self.entry is None else self.entry.digest,
            "nearest": [
                {
                    "key": neighbour.record.key,
                    "model": neighbour.record.model_name,
                    "differing": [
                        {"field": d.field, "asked": d.asked, "stored": d.stored} for d in neighbour.differing
                    ],
                }
                for neighbour in self.neighbours
            ],
            "last_failure": self.failure or None,
            "last_failure_log": None if self.failure_log is None else str(self.failure_log),
        }
