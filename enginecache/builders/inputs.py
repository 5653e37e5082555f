"""The inputs as TensorRT sees them after parsing, against the profiles.

Only TensorRT knows which integer inputs are shape tensors, whose *values* it must have a range of. The ONNX graph alone
does not show it, so this is the first place where a profile can be seen to lack one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enginecache.errors import ProfileError
from enginecache.model import ModelInput
from enginecache.profiles import Corners, Profile, ShapeRange, describe_inputs
from enginecache.shapes import shape_flags

EXAMPLE_VALUES = (1, 8, 32)


@dataclass(frozen=True)
class NetworkInput:
    """One input of the parsed network.

    Attributes:
        name: Name in the graph.
        dims: One size a dimension; -1 where it is dynamic.
        is_shape_tensor: Whether TensorRT reads its values while building.
    """

    name: str
    dims: tuple[int, ...]
    is_shape_tensor: bool

    @property
    def value_count(self) -> int:
        """Number of values of a shape tensor; 1 for a scalar."""
        return math.prod(self.dims)


def network_inputs(network: Any, model_inputs: Sequence[ModelInput]) -> tuple[NetworkInput, ...]:
    """The inputs of a parsed ``INetworkDefinition``, in its order.

    Only an input that can be a shape tensor by TensorRT's own rule is asked whether it is one.
    """
    candidates = {entry.name for entry in model_inputs if entry.can_be_shape_tensor}
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return tuple(NetworkInput(t.name, tuple(t.shape), t.name in candidates and t.is_shape_tensor) for t in tensors)


def check_profiles(
    inputs: Sequence[NetworkInput], profiles: Sequence[Profile], model_inputs: Sequence[ModelInput]
) -> None:
    """Compare the profiles with what TensorRT found in the model.

    Raises:
        ProfileError: A profile lacks an input that needs a range, names one that the network does not have (TensorRT
            ignores that), or gives values for an input that is not a shape tensor. The fix has the flags to use.
    """
    by_name = {entry.name: entry for entry in inputs}
    for profile in profiles or (Profile(()),):
        ranges = dict(profile.ranges)
        unknown = [name for name in ranges if name not in by_name]
        if unknown:
            known = ", ".join(by_name) or "none"
            message = f"the network that TensorRT parsed has no input {unknown[0]!r}; its inputs: {known}"
            raise ProfileError(message, describe_inputs(model_inputs))
        _check_values(by_name, profile, profiles)
        for entry in inputs:
            if not entry.is_shape_tensor and -1 in entry.dims and entry.name not in ranges:
                message = f"input {entry.name!r} is dynamic in TensorRT, and the profile has no shapes for it"
                raise ProfileError(message, describe_inputs(model_inputs))


def _check_values(by_name: dict[str, NetworkInput], profile: Profile, profiles: Sequence[Profile]) -> None:
    ranges = dict(profile.ranges)
    for name, given in profile.ranges:
        if given.is_values and not by_name[name].is_shape_tensor:
            message = (
                f"input {name!r} is given a range of values, but TensorRT does not read its values while building: it "
                "is not a shape tensor"
            )
            raise ProfileError(message, _flags("Leave it out, since its shape is static", by_name, profiles))
    missing = [e for e in by_name.values() if e.is_shape_tensor and not (e.name in ranges and ranges[e.name].is_values)]
    if missing:
        names = ", ".join(repr(entry.name) for entry in missing)
        what = "inputs" if len(missing) > 1 else "input"
        message = (
            f"TensorRT reads the values of {what} {names} while building (a shape tensor), and the profile has no "
            "range of values"
        )
        raise ProfileError(
            message, _flags("Give values, the ones that you serve, in place of these", by_name, profiles)
        )
    for entry in by_name.values():
        if entry.is_shape_tensor and len(ranges[entry.name].optimum) != entry.value_count:
            message = (
                f"shape tensor {entry.name!r} holds {entry.value_count} values, and the profile gives "
                f"{len(ranges[entry.name].optimum)}"
            )
            raise ProfileError(message, _flags(f"Give {entry.value_count} values", by_name, profiles))


def _flags(lead: str, by_name: dict[str, NetworkInput], profiles: Sequence[Profile]) -> str:
    """The whole set of shape flags, one line a profile: what was given, and an example for what was not."""
    lines = [f"{lead}:"]
    for profile in profiles or (Profile(()),):
        flags = shape_flags(_corners(by_name, dict(profile.ranges)))
        lines.append(f"  {flags}" if flags.count(":") else "  no --min-shapes, --opt-shapes or --max-shapes at all")
    return "\n".join(lines)


def _corners(by_name: dict[str, NetworkInput], ranges: dict[str, ShapeRange]) -> dict[str, Corners]:
    result: dict[str, Corners] = {}
    for entry in by_name.values():
        given = ranges.get(entry.name)
        has_right_kind = given is not None and given.is_values == entry.is_shape_tensor
        if given is not None and has_right_kind and len(given.optimum) == len(_example(entry, 1)):
            result[entry.name] = (given.minimum, given.optimum, given.maximum)
        elif entry.is_shape_tensor or -1 in entry.dims:
            result[entry.name] = tuple(_example(entry, size) for size in EXAMPLE_VALUES)
    return result


def _example(entry: NetworkInput, size: int) -> tuple[int, ...]:
    if entry.is_shape_tensor:
        return (size,) * entry.value_count
    return tuple(size if dim < 0 else dim for dim in entry.dims)
