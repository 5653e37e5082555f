"""Compose the shape flags that an error message suggests for a model's inputs.

Sizes that the user gave are kept. A size that nobody can guess becomes a placeholder, not a number: TensorRT refuses a
detector for images of 8 x 8 after some seconds. The caller parses and resolves the flags before it prints them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from enginecache.errors import printable
from enginecache.key.shape_syntax import (
    Bounds,
    Corners,
    Size,
    Triple,
    dim_flag,
    is_writable_dim,
    is_writable_input,
    shape_flags,
)
from enginecache.model import ModelInput

BATCH: Bounds = (1, 8, 32)
_PLACEHOLDERS: Triple = ("MIN", "OPT", "MAX")

_BATCH_NAME = re.compile(r"n|b|bs|.*batch.*", re.IGNORECASE)
_OTHER_NAME = re.compile(
    r".*(?:seq|len|time|token|height|width|depth|num|count|point|frame|channel|size)", re.IGNORECASE
)


def compose(
    inputs: Sequence[ModelInput],
    given: Sequence[Mapping[str, Corners]],
    dims: Mapping[str, Bounds],
    values: Mapping[str, int],
    unknown: Triple = _PLACEHOLDERS,
) -> tuple[str, ...]:
    """Return the command lines that give every input its sizes: with ``--dim`` where that is possible, and with shapes.

    Args:
        inputs: The model's inputs.
        given: One mapping a profile, from input name to (minimum, optimum, maximum); kept.
        dims: From the name of a dimension to its sizes; kept.
        values: From the names of shape tensors to the number of their values.
        unknown: Placeholders for the three sizes that nobody can guess.
    """
    plan = _Plan(inputs, given or ({},), dims, values, unknown)
    return tuple(filter(None, (plan.with_dims(), plan.with_shapes())))


class _Plan:
    """Composer of the two kinds of flags; takes the arguments of :func:`compose`."""

    def __init__(
        self,
        inputs: Sequence[ModelInput],
        given: Sequence[Mapping[str, Corners]],
        dims: Mapping[str, Bounds],
        values: Mapping[str, int],
        unknown: Triple,
    ) -> None:
        self.dynamic = [entry for entry in inputs if not entry.is_static]
        self.inputs, self.given, self.dims, self.values, self.unknown = inputs, given, dims, values, unknown

    def with_dims(self) -> str:
        """Return the given flags and a ``--dim`` for each dimension without a size; empty if that is impossible."""
        missing = [entry for entry in self.dynamic if any(entry.name not in shapes for shapes in self.given)]
        names = dict.fromkeys(dim for entry in missing for dim in entry.dims if not isinstance(dim, int))
        if not names or not all(name is not None and is_writable_dim(name) for name in names):
            return ""
        if any(name not in shapes for name in self.values for shapes in self.given):
            return ""
        sizes: dict[str, Triple] = dict(self.dims)
        for name in filter(None, names):
            found = {self._known(shapes).get(name) for shapes in self.given}
            if len(found) > 1:
                return ""  # one --dim counts for every profile
            sizes.setdefault(name, found.pop() or self._guess(name, 0, 0))
        shapes = [shape_flags(profile) for profile in self.given if profile]
        return " ".join([*shapes, *(dim_flag(name, bounds) for name, bounds in sizes.items())])

    def with_shapes(self) -> str:
        """Return the three shape flags for each profile, with every input; empty where a name cannot be written."""
        lines = []
        for shapes in self.given:
            corners: dict[str, tuple[tuple[Size, ...], ...]] = {}
            for entry in self.inputs:
                if entry.name in shapes:
                    corners[entry.name] = shapes[entry.name]
                elif entry.name in self.values:
                    corners[entry.name] = tuple((size,) * self.values[entry.name] for size in self.unknown)
                elif not entry.is_static:
                    corners[entry.name] = self._corners(entry, self._known(shapes))
            if not all(map(is_writable_input, corners)):
                return ""
            lines.append(shape_flags(corners) if corners else "")
        return " ".join(lines)

    def _known(self, shapes: Mapping[str, Corners]) -> dict[str, Triple]:
        """Return the sizes of named dimensions, from ``--dim`` and from the shapes of other inputs in the profile."""
        known: dict[str, Triple] = dict(self.dims)
        for entry in self.dynamic:
            for index, dim in enumerate(entry.dims):
                if isinstance(dim, str) and entry.name in shapes:
                    low, opt, high = (shape[index] for shape in shapes[entry.name])
                    known.setdefault(dim, (low, opt, high))
        return known

    def _corners(self, entry: ModelInput, known: Mapping[str, Triple]) -> tuple[tuple[Size, ...], ...]:
        sizes: list[Triple] = []
        for index, dim in enumerate(entry.dims):
            if isinstance(dim, int):
                sizes.append((dim, dim, dim))
            else:
                sizes.append(known.get(dim or "") or self._guess(dim, index, len(entry.dims)))
        return tuple(tuple(size[corner] for size in sizes) for corner in range(3))

    def _guess(self, dim: str | None, index: int, rank: int) -> Triple:
        """Return numbers for a batch dimension, which most graphs accept in any size; otherwise placeholders."""
        if dim is None:
            return BATCH if index == 0 and rank > 1 else self.unknown
        places = [(i, len(entry.dims)) for entry in self.dynamic for i, d in enumerate(entry.dims) if d == dim]
        if any(place != 0 for place, _ in places):
            return self.unknown
        if _BATCH_NAME.fullmatch(dim):
            return BATCH
        is_other = _OTHER_NAME.match(dim) is not None or any(rank == 1 for _, rank in places)
        return self.unknown if is_other else BATCH


def flags_of(line: str) -> dict[str, list[str]]:
    """Split a command line as a shell does, into the keywords of ``ProfileRequest.from_flags``."""
    found: dict[str, list[str]] = {"min_shapes": [], "opt_shapes": [], "max_shapes": [], "dims": []}
    words = shlex.split(line)
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = "dims" if flag == "--dim" else flag.removeprefix("--").replace("-", "_")
        found[name].append(value)
    return found


def render(
    inputs: Sequence[ModelInput],
    lines: Sequence[str],
    values: Iterable[str],
    *,
    is_partial: bool = False,
    has_placeholders: bool = False,
) -> str:
    """Return the text of a ``fix``: the inputs with their dimensions, and the flags to give."""
    shown = ["The model's inputs:"]
    tensors = set(values)
    for entry in inputs:
        note = "  (dynamic)" if not entry.is_static else "  (values)" if entry.name in tensors else ""
        shown.append(f"  {printable(entry)} {entry.dtype}{note}")
    if all(entry.is_static for entry in inputs) and not tensors:
        return "\n".join([*shown, "All are static: no shapes are needed."])
    if not lines:
        shown.append(
            "Their names cannot be written on a command line: give the shapes from Python (profiles=[...]), or rename "
            "inputs and dimensions in the ONNX file."
        )
        return "\n".join(shown)
    shown.append(f"{'Give' if is_partial else 'Add'} (with the sizes that you serve):")
    shown.append("\nor:\n".join(f"  {line}" for line in lines))
    if has_placeholders:
        one_size = " One size fixes a dimension: --dim NAME=SIZE." if any("--dim" in line for line in lines) else ""
        shown.append(f"MIN, OPT and MAX stand for sizes of your own: smallest, usual and largest.{one_size}")
    repeated = sorted({dim for e in inputs for dim in e.dims if isinstance(dim, str) and e.dims.count(dim) > 1})
    shown += [rename(name) for name in repeated]
    return "\n".join(shown)


def rename(name: str) -> str:
    """Return the advice for a dimension name that is used with several sizes."""
    return (
        f"TensorRT takes dimensions of one name for equal: give every dimension {name!r} the same sizes. Where they "
        "are not the same, give each its own name: export the model again (dynamic_axes or dynamic_shapes), or "
        "set dim_param in the ONNX file."
    )
