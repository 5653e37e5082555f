"""Results of a call: an engine with how it came about, and an explanation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from enginecache.files.fingerprint import Fingerprint
from enginecache.files.units import time_json
from enginecache.key.matching import EXACT, WIDER_REACH, Reason, Verdict
from enginecache.key.options import PluginLibrary
from enginecache.model import ModelSource
from enginecache.storage.registry.rows import EntryRecord

if TYPE_CHECKING:
    from enginecache.pipeline.load import EngineLoader, TrialPolicy

SCHEMA = 1
"""Version of the JSON record; changes within it are additive."""

Outcome = Literal["hit", "built", "compatible"]
_PLAIN = ([EXACT.code], [WIDER_REACH])


@dataclass(frozen=True, repr=False)
class Entry:
    """A stored engine that serves the request. It is a path: ``open(entry, "rb")`` reads the plan.

    Attributes:
        outcome: ``hit``; ``built`` just now by this call; or ``compatible``: not what was asked, but it runs.
        path: The plan's file: pure plan bytes, never changed; any standard TensorRT loader reads it.
        record: Its row.
        source: The model that was asked for.
        requested_key: Key of what was asked, 64 hex characters; :attr:`key` is another where an engine of a wider reach
            serves, and where the outcome is ``compatible``.
        elapsed_seconds: How long the call took.
        reasons: Why this outcome, and warnings.
        plugins: The libraries of plugins that it was built with.
        loader: Returns what loads it.
        files: The model's files, each with the fingerprint that its digest was taken of; empty for model bytes.
        siblings: What a hit of a wider reach was chosen from; see :class:`enginecache.pipeline.lookup.Match`.
    """

    outcome: Outcome
    path: Path
    record: EntryRecord
    source: ModelSource
    requested_key: str
    elapsed_seconds: float
    reasons: tuple[Reason, ...]
    plugins: tuple[PluginLibrary, ...] = ()
    loader: Callable[[], EngineLoader] | None = field(default=None, repr=False, compare=False)
    siblings: str | None = field(default=None, repr=False, compare=False)
    files: tuple[tuple[str, Fingerprint], ...] = field(default=(), repr=False, compare=False)

    def load(self, *, trial: TrialPolicy = "auto", trusted: bool = False) -> Any:
        """Deserialize the engine in this process, on the CUDA device that is current. Builds nothing.

        Args:
            trial: As for :meth:`enginecache.EngineCache.load`, and so is ``trusted``.
            trusted: Whether a version-compatible plan may run its own host code in this process.

        Returns:
            The ``ICudaEngine`` of the flavour that built it.

        Raises:
            IntegrityError: The file no longer has its digest.
            NotCachedError: The file was deleted since the entry was handed out.
            LoadError: The plan is bad, and was set aside.
            LoadRefusedError: TensorRT does not load it for a reason outside it. The plan stays.
            ToolchainError: The flavour cannot be imported.
        """
        if self.loader is None:
            raise RuntimeError("this entry came without a loader; take one from EngineCache.get")
        return self.loader().load(self.record, self.path, plugins=self.plugins, trusted=trusted, trial=trial)

    def timed(self, elapsed_seconds: float) -> Entry:
        """Return the same entry for a call that took so long, in a fifth of the time of ``dataclasses.replace``."""
        entry = object.__new__(Entry)
        entry.__dict__.update(self.__dict__)
        entry.__dict__["elapsed_seconds"] = elapsed_seconds
        return entry

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Entry({self.outcome!r}, key={self.key[:12]!r}, path={str(self.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loader behind in an entry that goes to another process: it holds this process's registry."""
        return {**self.__dict__, "loader": None}

    @property
    def is_plain_hit(self) -> bool:
        """True for a hit without a warning, which may answer the same request again."""
        return self.outcome == "hit" and [reason.code for reason in self.reasons] in _PLAIN

    @property
    def key(self) -> str:
        """Key of the stored engine, 64 hex characters: what was asked when it was built."""
        return self.record.key

    @property
    def digest(self) -> str:
        """BLAKE3 digest of the plan, 64 hex characters."""
        return self.record.digest

    @property
    def size_bytes(self) -> int:
        """Return the size of the plan."""
        return self.record.size_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the record of ``get --json``, as plain JSON values."""
        model = {"path": None if self.source.path is None else str(self.source.path)}
        return {
            "schema": SCHEMA,
            "outcome": self.outcome,
            **record_json(self.record, self.path),
            "model": {**model, "digest": self.record.model_digest, "name": self.source.name},
            "requested_key": self.requested_key,
            "asked_key": self.requested_key,
            "elapsed_seconds": self.elapsed_seconds,
            "reasons": reasons_json(self.reasons),
        }


def record_json(record: EntryRecord, path: Path) -> dict[str, Any]:
    """Return the fields that every JSON record has for a stored engine."""
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
        "conversion": fields.get("conversion"),
        "timing_cache": record.timing_cache_digest,
        "adopted": record.is_adopted,
        "check": record.check,
        "build_seconds": record.build_seconds,
        "created_at": time_json(record.created_at),
    }


def reasons_json(reasons: Sequence[Reason]) -> list[dict[str, str]]:
    """Reasons as plain JSON values."""
    return [{"code": reason.code, "text": reason.text} for reason in reasons]


@dataclass(frozen=True)
class Candidate:
    """A stored engine of the model that was asked for, and how well it serves the request.

    Attributes:
        record: Its row.
        verdict: How well, and why.
    """

    record: EntryRecord
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "key": self.record.key,
            "model": self.record.model_name,
            "verdict": self.verdict.level,
            "reasons": reasons_json(self.verdict.reasons),
            "differing": [{"field": d.field, "asked": d.asked, "stored": d.stored} for d in self.verdict.differing],
        }


@dataclass(frozen=True)
class Explanation:
    """The outcome that ``get`` would have now, and why.

    Attributes:
        verdict: ``hit``, ``compatible`` or ``miss``.
        requested_key: Key of what was asked, 64 hex characters.
        fields: Its fields, plain JSON values.
        reasons: Why.
        entry: The row that serves the request, or None.
        candidates: Every stored engine of the model, best first, each with its verdict.
        failure: Why the last attempt at this key failed, or an empty text.
        failure_log: Its log, or None.
    """

    verdict: Literal["hit", "compatible", "miss"]
    requested_key: str
    fields: dict[str, Any]
    reasons: tuple[Reason, ...]
    entry: EntryRecord | None
    candidates: tuple[Candidate, ...]
    failure: str = ""
    failure_log: Path | None = None

    @property
    def key(self) -> str:
        """Key of the stored engine that serves the request; without one, that of the request."""
        return self.requested_key if self.entry is None else self.entry.key

    def to_json(self) -> dict[str, Any]:
        """Return the record of ``explain --json``, as plain JSON values."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "key": self.key,
            "requested_key": self.requested_key,
            "fields": self.fields,
            "reasons": reasons_json(self.reasons),
            "digest": None if self.entry is None else self.entry.digest,
            "check": None if self.entry is None else self.entry.check,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "last_failure": self.failure or None,
            "last_failure_log": None if self.failure_log is None else str(self.failure_log),
        }


def failed_check(record: EntryRecord) -> tuple[Reason, ...]:
    """Return a warning for an engine that failed its check. Cheap for the others: every hit asks."""
    if record.check_json is None or '"verdict":"failed"' not in record.check_json:
        return ()
    check = record.check
    if check is None:
        return ()
    return (Reason("warning", f"this engine failed a check on {check['checked_at'][:10]}: {check['reason']}"),)
