"""``get`` and ``explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from enginecache.cli.output import print_json, say, warn
from enginecache.cli.parameters import Asked, Json, asking, duration_option, open_cache
from enginecache.cli.progress import BuildDisplay
from enginecache.entry import Entry, Explanation
from enginecache.key import canonical_json
from enginecache.store.export import export_plan


@asking
def get(
    asked: Asked,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also put a copy of the plan there.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never build; exit 3 where nothing is stored.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even if an engine is stored.")] = False,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout", metavar="TIME", help="Longest wait for another builder, such as 30m; not for the build."
        ),
    ] = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors and warnings.")] = False,
) -> None:
    """Print the path of the engine for MODEL, building it where there is none.

    Standard output has the path alone, so that it can stand inside another command.

    \b
    Examples:
      enginecache get model.onnx
      enginecache get model.onnx --dim batch=1:32:64 --workspace 1GiB
      enginecache get model.onnx --target sm_89 --target sm_120 --json
      trtexec --loadEngine=$(enginecache get model.onnx)
    """
    cache = open_cache(asked.folder)
    with BuildDisplay(asked.model.name, is_quiet=quiet) as display:
        entry = cache.get(
            asked.model,
            offline=offline,
            rebuild=rebuild,
            timeout_s=duration_option(timeout),
            progress=display.progress,
            waiting=display.waiting,
            **asked.ask,
        )
    if output is not None:
        export_plan(entry.path, output)
    _tell(entry, is_quiet=quiet)
    if json:
        print_json(entry.to_json())
    else:
        print(entry.path)


def _tell(entry: Entry, *, is_quiet: bool) -> None:
    for reason in entry.reasons:
        if reason.code == "warning":
            warn(reason.text)
    if is_quiet:
        return
    why = "; ".join(reason.text for reason in entry.reasons if reason.code != "warning")
    reach = ", ".join(entry.record.compute_capabilities)
    what = f"{entry.record.backend} {entry.record.tensorrt_version}, compute capability {reach}"
    say(f"{entry.outcome} in {entry.elapsed_seconds:.2f} s ({what}): {why}")


@asking
def explain(asked: Asked, json: Json = False) -> None:
    """Say whether `get` would hit or miss with the same options, and why. Builds nothing.

    \b
    Examples:
      enginecache explain model.onnx
      enginecache explain model.onnx --dim batch=1:32:64 --json
    """
    explanation = open_cache(asked.folder).explain(asked.model, **asked.ask)
    if json:
        print_json(explanation.to_json())
        return
    _print_explanation(explanation)


def _print_explanation(explanation: Explanation) -> None:
    print(f"{explanation.verdict}: {explanation.reasons[0].text}")
    print(f"key      {explanation.key}")
    for group, value in explanation.fields.items():
        print(f"  {group:<10} {canonical_json(value)}")
    if explanation.entry is not None:
        print(f"digest   {explanation.entry.digest}")
    for reason in explanation.reasons[1:]:
        print(f"{reason.code}: {reason.text}")
    for neighbour in explanation.neighbours:
        print(f"nearest  {neighbour.record.key}  {neighbour.record.model_name}")
        for difference in neighbour.differing:
            print(f"  {difference}")
    if explanation.failure:
        print(f"the last attempt failed: {explanation.failure}")
        print(f"  log: {explanation.failure_log}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(get)
    app.command()(explain)
