"""What crosses the pipes of a trial, as plain JSON values. Not pickle: no line may run anything."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from enginecache.host.targets import Reach
from enginecache.key.options import PluginLibrary
from enginecache.trt.load.request import Failure, LoadRequest


def encode_request(request: LoadRequest) -> dict[str, Any]:
    """A request as plain JSON values."""
    return {
        **asdict(request),
        "path": str(request.path),
        "reach": request.reach.to_texts(),
        "plugins": [[str(plugin.path), plugin.digest] for plugin in request.plugins],
    }


def decode_request(record: dict[str, Any]) -> LoadRequest:
    """The inverse of :func:`encode_request`."""
    fields = {name: record[name] for name in LoadRequest.__dataclass_fields__}
    changed = {
        "path": Path(record["path"]),
        "reach": Reach.from_texts(record["reach"]),
        "plugins": tuple(PluginLibrary(Path(path), digest) for path, digest in record["plugins"]),
    }
    return LoadRequest(**{**fields, **changed})


def encode_failure(failure: Failure) -> dict[str, Any]:
    """A failure as plain JSON values."""
    return asdict(failure)


def decode_failure(record: dict[str, Any]) -> Failure:
    """The inverse of :func:`encode_failure`."""
    return Failure(record["kind"], tuple(record["lines"]), tuple(record["diagnostics"]), record["what"])
