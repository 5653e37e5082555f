"""Which fields of two keys differ, and which stored key is nearest to an asked one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from enginecache.key import Fields, canonical_json

_ABSENT = "(absent)"

_WEIGHTS = {"model": 100, "toolchain": 10, "target": 10, "profiles": 3, "options": 3}
"""How far one differing field of a group moves two keys apart: another model is farther than any other difference."""

_NAMES = {
    "model.structure": "the graph differs (nodes, attributes, names or static shapes)",
    "model.weights": "the weights differ (contents of initializers or constants)",
}


@dataclass(frozen=True)
class Difference:
    """One field that differs.

    Attributes:
        field: Its name, dotted: ``options.workspace_bytes``.
        asked: Value in the request; plain JSON.
        stored: Value in the stored entry; plain JSON.
    """

    field: str
    asked: Any
    stored: Any

    def __str__(self) -> str:
        if self.field in _NAMES:
            return f"{self.field}: {_NAMES[self.field]}"
        return f"{self.field}: asked {canonical_json(self.asked)}, stored {canonical_json(self.stored)}"


def differences(asked: Fields, stored: Fields) -> tuple[Difference, ...]:
    """Every field in which two keys differ, in the order of the fields' names.

    A field that only one of them has differs too: a stored key may come from another release.
    """
    left, right = _flatten(asked), _flatten(stored)
    return tuple(
        Difference(name, left.get(name, _ABSENT), right.get(name, _ABSENT))
        for name in sorted(left.keys() | right.keys())
        if left.get(name, _ABSENT) != right.get(name, _ABSENT)
    )


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        elif name == "profiles":
            for index, profile in enumerate(value):
                # One field an input: its three shapes are one thing to the reader.
                flat.update({f"profiles[{index}].{entry}": shapes for entry, shapes in profile.items()})
                if not profile:
                    flat[f"profiles[{index}]"] = profile
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def distance(differing: Iterable[Difference]) -> int:
    """How far apart two keys are; 0 for none."""
    total = 0
    for difference in differing:
        group = difference.field.split(".", 1)[0].split("[", 1)[0]
        total += _WEIGHTS.get(group, 1)
    return total


Candidate = TypeVar("Candidate")


def nearest(
    asked: Fields, stored: Iterable[tuple[Candidate, Fields]], limit: int = 3
) -> list[tuple[Candidate, tuple[Difference, ...]]]:
    """The stored keys that are least apart from ``asked``, nearest first.

    A key that shares neither graph nor weights with the request is no neighbour and is left out.
    """
    ranked = []
    for order, (candidate, fields) in enumerate(stored):
        differing = differences(asked, fields)
        if {"model.structure", "model.weights"} <= {difference.field for difference in differing}:
            continue
        ranked.append((distance(differing), order, candidate, differing))
    ranked.sort(key=lambda row: row[:2])
    return [(candidate, differing) for _, _, candidate, differing in ranked[:limit]]
