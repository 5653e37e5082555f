"""Optimization profiles: from flags or Python values to one canonical form.

A dynamic input needs a range of shapes in every profile; a shape tensor (an integer input whose *values* TensorRT reads
while building) needs a range of values. Source: NVIDIA, "Working with Dynamic Shapes", TensorRT 8.6 to 11.4.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from enginecache.errors import ProfileError
from enginecache.model import ModelInput
from enginecache.shapes import Bounds, parse_dim, parse_shapes, quote_shape, shape_flags

MAX_DIMENSION = 2**31 - 1
"""Largest size of one dimension and largest volume of one tensor. Source: NVIDIA, Dims, TensorRT 8.6 to 11.4."""

Shapes = Mapping[str, tuple[int, ...]]
Corners = tuple[tuple[int, ...], ...]
"""Minimum, optimum and maximum of one input."""


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

    def __str__(self) -> str:
        return " ".join(f"{name}={format_range(shapes)}" for name, shapes in self.ranges)


@dataclass(frozen=True)
class ProfileRequest:
    """Shapes as the caller gave them, before the model is known.

    Attributes:
        shapes: One mapping a profile, from input name to (minimum, optimum, maximum).
        dims: From the name of an ONNX dimension to (minimum, optimum, maximum); fills, in every profile, the inputs
            that ``shapes`` leaves out.
    """

    shapes: tuple[Mapping[str, Corners], ...] = ()
    dims: Mapping[str, Bounds] = field(default_factory=dict)

    @classmethod
    def from_flags(
        cls,
        min_shapes: Sequence[str] = (),
        opt_shapes: Sequence[str] = (),
        max_shapes: Sequence[str] = (),
        dims: Sequence[str] = (),
    ) -> ProfileRequest:
        """From the texts of ``--min-shapes``, ``--opt-shapes``, ``--max-shapes`` and ``--dim``.

        As in trtexec, ``--opt-shapes`` alone fixes the shapes, otherwise all three are needed. The n-th of each makes
        the n-th profile.

        Raises:
            ProfileError: A text cannot be read, or the three do not belong together.
        """
        opt = [parse_shapes(text) for text in opt_shapes]
        low = [parse_shapes(text) for text in min_shapes] if min_shapes or max_shapes else opt
        high = [parse_shapes(text) for text in max_shapes] if min_shapes or max_shapes else opt
        if not len(low) == len(opt) == len(high):
            message = (
                f"{len(low)} --min-shapes, {len(opt)} --opt-shapes and {len(high)} --max-shapes do not make profiles"
            )
            raise ProfileError(message, "Give the three together, once for each profile, or --opt-shapes alone.")
        profiles = tuple(_join(*triple) for triple in zip(low, opt, high, strict=True))
        named: dict[str, Bounds] = {}
        for text in dims:
            name, bounds = parse_dim(text)
            if named.setdefault(name, bounds) != bounds:
                raise ProfileError(f"--dim {name} is given twice with different sizes", "Give it once.")
        return cls(profiles, named)


def _join(low: Shapes, opt: Shapes, high: Shapes) -> dict[str, Corners]:
    for name in {*low, *opt, *high}:
        for flag, shapes in (("--min-shapes", low), ("--opt-shapes", opt), ("--max-shapes", high)):
            if name not in shapes:
                message = f"input {name!r} has no shape in {flag}"
                raise ProfileError(message, f"Add {quote_shape(name, (opt.get(name) or low.get(name, ())))} to {flag}.")
    return {name: (low[name], opt[name], high[name]) for name in opt}


def resolve_profiles(inputs: Sequence[ModelInput], request: ProfileRequest) -> tuple[Profile, ...]:
    """The canonical profiles of ``request`` for a model with ``inputs``.

    A static model without shape tensors normalises to no profile, whether its shapes were spelled out or not.

    Raises:
        ProfileError: An unknown input or dimension, a rank that differs, minimum > optimum or optimum > maximum, a
            static dimension that the request changes, or a dynamic input without shapes. The fix names every input
            and the flags to add.
    """
    known = {entry.name: entry for entry in inputs}
    for shapes in request.shapes:
        for name in shapes:
            if name not in known:
                message = f"the model has no input {name!r}"
                raise ProfileError(message, describe_inputs(inputs))
    _check_dims_exist(inputs, request.dims)
    wanted: Iterable[Mapping[str, Corners]] = request.shapes or ({},)
    profiles = tuple(_resolve_one(inputs, shapes, request.dims) for shapes in wanted)
    if not any(profile.ranges for profile in profiles):
        return ()
    return profiles


def _check_dims_exist(inputs: Sequence[ModelInput], dims: Mapping[str, Bounds]) -> None:
    names = {dim for entry in inputs for dim in entry.dims if isinstance(dim, str)}
    for name, bounds in dims.items():
        if name not in names:
            have = ", ".join(sorted(names)) or "none"
            message = f"the model has no dynamic dimension {name!r}; its named dimensions: {have}"
            raise ProfileError(message, describe_inputs(inputs))
        _check_order(f"dimension {name!r}", bounds[:1], bounds[1:2], bounds[2:])
        if bounds[0] < 0:
            raise ProfileError(f"dimension {name!r} cannot be negative", "Give sizes of 0 or more.")


def _resolve_one(inputs: Sequence[ModelInput], shapes: Mapping[str, Corners], dims: Mapping[str, Bounds]) -> Profile:
    ranges: dict[str, ShapeRange] = {}
    for entry in inputs:
        given = shapes.get(entry.name)
        if given is not None:
            _check_agreement(entry, given, dims)
            found = _range_from_shapes(entry, given)
        elif entry.is_static:
            continue
        else:
            found = _range_from_dims(entry, dims)
        if found is None:
            if given is None:
                message = f"input {entry.name!r} has dynamic dimensions and no shapes"
                raise ProfileError(message, describe_inputs(inputs))
            continue
        ranges[entry.name] = found
    return Profile(tuple(sorted(ranges.items())))


def _check_agreement(entry: ModelInput, given: Corners, dims: Mapping[str, Bounds]) -> None:
    """Shapes and dims may both speak of one dimension, if they say the same."""
    for shape, index in zip(given, range(3), strict=False):
        for size, dim in zip(shape, entry.dims, strict=False):
            if isinstance(dim, str) and dim in dims and dims[dim][index] != size:
                message = f"--dim {dim} says {dims[dim][index]} where the shapes of input {entry.name!r} say {size}"
                raise ProfileError(message, "Leave one of the two out, or make them agree.")


def _range_from_shapes(entry: ModelInput, given: Corners) -> ShapeRange | None:
    low, opt, high = given
    is_spelled_out = low == opt == high == entry.dims
    # With dims of (1,) one number may be the shape or the value; the shape is static, so only the value says anything.
    if entry.can_be_shape_tensor and (not is_spelled_out or entry.dims == (1,)):
        count = math.prod(example(entry))
        if any(len(values) != count for values in given):
            message = f"input {entry.name!r} may be a shape tensor of {count} values, and the flags give other numbers"
            raise ProfileError(message, f"Give {count} values, such as {quote_shape(entry.name, (1,) * count)}.")
        _check_order(f"input {entry.name!r}", low, opt, high)
        return ShapeRange(low, opt, high, is_values=True)
    for shape in given:
        _check_shape(entry, shape)
    _check_order(f"input {entry.name!r}", low, opt, high)
    return None if entry.is_static else ShapeRange(low, opt, high)


def _check_shape(entry: ModelInput, shape: tuple[int, ...]) -> None:
    if len(shape) != len(entry.dims):
        message = f"input {entry.name!r} has rank {len(entry.dims)} ({entry}), and the shape given has {len(shape)}"
        raise ProfileError(message, f"Give {len(entry.dims)} sizes, such as {quote_shape(entry.name, example(entry))}.")
    for size, dim in zip(shape, entry.dims, strict=True):
        if isinstance(dim, int) and size != dim:
            message = f"input {entry.name!r} ({entry}) has a static size of {dim} where the shape given has {size}"
            raise ProfileError(message, f"Keep static sizes: {quote_shape(entry.name, example(entry))}.")
        if not 0 <= size <= MAX_DIMENSION:
            message = f"a size of {size} for input {entry.name!r} is out of range"
            raise ProfileError(message, f"Sizes are from 0 to {MAX_DIMENSION}.")


def _check_order(what: str, low: tuple[int, ...], opt: tuple[int, ...], high: tuple[int, ...]) -> None:
    for small, middle, large in zip(low, opt, high, strict=True):
        if not small <= middle <= large:
            message = f"{what}: minimum {small}, optimum {middle}, maximum {large} are not in order"
            raise ProfileError(message, "Give minimum <= optimum <= maximum.")
        if large > MAX_DIMENSION:
            raise ProfileError(f"{what}: {large} is out of range", f"Sizes are at most {MAX_DIMENSION}.")


def _range_from_dims(entry: ModelInput, dims: Mapping[str, Bounds]) -> ShapeRange | None:
    corners: list[tuple[int, ...]] = []
    for index in range(3):
        shape: list[int] = []
        for dim in entry.dims:
            if isinstance(dim, int):
                shape.append(dim)
            elif dim is not None and dim in dims:
                shape.append(dims[dim][index])
            else:
                return None
        corners.append(tuple(shape))
    return ShapeRange(corners[0], corners[1], corners[2])


def example(entry: ModelInput, size: int = 1) -> tuple[int, ...]:
    """A shape of ``entry`` with ``size`` for each dynamic dimension."""
    return tuple(dim if isinstance(dim, int) else size for dim in entry.dims)


def format_range(shapes: ShapeRange) -> str:
    """A range for people: ``1x3x32x32..32x3x32x32..64x3x32x32``."""
    corners = (shapes.minimum, shapes.optimum, shapes.maximum)
    return "..".join("x".join(str(size) for size in corner) for corner in corners)


def describe_inputs(inputs: Sequence[ModelInput]) -> str:
    """The model's inputs with their dimensions, and the exact flags that a dynamic model needs."""
    lines = ["The model's inputs:"]
    lines += [f"  {entry} {entry.dtype}{'' if entry.is_static else '  (dynamic)'}" for entry in inputs]
    dynamic = [entry for entry in inputs if not entry.is_static]
    if not dynamic:
        lines.append("All are static: no shapes are needed.")
        return "\n".join(lines)
    names = list(dict.fromkeys(dim for entry in dynamic for dim in entry.dims if isinstance(dim, str)))
    unnamed = [entry for entry in dynamic if None in entry.dims]
    lines.append("Add (with the sizes that you serve):")
    dim_flags = " ".join(f"--dim {shlex.quote(f'{name}=1:8:32')}" for name in names)
    if not unnamed:
        lines.append(f"  {dim_flags}")
        lines.append("or:")
    lines.append(
        "  " + shape_flags({entry.name: tuple(example(entry, size) for size in (1, 8, 32)) for entry in dynamic})
    )
    return "\n".join(lines)
