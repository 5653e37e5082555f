"""Requests and errors as they cross the pipes between a builder's two processes: one JSON line down, lines up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from enginecache import errors
from enginecache.errors import BuilderKilledError, BuildError, EngineCacheError
from enginecache.files.plain import from_plain, to_plain
from enginecache.host.targets import Reach
from enginecache.trt.build.request import BuildRequest

MODEL_NAME = "model.onnx"
PLAN_NAME = "plan.engine"
TIMING_CACHE_NAME = "timing.cache"
CONVERTED_NAME = "converted"
CONVERTED_WEIGHTS_NAME = "weights.data"
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
    """Return a request as plain JSON values. Bytes of a model or timing cache go through files of the build's folder.

    The environment stays behind: it is the worker's own.
    """
    source = replace(request.source, data=None)
    return {
        **to_plain(replace(request, source=source, timing_cache=None, environment=None)),
        "has_data": request.source.data is not None,
        "has_timing_cache": request.timing_cache is not None,
    }


def decode_request(record: dict[str, Any]) -> BuildRequest:
    """Return the request of :func:`encode_request`; reads bytes from the build's folder."""
    request = from_plain(BuildRequest, record)
    if record["has_data"]:
        data = (request.work_dir / MODEL_NAME).read_bytes()
        request = replace(request, source=replace(request.source, data=data))
    if record["has_timing_cache"]:
        request = replace(request, timing_cache=(request.work_dir / TIMING_CACHE_NAME).read_bytes())
    return request


def encode_done(
    reach: Reach, loaded_version: str, warnings: tuple[str, ...], *, took_timing_cache: bool
) -> dict[str, Any]:
    """Return the report that the plan, and the timing cache where there is one, are written and closed."""
    return {
        "event": "done",
        "reach": to_plain(reach),
        "loaded_version": loaded_version,
        "warnings": warnings,
        "took_timing_cache": took_timing_cache,
    }


def encode_error(error: EngineCacheError) -> dict[str, Any]:
    """Return the report of why there is no plan."""
    return {"event": "error", "class": type(error).__name__, "what": error.what, "fix": error.fix}


def decode_error(record: dict[str, Any], log_path: Path) -> EngineCacheError:
    """Return the error of :func:`encode_error`; a :class:`BuildError` and a bug get the log's path."""
    kind = _ERRORS.get(record["class"], EngineCacheError)
    if issubclass(kind, BuildError):
        return kind(record["what"], record["fix"], str(log_path))
    if kind is EngineCacheError:
        return kind(record["what"], f"{record['fix']}\nThe builder's log: {log_path}")
    return kind(record["what"], record["fix"])
