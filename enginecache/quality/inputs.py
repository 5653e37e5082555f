"""The inputs of a check: which shapes, and which values.

Every profile is checked at its minimum, optimum and maximum. Values come from a seed, so that another process makes the
same; for inputs whose values mean something (indices, masks) from a range; or all of them from a file.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enginecache.errors import OptionError
from enginecache.key.profiles import Profile, ShapeRange
from enginecache.model import ModelInput

Range = tuple[float, float]
Ranges = Mapping[str, Range]

INTEGERS = {
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    **dict.fromkeys(("INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"), (0, 1)),
}
"""Values of integer inputs that index nothing: bytes are pictures or quantized, others are mostly masks and flags."""

FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
"""Normally distributed: mean 0, standard deviation 1."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_RANGE = re.compile(rf"(?P<name>.+)=(?P<low>{_NUMBER}):(?P<high>{_NUMBER})", re.ASCII | re.DOTALL)
_RANGE_FORM = "Write, for instance, --input-range input_ids=0:30521, or pixels=0:1."
_SAVE = "Save it with numpy.savez(file, **arrays), with one array for each input of the model."


@dataclass(frozen=True)
class PointInput:
    """One input at one point.

    Attributes:
        name: Name in the model.
        dtype: ONNX name of the element type.
        shape: Its shape.
        values: Its values, for a shape tensor; None where they are made.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Point:
    """One set of inputs.

    Attributes:
        profile: Index of the profile to run with.
        at: ``min``, ``opt`` or ``max`` of the profile; ``static`` where there is none; ``given`` for a file's arrays.
        inputs: In the model's order.
        file: The ``.npz`` file with the arrays; empty where they are made.
    """

    profile: int
    at: str
    inputs: tuple[PointInput, ...]
    file: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Point:
        """Read the result of :meth:`to_json`."""
        inputs = tuple(
            PointInput(
                entry["name"],
                entry["dtype"],
                tuple(entry["shape"]),
                None if entry["values"] is None else tuple(entry["values"]),
            )
            for entry in fields["inputs"]
        )
        return cls(fields["profile"], fields["at"], inputs, fields["file"])


def parse_range(text: str) -> tuple[str, Range]:
    """Read ``input_ids=0:30521``.

    Raises:
        OptionError: The text has another form.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        raise OptionError(f"--input-range {text!r} is not NAME=LOW:HIGH", _RANGE_FORM)
    return match["name"], (float(match["low"]), float(match["high"]))


def check_ranges(inputs: Sequence[ModelInput], ranges: Ranges) -> None:
    """Refuse ranges that do not fit the model.

    Raises:
        OptionError: There is no such input, the range is empty, or its type cannot hold the numbers.
    """
    known = {entry.name: entry for entry in inputs}
    for name, (low, high) in ranges.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise OptionError(f"a range for {name!r}, which is not an input of the model", f"Its inputs: {listed}.")
        if not low <= high or not math.isfinite(high - low):
            raise OptionError(
                f"the range {low:g}:{high:g} of input {name!r} is empty or endless",
                "Give two finite numbers, the smaller one first.",
            )
        if known[name].dtype not in FLOATS and (low % 1 or high % 1):
            raise OptionError(
                f"input {name!r} holds integers, and its range is {low:g}:{high:g}", "Give whole numbers."
            )


def points_of(inputs: Sequence[ModelInput], profiles: Sequence[Profile]) -> tuple[Point, ...]:
    """Return the corners of every profile, each once; one point for a static model.

    Args:
        inputs: The model's.
        profiles: Canonical; empty for a static model.
    """
    if not profiles:
        return (Point(0, "static", tuple(_at(entry, None, "optimum") for entry in inputs)),)
    points: dict[tuple[int, tuple[PointInput, ...]], Point] = {}
    for index, profile in enumerate(profiles):
        ranges = dict(profile.ranges)
        # The optimum first: a profile of one shape is checked there.
        for at, corner in (("opt", "optimum"), ("min", "minimum"), ("max", "maximum")):
            found = tuple(_at(entry, ranges.get(entry.name), corner) for entry in inputs)
            points.setdefault((index, found), Point(index, at, found))
    return tuple(points.values())


def _at(entry: ModelInput, given: ShapeRange | None, corner: str) -> PointInput:
    static = tuple(size if isinstance(size, int) else 1 for size in entry.dims)
    numbers: tuple[int, ...] = static if given is None else getattr(given, corner)
    if given is not None and given.is_values:
        return PointInput(entry.name, entry.dtype, static, numbers)
    return PointInput(entry.name, entry.dtype, numbers)


def point_of_file(path: Path, inputs: Sequence[ModelInput], profiles: Sequence[Profile]) -> Point:
    """Return the point of an ``.npz`` file with an array for each input. Nothing in it is unpickled.

    Raises:
        OptionError: The file cannot be read, an array is missing or of another type, or no profile has these shapes.
    """
    arrays = _read(path, [entry.name for entry in inputs])
    for entry in inputs:
        array = arrays[entry.name]
        if not _is_castable(array, entry.dtype):
            message = f"{path}: the array {entry.name!r} is of type {array.dtype}, and the input of {entry.dtype}"
            raise OptionError(message, "Convert it before it is saved: array.astype(...).")
    for index, profile in enumerate(profiles or (Profile(()),)):
        if _fits(inputs, profile, arrays):
            values = {name for name, given in profile.ranges if given.is_values}
            found = tuple(_given(entry, arrays[entry.name], is_values=entry.name in values) for entry in inputs)
            return Point(index, "given", found, str(path.absolute()))
    shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in arrays.items())
    listed = "; ".join(map(str, profiles)) or ", ".join(map(str, inputs))
    raise OptionError(f"{path}: no profile has inputs of these shapes: {shapes}", f"What may be given: {listed}.")


def _given(entry: ModelInput, array: Any, *, is_values: bool) -> PointInput:
    return PointInput(entry.name, entry.dtype, tuple(array.shape), tuple(array.ravel().tolist()) if is_values else None)


def _fits(inputs: Sequence[ModelInput], profile: Profile, arrays: Mapping[str, Any]) -> bool:
    ranges = dict(profile.ranges)
    for entry in inputs:
        given, array = ranges.get(entry.name), arrays[entry.name]
        is_values = given is not None and given.is_values
        numbers = array.ravel().tolist() if is_values else array.shape
        static = _at(entry, None, "optimum").shape
        low, high = (static, static) if given is None else (given.minimum, given.maximum)
        if len(numbers) != len(low) or not all(a <= n <= b for a, n, b in zip(low, numbers, high, strict=True)):
            return False
    return True


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    import zipfile
    import zlib

    import numpy as np

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe waits for its writer
            raise OptionError(f"{path} is not a regular file", _SAVE)
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise OptionError(f"{path} is not an .npz file", _SAVE)
            file.seek(0)
            stored = np.load(file, allow_pickle=False)
            missing = [name for name in names if name not in stored.files]
            if missing:
                have = ", ".join(stored.files) or "nothing"
                raise OptionError(f"{path} has no array for the input {', '.join(missing)}; it has {have}", _SAVE)
            arrays = {name: stored[name] for name in names}
            raw = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
            if raw:  # numpy gives the bytes of a member in another form
                raise OptionError(f"{path}: {raw[0]!r} is no array", _SAVE)
            return arrays
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}", _SAVE) from error
    # RuntimeError: an encrypted archive, or a compression that Python does not know.
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        if isinstance(error, OptionError):
            raise
        reason = "it holds Python objects, which are never unpickled" if "pickle" in str(error) else error
        raise OptionError(f"{path} cannot be read: {reason}", _SAVE) from error


def _is_castable(array: Any, dtype: str) -> bool:
    kinds = "f" if dtype in FLOATS else "b" if dtype == "BOOL" else "iub"
    return array.dtype.kind in kinds or (dtype in FLOATS and array.dtype.kind in "iub")


# The child's side: arrays


def arrays_of(point: Point, index: int, seed: int, ranges: Ranges) -> dict[str, Any]:
    """Return the arrays of a point: of its file, or made from the seed.

    Args:
        point: The point.
        index: Its number, so that no two points have the same values.
        seed: The same seed makes the same arrays.
        ranges: Smallest and largest value, both included, by input.

    Raises:
        OptionError: An input's type has no values here, or the file cannot be read.
    """
    import numpy as np

    if point.file:
        given = _read(Path(point.file), [entry.name for entry in point.inputs])
        return {entry.name: given[entry.name].astype(_numpy_type(entry)) for entry in point.inputs}
    return {
        entry.name: _array(entry, np.random.default_rng([seed, index, number]), ranges.get(entry.name))
        for number, entry in enumerate(point.inputs)
    }


def _numpy_type(entry: PointInput) -> Any:
    import numpy as np

    # BFLOAT16 as FP32: numpy has no such type, and whoever runs the model rounds.
    name = {"FLOAT": "float32", "DOUBLE": "float64", "BFLOAT16": "float32"}.get(entry.dtype, entry.dtype.lower())
    if entry.dtype not in (*FLOATS, *INTEGERS, "BOOL"):
        message = f"input {entry.name!r} is of type {entry.dtype}, for which no values can be made"
        raise OptionError(message, "Such a model cannot be checked.")
    return np.dtype(name)


def _array(entry: PointInput, random: Any, limits: Range | None) -> Any:
    import numpy as np

    kind = _numpy_type(entry)
    if entry.values is not None:
        return np.array(entry.values, kind).reshape(entry.shape)
    if entry.dtype in FLOATS:
        if limits is None:
            return random.standard_normal(entry.shape).astype(kind)
        return random.uniform(*limits, entry.shape).astype(kind)
    if entry.dtype == "BOOL":
        low, high = (0, 1) if limits is None else (int(limits[0] != 0), int(limits[1] != 0))
    else:
        low, high = map(int, INTEGERS[entry.dtype] if limits is None else limits)
        bounds = np.iinfo(kind)
        low, high = max(low, int(bounds.min)), min(high, int(bounds.max))
    return random.integers(low, high, entry.shape, np.uint64 if low >= 0 else np.int64, endpoint=True).astype(kind)


def other_arrays(arrays: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Return given arrays with their elements in another order: other inputs, of values that are all valid.

    Where that changes nothing, floats are halved.
    """
    import numpy as np

    fixed = {entry.name for entry in point.inputs if entry.values is not None}
    random = np.random.default_rng(1)
    shuffled = {
        name: array if name in fixed else random.permutation(array.ravel()).reshape(array.shape)
        for name, array in arrays.items()
    }
    if any(not np.array_equal(shuffled[name], array) for name, array in arrays.items()):
        return shuffled
    return {name: array / 2 if array.dtype.kind == "f" else array for name, array in arrays.items()}


SAME_VALUES = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand"}
"""Operators that move the values of their first input, and change none."""


def index_ranges(model: Any) -> dict[str, Range]:
    """Return the valid indices of each integer input that only looks up rows of a table of known size.

    Looks at the main graph: an input that reaches ``Gather`` as it is, or through nodes that move its values.

    Args:
        model: A ``ModelProto``, with or without its external data.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    origin = {value.name: value.name for value in model.graph.input if value.name not in sizes}
    found: dict[str, Range] = {}
    for node in model.graph.node:
        if node.op_type in SAME_VALUES and node.input and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in origin and sizes.get(node.input[0]):
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            size, name = sizes[node.input[0]][axis], origin[node.input[1]]
            found[name] = (0, min(size - 1, found.get(name, (0, size - 1))[1]))
    return found
