"""Optimization profiles: canonical form of the shapes that flags or Python values give.

A dynamic input needs a range of shapes in every profile; a shape tensor (an integer input whose *values* TensorRT reads
while building) needs a range of values. Source: NVIDIA, "Working with Dynamic Shapes", TensorRT 8.6 to 11.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from enginecache.errors import ProfileError
from enginecache.key.advice import compose, flags_of, rename, render
from enginecache.key.shape_syntax import Bounds, Corners, parse_dim, parse_shapes, quote_shape
from enginecache.model import ModelInput

_SIZE_0 = (
    "TensorRT takes a size of 0 as it stands. If it was meant to be dynamic, export the model with a name for the "
    "dimension, or set dim_param in the ONNX file."
)

_MAX_DIMENSION = 2**31 - 1
"""Largest size of one dimension and largest volume of one tensor. Source: NVIDIA, Dims, TensorRT 8.6 to 11.4."""

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ShapeRange:
    """Allowed range of one input.

    Attributes:
        minimum: Smallest shape; for a shape tensor, its smallest values.
        optimum: The shape that TensorRT tunes for.
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
    """Shapes as the caller gave them, before they are compared with the model.

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
        """Parse the values of ``--min-shapes``, ``--opt-shapes``, ``--max-shapes`` and ``--dim``.

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


def _join(low: _Shapes, opt: _Shapes, high: _Shapes) -> dict[str, Corners]:
    flags = {"--min-shapes": low, "--opt-shapes": opt, "--max-shapes": high}
    for name in {**low, **opt, **high}:
        without = [flag for flag, shapes in flags.items() if name not in shapes]
        if without:
            shape = next(shapes[name] for shapes in (opt, low, high) if name in shapes)
            message = f"input {name!r} has no shape in {' and '.join(without)}"
            fix = f"Add {quote_shape(name, shape)}, or another shape, to {' and '.join(without)}."
            raise ProfileError(message, fix)
    return {name: (low[name], opt[name], high[name]) for name in opt}


class _Unfit(Exception):  # noqa: N818  # never leaves this module
    """Sizes that do not fit the model: the message, and the sentence before the suggested flags."""

    def __init__(self, what: str, lead: str = "") -> None:
        super().__init__(what, lead)
        self.what, self.lead = what, lead


def resolve_profiles(inputs: Sequence[ModelInput], request: ProfileRequest) -> tuple[Profile, ...]:
    """Return the canonical profiles of ``request`` for a model with ``inputs``.

    A static model without shape tensors normalises to no profile, whether its shapes were spelled out or not.

    Raises:
        ProfileError: An unknown input or dimension, a rank that differs, minimum > optimum or optimum > maximum, a
            static dimension that the request changes, dimensions of one name with different sizes, or a dynamic input
            without shapes. The fix names every input and the flags to give; those have been tried.
    """
    try:
        return _resolve(inputs, request)
    except _Unfit as unfit:
        advice = describe_inputs(inputs, request)
        raise ProfileError(unfit.what, f"{unfit.lead}\n{advice}" if unfit.lead else advice) from None


def _resolve(inputs: Sequence[ModelInput], request: ProfileRequest) -> tuple[Profile, ...]:
    known = {entry.name for entry in inputs}
    for name in (name for shapes in request.shapes for name in shapes):
        if name not in known:
            raise _Unfit(f"the model has no input {name!r}")
    _check_dims_exist(inputs, request)
    wanted: Iterable[Mapping[str, Corners]] = request.shapes or ({},)
    profiles = tuple(_resolve_one(inputs, shapes, request) for shapes in wanted)
    if not any(profile.ranges for profile in profiles):
        return ()
    return profiles


def _check_dims_exist(inputs: Sequence[ModelInput], request: ProfileRequest) -> None:
    names = {dim for entry in inputs for dim in entry.dims if isinstance(dim, str)}
    for name, bounds in request.dims.items():
        if name not in names:
            have = ", ".join(sorted(names)) or "none"
            raise _Unfit(f"the model has no dynamic dimension {name!r}; its named dimensions: {have}")
        _check_bounds(name, bounds)


def _check_bounds(name: str, bounds: Bounds) -> None:
    _check_order(f"dimension {name!r}", bounds[:1], bounds[1:2], bounds[2:])
    if bounds[0] < 0:
        raise ProfileError(f"dimension {name!r} cannot be negative", "Give sizes of 0 or more.")


def _resolve_one(inputs: Sequence[ModelInput], shapes: Mapping[str, Corners], request: ProfileRequest) -> Profile:
    ranges: dict[str, ShapeRange] = {}
    missing = []
    for entry in inputs:
        given = shapes.get(entry.name)
        if given is not None:
            _check_agreement(entry, given, request.dims)
            found = _range_from_shapes(entry, given)
        elif entry.is_static:
            continue
        else:
            found = _range_from_dims(entry, request.dims)
            missing += [entry] if found is None else []
        if found is not None:
            ranges[entry.name] = found
    if missing:
        raise _Unfit(_name_missing(missing, request))
    _check_shared_names(inputs, ranges)
    return Profile(tuple(sorted(ranges.items())))


def _name_missing(missing: Sequence[ModelInput], request: ProfileRequest) -> str:
    """Say which sizes are missing: those of whole inputs, or of the dimensions that ``--dim`` left out."""
    if not request.dims:
        return f"input {missing[0].name!r} has dynamic dimensions and no shapes"
    unnamed = next((entry for entry in missing if None in entry.dims), None)
    if unnamed is not None:
        return f"input {unnamed.name!r} ({unnamed}) has a dynamic dimension without a name, which --dim cannot set"
    where: dict[str, list[str]] = {}
    for entry in missing:
        for dim in dict.fromkeys(entry.dims):
            if isinstance(dim, str) and dim not in request.dims:
                where.setdefault(dim, []).append(entry.name)
    named = [f"{dim!r} (of {', '.join(map(repr, names))})" for dim, names in where.items()]
    several = len(named) > 1
    return f"dimension{'s' if several else ''} {' and '.join(named)} {'have' if several else 'has'} no size"


def _check_shared_names(inputs: Sequence[ModelInput], ranges: Mapping[str, ShapeRange]) -> None:
    """Refuse two sizes for one dimension name, which TensorRT refuses only after seconds of building.

    The optima of dimensions with one name must be equal, and their ranges must overlap; also for inputs that no node
    reads.
    Source: builds with TensorRT-RTX 1.7.1, 2026-11.
    """
    seen: dict[str, tuple[str, Bounds]] = {}
    for entry in inputs:
        found = ranges.get(entry.name)
        if found is None or found.is_values:
            continue
        for dim, low, opt, high in zip(entry.dims, found.minimum, found.optimum, found.maximum, strict=True):
            if not isinstance(dim, str):
                continue
            first, (first_low, first_opt, first_high) = seen.setdefault(dim, (entry.name, (low, opt, high)))
            if opt != first_opt or max(low, first_low) > min(high, first_high):
                message = (
                    f"dimension {dim!r} is {first_low}:{first_opt}:{first_high} in input {first!r} and "
                    f"{low}:{opt}:{high} in input {entry.name!r}, and has one size in TensorRT"
                )
                raise ProfileError(message, rename(dim))


def _check_agreement(entry: ModelInput, given: Corners, dims: Mapping[str, Bounds]) -> None:
    """Refuse shapes and dims that give one dimension different sizes."""
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
        count = math.prod(dim for dim in entry.dims if isinstance(dim, int))
        if any(len(values) != count for values in given):
            message = f"input {entry.name!r} may be a shape tensor of {count} values, and the flags give other numbers"
            form = quote_shape(entry.name, ("VALUE",) * count)
            raise ProfileError(message, f"Give {count} values ({form}), or leave it out if its shape alone matters.")
        _check_order(f"input {entry.name!r}", low, opt, high)
        return ShapeRange(low, opt, high, is_values=True)
    for shape in given:
        _check_shape(entry, shape)
    _check_order(f"input {entry.name!r}", low, opt, high)
    return None if entry.is_static else ShapeRange(low, opt, high)


def _check_shape(entry: ModelInput, shape: tuple[int, ...]) -> None:
    if len(shape) != len(entry.dims):
        message = f"input {entry.name!r} has rank {len(entry.dims)} ({entry}), and the shape given has {len(shape)}"
        raise _Unfit(message, f"Give {len(entry.dims)} sizes.")
    for size, dim in zip(shape, entry.dims, strict=True):
        if isinstance(dim, int) and size != dim:
            message = f"input {entry.name!r} ({entry}) has a static size of {dim} where the shape given has {size}"
            raise _Unfit(message, "Keep static sizes." if dim else _SIZE_0)
        if not 0 <= size <= _MAX_DIMENSION:
            message = f"a size of {size} for input {entry.name!r} is out of range"
            raise ProfileError(message, f"Sizes are from 0 to {_MAX_DIMENSION}.")


def _check_order(what: str, low: tuple[int, ...], opt: tuple[int, ...], high: tuple[int, ...]) -> None:
    for small, middle, large in zip(low, opt, high, strict=True):
        if not small <= middle <= large:
            message = f"{what}: minimum {small}, optimum {middle}, maximum {large} are not in order"
            raise ProfileError(message, "Give minimum <= optimum <= maximum.")
        if large > _MAX_DIMENSION:
            raise ProfileError(f"{what}: {large} is out of range", f"Sizes are at most {_MAX_DIMENSION}.")


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


def format_range(shapes: ShapeRange) -> str:
    """Format a range for messages: ``1x3x32x32..32x3x32x32..64x3x32x32``."""
    corners = (shapes.minimum, shapes.optimum, shapes.maximum)
    return "..".join("x".join(str(size) for size in corner) for corner in corners)


def describe_inputs(
    inputs: Sequence[ModelInput], request: ProfileRequest | None = None, values: Mapping[str, int] | None = None
) -> str:
    """Return the model's inputs with their dimensions, and the flags to give: those that fit are kept.

    Every line of flags has been read and resolved against ``inputs``, with numbers in place of placeholders.

    Args:
        inputs: The model's inputs.
        request: What was given.
        values: From the names of the shape tensors to the number of their values, where TensorRT was asked.
    """
    request, values = request or ProfileRequest(), values or {}
    shapes = [
        {name: corners for name, corners in profile.items() if _fits(inputs, name, corners, values)}
        for profile in request.shapes
    ]
    dims = {name: bounds for name, bounds in request.dims.items() if _dim_fits(inputs, name, bounds)}
    for given, sizes in dict.fromkeys(product((0, 1), repeat=2)):
        kept = ([] if given else shapes, {} if sizes else dims)
        tried = compose(inputs, *kept, values, unknown=(1, 1, 1))
        lines = compose(inputs, *kept, values)
        good = [line for line, trial in zip(lines, tried, strict=True) if _works(inputs, trial, values)]
        if good:
            is_partial = any(kept[0]) or bool(kept[1])
            return render(inputs, good, values, is_partial=is_partial, has_placeholders=lines != tried)
    return render(inputs, (), values)


def _fits(inputs: Sequence[ModelInput], name: str, given: Corners, values: Mapping[str, int]) -> bool:
    """Return whether the shapes can be kept in advice."""
    entry = next((entry for entry in inputs if entry.name == name), None)
    try:
        found = None if entry is None else _range_from_shapes(entry, given)
    except (_Unfit, ProfileError):
        return False
    # Values for an input whose values TensorRT does not read must go.
    return found is not None and (not found.is_values or name in values)


def _dim_fits(inputs: Sequence[ModelInput], name: str, bounds: Bounds) -> bool:
    try:
        _check_bounds(name, bounds)
    except ProfileError:
        return False
    return any(name in entry.dims for entry in inputs)


def _works(inputs: Sequence[ModelInput], line: str, values: Mapping[str, int]) -> bool:
    """Read and resolve a line of flags as if a user had given it."""
    try:
        profiles = _resolve(inputs, ProfileRequest.from_flags(**flags_of(line)))
    except (_Unfit, ProfileError):
        return False
    found = [dict(profile.ranges).get(name) for profile in profiles or (Profile(()),) for name in values]
    return all(shapes is not None and shapes.is_values for shapes in found)
