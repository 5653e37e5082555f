"""Canonical JSON: exactly one text for each value, and its digest."""

from __future__ import annotations

import json
from typing import Any

import blake3

Fields = dict[str, Any]
"""Plain JSON values by name."""


def canonical_json(fields: Fields) -> str:
    """Return canonical JSON: sorted keys, no spaces, ASCII only."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_digest(version: int, text: str) -> str:
    """Return the name of a key of any version, from its canonical text."""
    return blake3.blake3(f"enginecache/key/v{version}\n{text}".encode("ascii")).hexdigest()
