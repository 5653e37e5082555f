"""One request, as a caller makes it."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from enginecache.builders.base import ProgressCallback
from enginecache.config import BACKENDS, Backend
from enginecache.errors import OptionError, ProfileError
from enginecache.locks.base import WaitingCallback
from enginecache.model import ModelSource
from enginecache.options import BuildOptions
from enginecache.profiles import Corners, ProfileRequest
from enginecache.targets import Target

Model = str | os.PathLike[str] | bytes


class Ask(TypedDict, total=False):
    """What may be asked beside the model, by keyword, of ``get``, ``load`` and ``explain`` alike.

    Attributes:
        base_dir: Folder of the external data, for model bytes.
        profiles: One mapping an optimization profile, from input name to (minimum, optimum, maximum) shapes such as
            ``((1, 3, 32, 32), (32, 3, 32, 32), (64, 3, 32, 32))``; for a shape tensor, values.
        dims: From the name of an ONNX dimension to (minimum, optimum, maximum), or to one fixed size.
        workspace_bytes: Limit of the workspace in bytes; None leaves TensorRT's default.
        optimization_level: 0 to 5; 3 is the default.
        backend: ``auto``, ``tensorrt`` or ``tensorrt-rtx``; None takes the configuration's.
        target: ``sm_89``, ``8.9``, ``89``, ``portable``, or several; None takes the device's.
        device: CUDA ordinal; None takes the one that CUDA would use.
    """

    base_dir: str | os.PathLike[str] | None
    profiles: Sequence[Mapping[str, Corners]]
    dims: Mapping[str, tuple[int, int, int] | int]
    workspace_bytes: int | None
    optimization_level: int | None
    backend: Backend | None
    target: str | Sequence[str] | None
    device: int | None


class GetAsk(Ask, total=False):
    """What ``get`` and ``load`` take beside the model, by keyword.

    Attributes:
        offline: Never build: a miss is an error.
        rebuild: Build even if an engine is stored, and replace it.
        timeout_s: Longest wait for another builder, in seconds; None takes the configuration's. The build itself has
            no limit.
        progress: Called with each step of a build, from the calling thread.
        waiting: Called about once a second while another process builds.
    """

    offline: bool
    rebuild: bool
    timeout_s: float | None
    progress: ProgressCallback | None
    waiting: WaitingCallback | None


@dataclass(frozen=True)
class Request:
    """A model and everything asked of its engine; nothing looked up yet.

    Attributes:
        source: The model.
        shapes: Profiles and dimensions as given.
        options: Builder options.
        backend: Which flavour; None leaves it to the configuration.
        target: What the plan must run on; None leaves it to the device.
        device: CUDA ordinal; None leaves it to CUDA.
    """

    source: ModelSource
    shapes: ProfileRequest
    options: BuildOptions
    backend: Backend | None = None
    target: Target | None = None
    device: int | None = None

    @classmethod
    def of(cls, model: Model, ask: Ask) -> Request:
        """From what a caller gave.

        Raises:
            InvalidInputError: A value has the wrong form or is out of range.
        """
        unknown = set(ask) - _KEYWORDS
        if unknown:
            raise TypeError(f"there is no such keyword: {', '.join(sorted(unknown))}; see enginecache.request.GetAsk")
        level = ask.get("optimization_level")
        target = ask.get("target")
        options = BuildOptions(workspace_bytes=ask.get("workspace_bytes"))
        if level is not None:
            options = BuildOptions(workspace_bytes=ask.get("workspace_bytes"), optimization_level=level)
        targets = _target_names(target)
        return cls(
            source=ModelSource.of(model, ask.get("base_dir")),
            shapes=ProfileRequest(
                profiles_of(ask.get("profiles") or ()),
                _dims_of(ask.get("dims") or {}),
            ),
            options=options,
            backend=_backend(ask.get("backend")),
            target=Target.parse(targets) if targets else None,
            device=ask.get("device"),
        )


def _target_names(target: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (target,) if isinstance(target, str) else () if target is None else target
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"{target!r} is not a target", "Write it as text: 'sm_89', '8.9', '89' or 'portable'.")
    return tuple(names)


def _backend(backend: Backend | None) -> Backend | None:
    if backend is not None and backend not in BACKENDS:
        raise OptionError(f"{backend!r} is not a backend", f"Choose one of {', '.join(BACKENDS)}.")
    return backend


_KEYWORDS = GetAsk.__required_keys__ | GetAsk.__optional_keys__


def profiles_of(profiles: Sequence[Mapping[str, Corners]]) -> tuple[dict[str, Corners], ...]:
    """The same profiles with every shape as a tuple of integers.

    Raises:
        ProfileError: An input has not three shapes of one rank.
    """
    if isinstance(profiles, Mapping) or not all(isinstance(profile, Mapping) for profile in profiles):
        raise ProfileError(
            "profiles is not a list of mappings", "Give one mapping a profile: [{'x': (min, opt, max)}]."
        )
    return tuple({name: _corners(name, corners) for name, corners in profile.items()} for profile in profiles)


def _dims_of(dims: Mapping[str, tuple[int, int, int] | int]) -> dict[str, tuple[int, int, int]]:
    if not isinstance(dims, Mapping):
        raise ProfileError(f"dims is not a mapping: {dims!r}", "Give {'batch': (1, 32, 64)}.")
    return {name: _bounds(name, sizes) for name, sizes in dims.items()}


def _corners(name: str, corners: Corners) -> Corners:
    try:
        shapes = tuple(tuple(operator.index(size) for size in shape) for shape in corners)
    except TypeError as error:
        raise ProfileError(f"the shapes of input {name!r} cannot be read: {error}", _CORNERS) from error
    if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
        raise ProfileError(f"input {name!r} needs three shapes of one rank, not {corners!r}", _CORNERS)
    return shapes


_CORNERS = "Give (minimum, optimum, maximum), such as ((1, 3, 32, 32), (32, 3, 32, 32), (64, 3, 32, 32))."


def _bounds(name: str, sizes: tuple[int, int, int] | int) -> tuple[int, int, int]:
    try:
        numbers = tuple(map(operator.index, sizes)) if isinstance(sizes, Sequence) else (operator.index(sizes),) * 3
    except TypeError:
        numbers = ()
    if len(numbers) != 3:
        raise ProfileError(f"dimension {name!r} needs three sizes, not {sizes!r}", "Give (1, 32, 64), or one size.")
    return (numbers[0], numbers[1], numbers[2])
