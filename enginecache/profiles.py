"""Optimization profiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeRange:
    """What one input may be.

    Attributes:
        minimum: Smallest shape; for a shape tensor, its smallest values.
        optimum: The one that TensorRT tunes for.
        maximum: Largest.
        is_values: Whether the numbers are the values of a shape tensor, not a shape.
    """

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]
    is_values: bool = False


@dataclass(frozen=True)
class Profile:
    """One optimization profile: a range for each dynamic input and each shape tensor.

    Attributes:
        ranges: Pairs of input name and range, sorted by name.
    """

    ranges: tuple[tuple[str, ShapeRange], ...]
