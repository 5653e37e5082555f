"""Options that several commands share, each written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from enginecache.cache import EngineCache
from enginecache.config import BACKENDS, Config
from enginecache.errors import EngineCacheError, OptionError
from enginecache.options import parse_size
from enginecache.profiles import ProfileRequest
from enginecache.request import Ask
from enginecache.store.root import Root
from enginecache.toolchain import NAMEABLE_COMPUTE_CAPABILITIES


def complete_key(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Keys that begin so, for shell completion; none where there is no cache, or it cannot be read."""
    try:
        folder = Config.load(dir=ctx.params.get("dir")).dir
        if not Root(folder).registry_path.exists():
            return []  # opening would make it
        used = EngineCache.open(dir=folder).entries()
    except EngineCacheError:
        return []
    return [(u.record.key[:16], u.record.model_name) for u in used if u.record.key.startswith(incomplete.lower())]


def _complete_backend(incomplete: str) -> list[str]:
    return [backend for backend in BACKENDS if backend.startswith(incomplete)]


def _complete_target(incomplete: str) -> list[str]:
    names = ("portable", *(capability.sm for capability in NAMEABLE_COMPUTE_CAPABILITIES))
    return [name for name in names if name.startswith(incomplete)]


Dir = Annotated[
    str | None,
    typer.Option(
        "--dir",
        metavar="FOLDER",
        help="Folder of the cache. Default: ENGINECACHE_DIR, else the user's cache folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: raw numbers, RFC 3339 times.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first letters.", autocompletion=complete_key)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]


def open_cache(folder: str | None) -> EngineCache:
    """The cache that ``--dir`` names, or the default one."""
    return EngineCache.open(dir=folder)


def path_value(flag: str, text: str) -> Path:
    """The value of an option that takes a path. An empty one is a mistake, and not the working folder.

    Raises:
        OptionError: It is empty.
    """
    if not text:
        raise OptionError(f"{flag} is empty", "Name a path; a variable of the shell may not be set.")
    return Path(text)


Value = TypeVar("Value")


def read_value(flag: str, text: str | None, read: Callable[[str], Value]) -> Value | None:
    """The value of an option that may be left out, read by ``read``.

    Raises:
        OptionError: ``read`` refused it; the message names the option.
    """
    try:
        return None if text is None else read(text)
    except OptionError as error:
        raise OptionError(f"{flag}: {error.what}", error.fix) from error


@dataclass(frozen=True)
class Asked:
    """The model, what was asked of its engine, and the cache to ask."""

    model: Path
    ask: Ask
    folder: str | None


def _asked(  # the parameters of every command that asks for an engine
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file.", show_default=False)],
    dim: Annotated[
        list[str] | None,
        typer.Option(
            "--dim",
            metavar="NAME=MIN:OPT:MAX",
            help="Sizes of a named ONNX dimension, in every input that has it; repeat for further names.",
        ),
    ] = None,
    min_shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--min-shapes",
            metavar="SHAPES",
            help="Smallest shapes, as in trtexec: x:1x3x32x32,y:1x10; repeat the three for a further profile.",
        ),
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
            "--backend",
            metavar="NAME",
            help=f"Who builds: {', '.join(BACKENDS)}. Default: auto.",
            autocompletion=_complete_backend,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="SM",
            help="GPU to build for: sm_89, 8.9, 89 or portable; repeat for several. Default: the device.",
            autocompletion=_complete_target,
        ),
    ] = None,
    device: Annotated[
        int | None, typer.Option("--device", metavar="N", help="CUDA device. Default: the one CUDA would use.")
    ] = None,
    dir: Dir = None,
) -> Asked:
    shapes = ProfileRequest.from_flags(min_shapes or (), opt_shapes or (), max_shapes or (), dim or ())
    if backend is not None and backend not in BACKENDS:
        raise OptionError(f"--backend: {backend!r} is not a backend", f"Choose one of {', '.join(BACKENDS)}.")
    if device is not None and device < 0:
        raise OptionError(f"--device: {device} is not a device", "CUDA counts from 0; `enginecache doctor` lists them.")
    ask: Ask = {
        "profiles": shapes.shapes,
        "dims": shapes.dims,
        "workspace_bytes": read_value("--workspace", workspace, parse_size),
        "optimization_level": opt_level,
        "backend": backend,  # type: ignore[typeddict-item]  # checked above
        "target": target,
        "device": device,
    }
    return Asked(path_value("MODEL", model), ask, dir)


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
    # Not get_type_hints: before Python 3.11 it hides an Annotated whose default is None inside an Optional.
    return [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
    ]
