"""Results of ``verify``, each finding with what a repair would do; and of ``doctor``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from enginecache.errors import EngineCacheError
from enginecache.maintenance.eviction import Garbage
from enginecache.storage.registry.rows import SetAside

Kind = Literal[
    "registry",
    "row",
    "dangling",
    "size",
    "digest",
    "unreadable",
    "mode",
    "owner",
    "record",
    "build",
    "orphan",
    "artefact",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: What sort of thing.
        subject: Key of the entry, id of the attempt, or path of the file.
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
class Kept:
    """What is there for a reason, and is no finding.

    Attributes:
        quarantined: Files of engines that were set aside.
        set_asides: Keys whose engine was found damaged, and was not built anew since.
        registries: Damaged registries that were set aside; only people delete them.
        failures: Keys whose last build failed in a way that would come again.
        unfinished_builds: Attempts under way, or whose process died within the grace time.
    """

    quarantined: int = 0
    set_asides: tuple[SetAside, ...] = ()
    registries: int = 0
    failures: int = 0
    unfinished_builds: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        listed = [
            {
                "key": one.key,
                "digest": one.digest,
                "model": one.model_name,
                "reason": one.reason,
                "at": one.at.isoformat(),
            }
            for one in self.set_asides
        ]
        return {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, "set_asides": listed}


@dataclass(frozen=True)
class Verification:
    """What a check found.

    Attributes:
        entries: Entries checked.
        findings: What is wrong.
        young_garbage: Files without a row, within their grace time: a publication may still be under way.
        kept: What is no finding.
    """

    entries: int
    findings: tuple[Finding, ...]
    young_garbage: tuple[Garbage, ...] = field(default=())
    kept: Kept = field(default=Kept())

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
            "kept": self.kept.to_json(),
        }


Repair = Callable[[], object]
"""Mends a finding; False, or an error, says that it did not."""

Found = Iterator[tuple[Finding, Repair]]


def settle(found: Iterable[tuple[Finding, Repair]], *, repair: bool) -> Iterator[Finding]:
    """The findings, each mended on the way where that is asked."""
    for finding, mend in found:
        yield dataclasses.replace(finding, is_repaired=repair and _is_mended(mend))


def _is_mended(mend: Repair) -> bool:
    try:
        return mend() is not False
    except (EngineCacheError, OSError):
        return False


Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One line of ``doctor``.

    Attributes:
        name: What.
        status: ``ok``; ``warning`` for what is missing and may not be needed; ``problem`` for what stops the cache.
        text: What was found.
        fix: What to do; empty where nothing is.
        exit_code: 0, or for a problem the exit code of its error.
        facts: What the text says, as plain JSON values.
    """

    name: str
    status: Status
    text: str
    fix: str = ""
    exit_code: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "text": self.text,
            "fix": self.fix,
            "facts": dict(self.facts),
        }
