"""``check``: what an engine computes, against a reference."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginecache.cli.output import Column, print_json, print_rows, say
from enginecache.cli.parameters import (
    Asked,
    CheckSeed,
    InputRange,
    Inputs,
    Json,
    MaxError,
    asking,
    check_options,
    open_cache,
    path_value,
)
from enginecache.errors import CheckError, NotCachedError, OptionError, printable

if TYPE_CHECKING:
    from enginecache.quality.result import Check

_COLUMNS = (
    Column("profile", "word", is_wide=True, rank=4),
    Column("at", rank=2),
    Column("output", rank=0),
    Column("error", "number", rank=1),
    Column("absolute", "number", rank=3),
    Column("relative", "number", is_wide=True, rank=6),
    Column("cosine", "number", is_wide=True, rank=5),
    Column("nan", "word", is_wide=True, rank=7),
    Column("inf", "word", is_wide=True, rank=8),
)
_KEY = re.compile(r"[0-9a-f]{4,64}")
_WITH_KEY = {"model", "dir", "plugin"}
"""Options that say something of an engine which a key names."""


@asking
def check(
    asked: Asked,
    of: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE", help="The model of the engine, where a KEY stands in MODEL's place."),
    ] = None,
    inputs: Inputs = None,
    input_range: InputRange = None,
    check_seed: CheckSeed = 0,
    max_error: MaxError = None,
    json: Json = False,
) -> None:
    """Check what a stored engine computes.

    Its outputs are compared with those of ONNX Runtime on the CPU, and the result is kept. The engine runs on the GPU
    that is here. Where there is none, the graph that was converted for --fp16 or --bf16 is computed on the CPU instead,
    with every value rounded. Exits with 9 unless the check passed. The options are those of get, as they decide which
    engine is meant; or a KEY in MODEL's place, and --model. Needs the extra [check].

    A table on a terminal; on a pipe a line for each output and profile point, of tab-separated values: profile, point,
    output, error, largest absolute and relative error, cosine, NaN, infinities.

    \b
    Examples:
      enginecache check model.onnx --dim batch=1:32:64 --fp16
      enginecache check model.onnx --input-range input_ids=0:30521 --json
      enginecache check 3f9a --model model.onnx --inputs calibration.npz
    """
    options = check_options(inputs, input_range, check_seed, max_error)
    cache = open_cache(asked.dir)
    if of is not None:
        _refuse_others(asked)
        engine: Any = asked.model
        found = cache.check(engine, path_value("--model", of), options, plugins=asked.ask()["plugins"])
    else:
        _refuse_key(asked)
        ask = asked.ask()
        explanation = cache.explain(asked.path, **ask)
        if explanation.entry is None:
            what = f"there is no stored engine to check: {explanation.reasons[0].text}"
            raise NotCachedError(what, "Build one, and check it: `enginecache get --check` with the same options.")
        engine = explanation.entry
        found = cache.check(engine, asked.path, options, plugins=ask["plugins"])
    key = cache.find(engine if isinstance(engine, str) else engine.key).key
    if json:
        print_json({"key": key, **found.to_json()})
    else:
        say(printable(f"the engine {key[:12]} {found}"))
        print_rows(_COLUMNS, _rows(found))
    if found.verdict != "passed":
        raise typer.Exit(CheckError.exit_code)


def _refuse_others(asked: Asked) -> None:
    """Refuse options that say which engine is meant, next to a key, which says it already."""
    usual = {field.name: field.default for field in dataclasses.fields(Asked)}
    others = [name for name, value in vars(asked).items() if value != usual[name] and name not in _WITH_KEY]
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise OptionError(f"{flags} with --model: the key says which engine is meant", "Leave one of them out.")


def _refuse_key(asked: Asked) -> None:
    if _KEY.fullmatch(asked.model) and not Path(asked.model).exists():
        what = f"{asked.model} is not a file, and may be a key: the cache keeps engines, not models"
        raise OptionError(what, f"Name the model too: enginecache check {asked.model} --model FILE")


def _rows(found: Check) -> list[list[Any]]:
    return [
        [
            point.profile,
            point.at,
            output.name,
            output.problem or output.error,
            output.max_abs_error,
            output.max_rel_error,
            output.cosine,
            output.nan,
            output.inf,
        ]
        for point in found.points
        for output in point.outputs
    ]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(check)
