"""What one look found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

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
