"""Results of ``verify``, each finding with what a repair would do; and of ``doctor``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from enginecache.errors import EngineCacheError
from enginecache.maintenance.eviction import Orphan
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
        kind: Its kind.
        subject: Key of the entry, id of the attempt, or path of the file.
        text: A sentence that says what is wrong.
        repair: A phrase that says what ``--repair`` does about it.
        is_repaired: Whether it did.
    """

    kind: Kind
    subject: str
    text: str
    repair: str
    is_repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "text": self.text,
            "repair": self.repair,
            "repaired": self.is_repaired,
        }


@dataclass(frozen=True)
class Kept:
    """Files and rows that are there for a reason, and are not findings.

    Attributes:
        quarantined: Files of engines that were set aside.
        set_asides: Keys whose engine was found damaged, and was not built anew since.
        registries: Damaged registries that were set aside; only a person deletes them.
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
    """The result of a check.

    Attributes:
        entries: Entries checked.
        findings: The things that are wrong.
        young_orphans: Files without a row, within their grace time: a publication may still be under way.
        kept: Things that are not findings.
    """

    entries: int
    findings: tuple[Finding, ...]
    young_orphans: tuple[Orphan, ...] = field(default=())
    kept: Kept = field(default=Kept())

    @property
    def is_clean(self) -> bool:
        """True if nothing is wrong, or all of it was repaired."""
        return all(finding.is_repaired for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the record of ``verify --json``, as plain JSON values."""
        return {
            "schema": 1,
            "entries": self.entries,
            "clean": self.is_clean,
            "findings": [finding.to_json() for finding in self.findings],
            "garbage_in_grace": [
                {"path": str(item.path), "size_bytes": item.size_bytes, "what": item.what}
                for item in self.young_orphans
            ],
            "kept": self.kept.to_json(),
        }


Repair = Callable[[], object]
"""Repairs a finding; False, or an error, says that it did not."""

Found = Iterator[tuple[Finding, Repair]]


def settle(found: Iterable[tuple[Finding, Repair]], *, repair: bool) -> Iterator[Finding]:
    """Yield the findings, each repaired first if ``repair`` is true."""
    for finding, fix in found:
        yield dataclasses.replace(finding, is_repaired=repair and _is_repaired(fix))


def _is_repaired(fix: Repair) -> bool:
    try:
        return fix() is not False
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
        """Return plain JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "text": self.text,
            "fix": self.fix,
            "facts": dict(self.facts),
        }
