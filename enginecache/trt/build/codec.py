"""What crosses the pipes between a builder's two processes: one JSON line down, JSON lines up.

JSON and not pickle: the worker must not run what a line says, and neither must the parent. Paths that are not UTF-8
pass as lone surrogates, which JSON keeps.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from enginecache import errors
from enginecache.errors import BuilderKilledError, BuildError, EngineCacheError
from enginecache.host.devices import Device
from enginecache.host.targets import ComputeCapability, DeviceModel, Reach, Target
from enginecache.host.toolchain import Toolchain
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.key.precision import Conversion
from enginecache.key.profiles import Profile, ShapeRange
from enginecache.model import ModelIdentity, ModelSource
from enginecache.trt.build.request import BuildRequest

MODEL_NAME = "model.onnx"
PLAN_NAME = "plan.engine"
TIMING_CACHE_NAME = "timing.cache"
"""Names in the build's own folder."""

_ERRORS: dict[str, type[EngineCacheError]] = {
    kind.__name__: kind
    for kind in (
        EngineCacheError,
        errors.BuildError,
        errors.BuilderCrashError,
        BuilderKilledError,
        errors.ModelChangedError,
        errors.ModelError,
        errors.NoDeviceError,
        errors.OptionError,
        errors.OutOfMemoryError,
        errors.ProfileError,
        errors.ResourceError,
        errors.StoreError,
        errors.TargetError,
        errors.ToolchainError,
        errors.UnsupportedOptionError,
    )
}
"""The errors that a worker may name; by a table, so that a line cannot name any other class."""


def encode_request(request: BuildRequest) -> dict[str, Any]:
    """What a worker reads. Bytes of a model or timing cache go through files of the build's folder."""
    return {
        "path": None if request.source.path is None else str(request.source.path),
        "base_dir": None if request.source.base_dir is None else str(request.source.base_dir),
        "identity": request.identity.to_record(),
        "profiles": [[[name, asdict(shapes)] for name, shapes in profile.ranges] for profile in request.profiles],
        "options": {**asdict(request.options), "plugins": [[str(p.path), p.digest] for p in request.options.plugins]},
        "toolchain": asdict(request.toolchain),
        "target": asdict(request.target),
        "device": None if request.device is None else asdict(request.device),
        "conversion": None if request.conversion is None else request.conversion.fields(),
        "has_timing_cache": request.timing_cache is not None,
        "work_dir": str(request.work_dir),
        "log_path": str(request.log_path),
    }


def decode_request(record: dict[str, Any]) -> BuildRequest:
    """The inverse of :func:`encode_request`; reads model bytes from the build's folder."""
    work_dir = Path(record["work_dir"])
    return BuildRequest(
        source=_source(record, work_dir),
        identity=ModelIdentity.from_record(record["identity"]),
        profiles=tuple(Profile(tuple((name, _range(r)) for name, r in ranges)) for ranges in record["profiles"]),
        options=_options(record["options"]),
        toolchain=Toolchain(**record["toolchain"]),
        target=_target(record["target"]),
        device=None if record["device"] is None else _device(record["device"]),
        work_dir=work_dir,
        log_path=Path(record["log_path"]),
        conversion=None if record["conversion"] is None else Conversion(**record["conversion"]),
        timing_cache=(work_dir / TIMING_CACHE_NAME).read_bytes() if record["has_timing_cache"] else None,
    )


def _options(record: dict[str, Any]) -> BuildOptions:
    plugins = tuple(PluginLibrary(Path(path), digest) for path, digest in record["plugins"])
    return BuildOptions(**{**record, "plugins": plugins})


def _source(record: dict[str, Any], work_dir: Path) -> ModelSource:
    if record["path"] is not None:
        return ModelSource(path=Path(record["path"]))
    base_dir = None if record["base_dir"] is None else Path(record["base_dir"])
    return ModelSource(data=(work_dir / MODEL_NAME).read_bytes(), base_dir=base_dir)


def _range(record: dict[str, Any]) -> ShapeRange:
    low, opt, high = (tuple(record[name]) for name in ("minimum", "optimum", "maximum"))
    return ShapeRange(low, opt, high, is_values=record["is_values"])


def _target(record: dict[str, Any]) -> Target:
    model = record["device_model"]
    capabilities = tuple(ComputeCapability(*numbers) for numbers in record["compute_capabilities"])
    return Target(capabilities, None if model is None else DeviceModel(**model), record["and_later"])


def _device(record: dict[str, Any]) -> Device:
    device = Device(**record)
    return replace(
        device,
        compute_capability=ComputeCapability(*record["compute_capability"]),
        cuda_driver_version=tuple(record["cuda_driver_version"]),
    )


def encode_opened() -> dict[str, Any]:
    """TensorRT is loaded and has the model from now on: only what happens after that may be the model's fault."""
    return {"event": "opened"}


def encode_progress(phase: str, fraction: float | None) -> dict[str, Any]:
    """A step of the build."""
    return {"event": "progress", "phase": phase, "fraction": fraction}


def encode_done(
    reach: Reach, loaded_version: str, warnings: tuple[str, ...], *, took_timing_cache: bool
) -> dict[str, Any]:
    """The plan, and the timing cache where there is one, are written and closed."""
    return {
        "event": "done",
        "reach": reach.to_texts(),
        "loaded_version": loaded_version,
        "warnings": warnings,
        "took_timing_cache": took_timing_cache,
    }


def encode_error(error: EngineCacheError) -> dict[str, Any]:
    """Why there is no plan."""
    return {"event": "error", "class": type(error).__name__, "what": error.what, "fix": error.fix}


def decode_error(record: dict[str, Any], log_path: Path) -> EngineCacheError:
    """The inverse of :func:`encode_error`; a :class:`BuildError` and a bug get the log's path."""
    kind = _ERRORS.get(record["class"], EngineCacheError)
    if issubclass(kind, BuildError):
        return kind(record["what"], record["fix"], str(log_path))
    if kind is EngineCacheError:
        return kind(record["what"], f"{record['fix']}\nThe builder's log: {log_path}")
    return kind(record["what"], record["fix"])
