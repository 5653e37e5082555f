"""The inputs as TensorRT sees them after parsing, against the profiles.

Only TensorRT knows which integer inputs are shape tensors, whose *values* it must have a range of, and what it calls
the inputs. The ONNX graph alone does not show it, so this is the first place where a profile can be seen to lack one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginecache.errors import ProfileError
from enginecache.key.profiles import Profile, ProfileRequest, describe_inputs
from enginecache.model import ModelInput


@dataclass(frozen=True)
class NetworkInput:
    """One input of the parsed network.

    Attributes:
        name: Name in the ONNX file.
        dims: One size a dimension; -1 where it is dynamic.
        is_shape_tensor: Whether TensorRT reads its values while building.
        trt_name: TensorRT's name, which is another where the input is also an output: ``__x`` for ``x``.
    """

    name: str
    dims: tuple[int, ...]
    is_shape_tensor: bool
    trt_name: str = ""

    @property
    def value_count(self) -> int:
        """Return the number of values of a shape tensor; 1 for a scalar."""
        return math.prod(self.dims)


def network_inputs(network: Any, model_inputs: Sequence[ModelInput]) -> tuple[NetworkInput, ...]:
    """Return the inputs of a parsed ``INetworkDefinition``, in its order.

    Only an input that can be a shape tensor by TensorRT's own rule is asked whether it is one.
    """
    candidates = {entry.name for entry in model_inputs if entry.can_be_shape_tensor}
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    names = _file_names([tensor.name for tensor in tensors], [entry.name for entry in model_inputs])
    return tuple(
        NetworkInput(name, tuple(tensor.shape), name in candidates and tensor.is_shape_tensor, tensor.name)
        for name, tensor in zip(names, tensors, strict=True)
    )


def _file_names(trt_names: Sequence[str], file_names: Sequence[str]) -> list[str]:
    """Return the file's name for each name in the network.

    The parser keeps the file's order, and renames an input that is also an output. So those whose names are in only one
    of the two lists belong together in order. Source: networks that TensorRT-RTX 1.7.1 parsed, 2026-11.
    """
    renamed = [name for name in trt_names if name not in file_names]
    originals = [name for name in file_names if name not in trt_names]
    if len(renamed) != len(originals):
        return list(trt_names)
    by_trt_name = dict(zip(renamed, originals, strict=True))
    return [by_trt_name.get(name, name) for name in trt_names]


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
        problem = _problem(by_name, profile)
        if problem:
            raise ProfileError(problem, _advice(inputs, profiles, model_inputs))


def _problem(by_name: Mapping[str, NetworkInput], profile: Profile) -> str:
    """Return what the profile lacks, or has too much; empty for nothing."""
    ranges = dict(profile.ranges)
    for name, given in profile.ranges:
        if name not in by_name:
            return f"the network that TensorRT parsed has no input {name!r}; its inputs: {', '.join(by_name) or 'none'}"
        if given.is_values and not by_name[name].is_shape_tensor:
            return (
                f"input {name!r} is given a range of values, but TensorRT does not read its values while building: it "
                "is not a shape tensor; leave it out, since its shape is static"
            )
    missing = [e for e in by_name.values() if e.is_shape_tensor and not (e.name in ranges and ranges[e.name].is_values)]
    if missing:
        names = ", ".join(repr(entry.name) for entry in missing)
        return (
            f"TensorRT reads the values of {'inputs' if len(missing) > 1 else 'input'} {names} while building (a shape "
            "tensor), and the profile has no range of values"
        )
    for entry in by_name.values():
        if entry.is_shape_tensor and len(ranges[entry.name].optimum) != entry.value_count:
            count = len(ranges[entry.name].optimum)
            return f"shape tensor {entry.name!r} holds {entry.value_count} values, and the profile gives {count}"
        if not entry.is_shape_tensor and -1 in entry.dims and entry.name not in ranges:
            return f"input {entry.name!r} is dynamic in TensorRT, and the profile has no shapes for it"
    return ""


def _advice(inputs: Sequence[NetworkInput], profiles: Sequence[Profile], model_inputs: Sequence[ModelInput]) -> str:
    """Return the inputs as TensorRT has them, and the flags that they need."""
    in_file = {entry.name: entry for entry in model_inputs}
    seen = []
    for entry in inputs:
        known = in_file.get(entry.name)
        names = known.dims if known is not None and len(known.dims) == len(entry.dims) else (None,) * len(entry.dims)
        dims = [
            size if size >= 0 else name if isinstance(name, str) else None
            for size, name in zip(entry.dims, names, strict=True)
        ]
        seen.append(ModelInput(entry.name, known.dtype if known is not None else "FLOAT", tuple(dims)))
    given = [
        {name: (shapes.minimum, shapes.optimum, shapes.maximum) for name, shapes in profile.ranges}
        for profile in profiles
    ]
    values = {entry.name: entry.value_count for entry in inputs if entry.is_shape_tensor}
    return describe_inputs(seen, ProfileRequest(tuple(given)), values)


def describe_renaming(inputs: Sequence[NetworkInput]) -> tuple[str, ...]:
    """Return a warning for each input that the engine has under another name than the file."""
    return tuple(
        f"input {entry.name!r} is also an output: TensorRT calls the input {entry.trt_name!r} in the engine"
        for entry in inputs
        if entry.trt_name not in {"", entry.name}
    )
