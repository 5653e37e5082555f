"""Options that several commands share, each written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from enginecache.cache import EngineCache
from enginecache.config import Backend, parse_duration_s
from enginecache.errors import EngineCacheError, OptionError
from enginecache.options import parse_size
from enginecache.profiles import ProfileRequest
from enginecache.request import Ask

BACKENDS = get_args(Backend)


def complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Keys that begin so, for shell completion; none where the cache cannot be read."""
    try:
        used = EngineCache.open().entries()
    except EngineCacheError:
        return []
    return [(u.record.key[:16], u.record.model_name) for u in used if u.record.key.startswith(incomplete)]


def _complete_backend(incomplete: str) -> list[str]:
    return [backend for backend in BACKENDS if backend.startswith(incomplete)]


Dir = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the cache. Default: ENGINECACHE_DIR, else the user's cache folder."),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON record: raw numbers, RFC 3339 times.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first letters.", autocompletion=complete_key)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]


def open_cache(folder: Path | None) -> EngineCache:
    """The cache that ``--dir`` names, or the default one."""
    return EngineCache.open(dir=folder)


def size_option(text: str | None) -> int | None:
    """The value of an option that takes a size."""
    return None if text is None else parse_size(text)


def duration_option(text: str | None) -> float | None:
    """The value of an option that takes a duration, in seconds."""
    try:
        return None if text is None else parse_duration_s(text)
    except ValueError as error:
        raise OptionError(str(error), "Write it as 30m, 45s, 2h or 30d.") from error


@dataclass(frozen=True)
class Asked:
    """The model, what was asked of its engine, and the cache to ask."""

    model: Path
    ask: Ask
    folder: Path | None


def _asked(  # the parameters of every command that asks for an engine
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.", show_default=False)],
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="NAME=MIN:OPT:MAX", help="Sizes of a named ONNX dimension, in every input."),
    ] = None,
    min_shapes: Annotated[
        list[str] | None,
        typer.Option("--min-shapes", metavar="SHAPES", help="x:1x3x32x32,y:1x10 as in trtexec; repeat for a profile."),
    ] = None,
    opt_shapes: Annotated[
        list[str] | None,
        typer.Option("--opt-shapes", metavar="SHAPES", help="Shapes to tune for; alone: the only ones."),
    ] = None,
    max_shapes: Annotated[
        list[str] | None, typer.Option("--max-shapes", metavar="SHAPES", help="Largest shapes.")
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option("--workspace", metavar="SIZE", help="Workspace limit, such as 1GiB. Default: TensorRT's."),
    ] = None,
    opt_level: Annotated[
        int | None, typer.Option("--opt-level", metavar="N", help="Optimization level, 0 to 5. Default: 3.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", metavar="|".join(BACKENDS), help="TensorRT flavour.", autocompletion=_complete_backend
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="SM", help="GPU to build for: sm_89, 8.9, 89 or portable; repeatable."),
    ] = None,
    device: Annotated[
        int | None, typer.Option("--device", metavar="N", help="CUDA device. Default: the one CUDA would use.")
    ] = None,
    dir: Dir = None,
) -> Asked:
    shapes = ProfileRequest.from_flags(min_shapes or (), opt_shapes or (), max_shapes or (), dim or ())
    if backend is not None and backend not in BACKENDS:
        raise OptionError(f"{backend!r} is not a backend", f"Choose one of {', '.join(BACKENDS)}.")
    ask: Ask = {
        "profiles": shapes.shapes,
        "dims": shapes.dims,
        "workspace_bytes": size_option(workspace),
        "optimization_level": opt_level,
        "backend": backend,  # type: ignore[typeddict-item]  # checked above
        "target": target,
        "device": device,
    }
    return Asked(model, ask, dir)


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose first parameter is an :class:`Asked` the options that make one."""
    shared = _parameters(_asked)
    own = _parameters(command)[1:]
    names = {parameter.name for parameter in shared}

    def run(**values: Any) -> None:
        asked = _asked(**{name: value for name, value in values.items() if name in names})
        command(asked, **{name: value for name, value in values.items() if name not in names})

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*shared, *own]}
    return run


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
    ]
