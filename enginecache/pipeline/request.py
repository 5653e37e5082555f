"""One request, as a caller makes it."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast, get_args

from enginecache.config import BACKENDS, Backend, require_choice, require_seconds
from enginecache.errors import OptionError, ProfileError, shown
from enginecache.host.targets import Target
from enginecache.key.matching import ACCEPTS, Accept
from enginecache.key.options import BuildOptions, HardwareCompatibility, Precision
from enginecache.key.profiles import ProfileRequest
from enginecache.key.shape_syntax import Corners
from enginecache.model import ModelSource
from enginecache.storage.locks import WaitingCallback
from enginecache.trt.build.request import BuildRequest, BuiltPlan, ProgressCallback

if TYPE_CHECKING:
    from enginecache.storage.blobs import StagedBlob

Model = str | os.PathLike[str] | bytes
IfUnloadable = Literal["rebuild", "raise"]
IF_UNLOADABLE: tuple[IfUnloadable, ...] = get_args(IfUnloadable)

Examine = Callable[[BuildRequest, BuiltPlan, "StagedBlob"], str]
"""Checks what a plan computes before it is published; returns the result for the entry's row. Raises to refuse it."""


class Ask(TypedDict, total=False):
    """Keywords that say what an engine must be. :meth:`enginecache.EngineCache.get` describes the values."""

    base_dir: str | os.PathLike[str] | None
    profiles: Sequence[Mapping[str, Corners]]
    dims: Mapping[str, tuple[int, int, int] | int]
    workspace_bytes: int | None
    optimization_level: int | None
    precision: Precision | Sequence[Precision]
    convert_io: bool
    hardware_compatibility: HardwareCompatibility
    version_compatible: bool
    strip_plan: bool
    builder_flags: Sequence[str]
    plugins: Sequence[str | os.PathLike[str]]
    backend: Backend | None
    target: str | Sequence[str] | None
    device: int | None
    accept: Accept
    verify_model: bool


class GetAsk(Ask, total=False):
    """Keywords of ``get`` and ``load``, without the model."""

    offline: bool
    rebuild: bool
    timeout_s: float | None
    timing_cache: bool
    progress: ProgressCallback | None
    waiting: WaitingCallback | None
    made: Callable[[Path], object] | None
    check: Any
    require_check: bool


_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """A model and everything asked of its engine; nothing looked up yet.

    Attributes:
        source: The model.
        shapes: Profiles and dimensions as given.
        options: Builder options, without plugins.
        plugins: Paths of plugin libraries, absolute.
        backend: Which flavour; None leaves it to the configuration.
        target: What the plan must run on; None leaves it to the device.
        device: CUDA ordinal; None leaves it to CUDA.
        accept: How far the caller goes.
        verify_model: Whether the model's files are read in any case.
    """

    source: ModelSource
    shapes: ProfileRequest
    options: BuildOptions
    plugins: tuple[Path, ...] = ()
    backend: Backend | None = None
    target: Target | None = None
    device: int | None = None
    accept: Accept = "exact"
    verify_model: bool = False

    @classmethod
    def of(cls, model: Model, ask: Ask) -> Request:
        """Read a request from the arguments of a call.

        Raises:
            InvalidInputError: A value has the wrong form or is out of range.
        """
        unknown = set(ask) - _KEYWORDS
        if unknown:
            raise TypeError(f"there is no such keyword: {', '.join(sorted(unknown))}; see help(EngineCache.get)")
        target = ask.get("target")
        targets = _target_names(target)
        return cls(
            source=ModelSource.of(model, ask.get("base_dir")),
            shapes=ProfileRequest(
                profiles_of(ask.get("profiles") or ()),
                _dims_of(ask.get("dims") or {}),
            ),
            options=_options(ask),
            plugins=_plugins(ask.get("plugins") or ()),
            backend=_choice("backend", ask.get("backend"), BACKENDS),
            target=Target.parse(targets) if targets else None,
            device=_ordinal(ask.get("device")),
            accept=_choice("accept", ask.get("accept"), ACCEPTS) or "exact",
            verify_model=bool(ask.get("verify_model")),
        )


@dataclass(frozen=True)
class Policy:
    """Effort that one call makes for its engine, and the callbacks that it informs. Not part of the key.

    Attributes:
        offline: Never build.
        rebuild: Build, whatever is stored or remembered.
        timeout_s: Longest wait for other builders, in seconds; None leaves it to the configuration.
        timing_cache: Begin the build with the kept timing cache, and add to it.
        progress: Called with each step of a build.
        waiting: Called about once a second while another process builds.
        made: Called with the folder when a new cache is made there.
        examine: Checks a plan before it is published; None for no check.
    """

    offline: bool = False
    rebuild: bool = False
    timeout_s: float | None = None
    timing_cache: bool = True
    progress: ProgressCallback | None = None
    waiting: WaitingCallback | None = None
    made: Callable[[Path], object] | None = None
    examine: Examine | None = None

    @classmethod
    def of(cls, ask: GetAsk) -> Policy:
        """Read the policy from the keywords of a call.

        Raises:
            OptionError: A value has the wrong form, or two exclude each other.
        """
        given: dict[str, Any] = {name: value for name, value in ask.items() if name in cls.__dataclass_fields__}
        policy = cls(**given)
        require_seconds("timeout_s", policy.timeout_s)
        for callback in ("progress", "waiting", "made"):
            if given.get(callback) is not None and not callable(given[callback]):
                raise OptionError(f"{callback} cannot be called", "Give a function, or None.")
        if policy.rebuild and policy.offline:
            raise OptionError("offline and rebuild exclude each other", "Leave one of them out.")
        return policy


def _options(ask: Ask) -> BuildOptions:
    """Return the options that were given: None counts as left out."""
    precision = ask.get("precision")
    given: dict[str, Any] = {
        "workspace_bytes": ask.get("workspace_bytes"),
        "optimization_level": ask.get("optimization_level"),
        "precision": (precision,) if isinstance(precision, str) else precision,
        "convert_io": ask.get("convert_io"),
        "hardware_compatibility": ask.get("hardware_compatibility"),
        "version_compatible": ask.get("version_compatible"),
        "strip_plan": ask.get("strip_plan"),
        "builder_flags": ask.get("builder_flags"),
    }
    return BuildOptions(**{name: value for name, value in given.items() if value is not None})


def _plugins(paths: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    if isinstance(paths, str | os.PathLike):
        raise OptionError(f"plugins is one path: {os.fspath(paths)!r}", "Give a list of paths.")
    if not isinstance(paths, Sequence) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise OptionError(f"plugins is not a list of paths: {shown(paths)}", "Give a list of paths.")
    return tuple(Path(path).absolute() for path in paths)


def _target_names(target: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (target,) if isinstance(target, str) else () if target is None else target
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"{shown(target)} is not a target", "Write it as a string: 'sm_89', '8.9', '89' or 'portable'."
        )
    return tuple(names)


def _ordinal(device: Any) -> int | None:
    if device is not None and (isinstance(device, bool) or not hasattr(device, "__index__") or device < 0):
        raise OptionError(
            f"--device: {shown(device)} is not a device", "CUDA counts from 0; `enginecache doctor` lists them."
        )
    return None if device is None else operator.index(device)


def _choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if value is not None:
        require_choice(name, value, choices)
    return value


def given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> GetAsk:
    """Return the keywords of a call that are not at their defaults."""
    return cast("GetAsk", {name: values[name] for name, default in defaults.items() if values[name] is not default})


_KEYWORDS = GetAsk.__required_keys__ | GetAsk.__optional_keys__


def profiles_of(profiles: Sequence[Mapping[str, Corners]]) -> tuple[dict[str, Corners], ...]:
    """Return the profiles with every shape as a tuple of integers.

    Raises:
        ProfileError: An input does not have three shapes of one rank.
    """
    if not isinstance(profiles, Sequence) or not all(isinstance(profile, Mapping) for profile in profiles):
        raise ProfileError(
            "profiles is not a list of mappings", "Give one mapping per profile: [{'x': (min, opt, max)}]."
        )
    profiles = tuple(_copied("profiles", profile) for profile in profiles)
    return tuple({name: _corners(name, corners) for name, corners in profile.items()} for profile in profiles)


def _dims_of(dims: Mapping[str, tuple[int, int, int] | int]) -> dict[str, tuple[int, int, int]]:
    if not isinstance(dims, Mapping):
        raise ProfileError(f"dims is not a mapping: {shown(dims)}", "Give {'batch': (1, 32, 64)}.")
    return {name: _bounds(name, sizes) for name, sizes in _copied("dims", dims).items()}


def _copied(name: str, values: Mapping[str, _T]) -> dict[str, _T]:
    """Return a copy, which nobody else changes. Of a dict it is made at one moment; of other mappings perhaps not."""
    try:
        return dict(values)
    except (RuntimeError, KeyError) as error:
        raise ProfileError(f"{name} cannot be read: {error}", "Give a copy that no other thread changes.") from error


def _corners(name: str, corners: Corners) -> Corners:
    try:
        shapes = tuple(tuple(operator.index(size) for size in shape) for shape in corners)
    except TypeError as error:
        raise ProfileError(f"the shapes of input {name!r} cannot be read: {error}", _CORNERS) from error
    if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
        raise ProfileError(f"input {name!r} needs three shapes of one rank, not {shown(corners)}", _CORNERS)
    return shapes


_CORNERS = "Give (minimum, optimum, maximum), such as ((1, 3, 32, 32), (32, 3, 32, 32), (64, 3, 32, 32))."


def _bounds(name: str, sizes: tuple[int, int, int] | int) -> tuple[int, int, int]:
    try:
        numbers = tuple(map(operator.index, sizes)) if isinstance(sizes, Sequence) else (operator.index(sizes),) * 3
    except TypeError:
        numbers = ()
    if len(numbers) != 3:
        raise ProfileError(
            f"dimension {name!r} needs three sizes, not {shown(sizes)}", "Give (1, 32, 64), or one size."
        )
    return (numbers[0], numbers[1], numbers[2])
