"""Options that several commands share, each declared once."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from enginecache.cli.output import say
from enginecache.config import BACKENDS, Backend, Config
from enginecache.errors import OptionError
from enginecache.files.units import parse_workspace
from enginecache.host.toolchain import NAMEABLE_COMPUTE_CAPABILITIES
from enginecache.key.matching import Accept
from enginecache.key.options import PRECISIONS, HardwareCompatibility
from enginecache.key.profiles import ProfileRequest
from enginecache.pipeline.request import Ask

if TYPE_CHECKING:
    from enginecache.cache import EngineCache
    from enginecache.exchange.engines import PortableEngines
    from enginecache.maintenance.inspect import StoredEngines
    from enginecache.quality.check import CheckOptions
    from enginecache.storage.folder import Root


def complete_key(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the keys with this beginning, for shell completion; none if there is no cache, or it cannot be read."""
    try:
        from enginecache.storage.folder import Root
        from enginecache.storage.storage import Storage

        config = Config.load(dir=ctx.params.get("dir"))
        found = Storage(Root.find(config.dir, config.shared)).reader.find_prefix(incomplete.lower(), limit=50)
    except Exception:  # noqa: BLE001  a completion must not write into the command line
        return []
    return [(record.key[:16], record.model_name) for record in found]


_TARGETS = ("portable", *(capability.sm for capability in NAMEABLE_COMPUTE_CAPABILITIES))


def _complete_target(incomplete: str) -> list[str]:
    return [name for name in _TARGETS if name.startswith(incomplete)]


Dir = Annotated[
    str | None,
    typer.Option(
        "--dir",
        metavar="FOLDER",
        help="Folder of the cache. Default: ENGINECACHE_DIR, else the user's cache folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: raw numbers, RFC 3339 times.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first characters.", autocompletion=complete_key)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")]

Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--inputs",
        metavar="FILE.npz",
        help="Check with these inputs: an array for each, from numpy.savez. Repeat for more. Never unpickled.",
    ),
]
InputRange = Annotated[
    list[str] | None,
    typer.Option(
        "--input-range",
        metavar="NAME=LOW:HIGH",
        help="Check with values of this range in an input, such as indices or a mask: ids=0:30521. Repeat for others.",
    ),
]
CheckSeed = Annotated[
    int, typer.Option("--check-seed", metavar="N", help="What the check's inputs are made from. Default: 0.")
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        metavar="X",
        help="Largest error that passes the check, of an output's largest value. Default: by precision.",
    ),
]


def check_options(
    inputs: list[str] | None, ranges: list[str] | None, seed: int, max_error: float | None
) -> CheckOptions | None:
    """Return the options of a check; None if they are the defaults.

    Raises:
        OptionError: A value cannot be read, or an input is named twice.
    """
    if not inputs and not ranges and seed == 0 and max_error is None:
        return None
    from enginecache.quality.check import CheckOptions
    from enginecache.quality.inputs import parse_range

    named: dict[str, tuple[float, float]] = {}
    for name, limits in map(parse_range, ranges or ()):
        if named.setdefault(name, limits) != limits:
            raise OptionError(f"--input-range {name} is given twice with different ranges", "Give it once.")
    options = CheckOptions(tuple(path_value("--inputs", path) for path in inputs or ()), named, seed, max_error)
    options.require_valid()
    return options


def open_cache(folder: str | None) -> EngineCache:
    """Open the cache that ``--dir`` names, or the default one, for a command that may build."""
    from enginecache.cache import EngineCache  # here, for a quick --help

    _collect_garbage()
    cache = EngineCache.open(dir=folder)
    cache.remembers_hits = False  # nobody asks this process again
    return cache


def open_stored(folder: str | None) -> StoredEngines:
    """Open the stored engines of the same cache, for a command that builds nothing."""
    from enginecache.maintenance.inspect import StoredEngines  # loads in two thirds of the time of the whole cache

    _collect_garbage()
    cache = StoredEngines(existing_config(folder))
    say_if_missing(cache.root)
    return cache


def open_portable(folder: str | None) -> PortableEngines:
    """Open the same, for a command that carries engines elsewhere."""
    from enginecache.exchange.engines import PortableEngines

    _collect_garbage()
    cache = PortableEngines(existing_config(folder))
    say_if_missing(cache.root)
    return cache


def say_if_missing(root: Root) -> None:
    """Say that there is no cache in the folder; otherwise it looks like a cache without engines."""
    if not root.is_made:
        say(f"there is no cache in {root.path} yet: `enginecache get` makes one")


def _collect_garbage() -> None:
    """Collect garbage from here on, since all modules are loaded; rarely, as most rows live as long as the command."""
    gc.enable()
    gc.set_threshold(100_000, 50)


def existing_config(folder: str | None) -> Config:
    """Return the settings, for a command that makes no cache. The default folder may be missing.

    Raises:
        OptionError: The folder that ``--dir``, a variable or the settings file names does not exist. It may be
            mistyped, and is not made by looking.
    """
    config = Config.load(dir=folder)
    if config.dir_from and not os.path.lexists(config.dir):
        named_by = config.dir_from if folder is None else "--dir"
        message = f"{named_by}: there is no cache in {config.dir}: the folder does not exist"
        raise OptionError(message, "Name the folder that `enginecache get` was given; `get` makes it.")
    return config


def path_value(flag: str, text: str) -> Path:
    """Return the value of an option that takes a path. An empty one is a mistake, not the working folder.

    Raises:
        OptionError: It is empty.
    """
    if not text:
        raise OptionError(f"{flag} is empty", "Name a path; a variable of the shell may not be set.")
    return Path(text)


Value = TypeVar("Value")


def read_value(flag: str, text: str | None, read: Callable[[str], Value]) -> Value | None:
    """Return the value of an option that may be left out, parsed by ``read``.

    Raises:
        OptionError: ``read`` refused it; the message names the option.
    """
    try:
        return None if text is None else read(text)
    except OptionError as error:
        raise OptionError(f"{flag}: {error.what}", error.fix) from error


@dataclass(frozen=True)
class Asked:
    """Options of every command that asks for an engine: the model, what its engine must be, and the cache to ask."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file.", show_default=False)]
    dim: Annotated[
        list[str] | None,
        typer.Option(
            "--dim",
            metavar="NAME=MIN:OPT:MAX",
            help="Sizes of a named ONNX dimension, in every input that has it: batch=1:32:64, or one size: height=320. "
            "Repeat for further names.",
        ),
    ] = None
    min_shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--min-shapes",
            metavar="SHAPES",
            help="Smallest shapes, as in trtexec: x:1x3x32x32,y:1x10; repeat the three for a further profile.",
        ),
    ] = None
    opt_shapes: Annotated[
        list[str] | None,
        typer.Option("--opt-shapes", metavar="SHAPES", help="Shapes to tune for; alone: the only ones."),
    ] = None
    max_shapes: Annotated[list[str] | None, typer.Option("--max-shapes", metavar="SHAPES", help="Largest shapes.")] = (
        None
    )
    workspace: Annotated[
        str | None,
        typer.Option(
            "--workspace",
            metavar="SIZE",
            help="Workspace limit, such as 1GiB; a bare number is MiB. Default: TensorRT's.",
        ),
    ] = None
    opt_level: Annotated[
        int | None, typer.Option("--opt-level", metavar="N", help="Optimization level, 0 to 5. Default: 3.")
    ] = None
    fp16: Annotated[bool, typer.Option("--fp16", help="FP16 where it is faster; see docs/precision.md.")] = False
    bf16: Annotated[bool, typer.Option("--bf16", help="BF16 likewise.")] = False
    int8: Annotated[bool, typer.Option("--int8", help="INT8, for a model with Q/DQ nodes.")] = False
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8, for a model with Q/DQ nodes.")] = False
    convert_io: Annotated[
        bool,
        typer.Option(
            "--convert-io",
            help="When the graph is converted to FP16 or BF16, convert its inputs and outputs too (they keep their "
            "types by default).",
        ),
    ] = False
    hardware_compatibility: Annotated[
        HardwareCompatibility,
        typer.Option(
            "--hardware-compatibility",
            metavar="LEVEL",
            help="Hardware compatibility level: none (this GPU model only), same_compute_capability, ampere_plus. "
            "TensorRT only. Default: none.",
            show_default=False,
        ),
    ] = "none"
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="A plan for later releases too. TensorRT only.")
    ] = False
    strip_plan: Annotated[bool, typer.Option("--strip-plan", help="A plan without weights, to be refitted.")] = False
    builder_flag: Annotated[
        list[str] | None,
        typer.Option(
            "--builder-flag",
            metavar="NAME",
            help="Set a builder flag by TensorRT's name; NAME=OFF clears it. Repeat for several.",
        ),
    ] = None
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="Library of TensorRT plugins; repeat for several."),
    ] = None
    backend: Annotated[
        Backend | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help=f"Who builds: {', '.join(BACKENDS)}. Default: auto.",
        ),
    ] = None
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="SM",
            help="GPU to build for: sm_89, 8.9, 89 or portable; repeat for several. Default: the device.",
            autocompletion=_complete_target,
        ),
    ] = None
    device: Annotated[
        int | None, typer.Option("--device", metavar="N", help="CUDA device. Default: the one CUDA would use.")
    ] = None
    accept: Annotated[
        Accept,
        typer.Option(
            "--accept",
            metavar="LEVEL",
            help="compatible: also take, and mark, a stored engine that runs here and is not quite what was asked. "
            "Default: exact.",
            show_default=False,
        ),
    ] = "exact"
    verify_model: Annotated[
        bool, typer.Option("--verify-model", help="Read the model again, though its files look unchanged.")
    ] = False
    dir: Dir = None

    @property
    def path(self) -> Path:
        """Return the model's path."""
        return path_value("MODEL", self.model)

    def ask(self) -> Ask:
        """Return what is asked of the engine, as keywords of :meth:`enginecache.EngineCache.get`."""
        shapes = ProfileRequest.from_flags(
            self.min_shapes or (), self.opt_shapes or (), self.max_shapes or (), self.dim or ()
        )
        return {
            "profiles": shapes.shapes,
            "dims": shapes.dims,
            "workspace_bytes": read_value("--workspace", self.workspace, parse_workspace),
            "optimization_level": self.opt_level,
            "precision": [name for name in PRECISIONS if getattr(self, name)],
            "convert_io": self.convert_io,
            "hardware_compatibility": self.hardware_compatibility,
            "version_compatible": self.version_compatible,
            "strip_plan": self.strip_plan,
            "builder_flags": self.builder_flag or (),
            "plugins": [path_value("--plugin", path) for path in self.plugin or ()],
            "backend": self.backend,
            "target": self.target,
            "device": self.device,
            "accept": self.accept,
            "verify_model": self.verify_model,
        }


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose first parameter is an :class:`Asked` the options that make one."""
    return _with_options(command, _parameters(Asked))


def asking_about_a_file(command: Callable[..., None]) -> Callable[..., None]:
    """Like :func:`asking`, for a command whose argument is another file: the model is an option."""
    model = typer.Option("--model", metavar="MODEL", help="The ONNX file that it was built from.", show_default=False)
    shared = [
        parameter.replace(annotation=Annotated[str, model]) if parameter.name == "model" else parameter
        for parameter in _parameters(Asked)
        if parameter.name != "accept"
    ]
    return _with_options(command, shared)


def _with_options(command: Callable[..., None], shared: list[inspect.Parameter]) -> Callable[..., None]:
    own = _parameters(command)[1:]
    names = {parameter.name for parameter in shared}

    def run(**values: Any) -> None:
        asked = Asked(**{name: value for name, value in values.items() if name in names})
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
