"""``get`` and ``explain``."""

from __future__ import annotations

import contextlib
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enginecache.cli.output import encoded, json_line, key_facts, path_line, print_json, put, say, warn
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
    read_value,
)
from enginecache.cli.progress import BuildDisplay
from enginecache.config import Config, unknown_variables
from enginecache.errors import EngineCacheError, NotCachedError, OptionError, printable
from enginecache.files.canonical import canonical_json
from enginecache.files.units import parse_duration_s
from enginecache.host.evidence import ELAPSED

if TYPE_CHECKING:
    from enginecache.cache import EngineCache
    from enginecache.cli.remember import Before
    from enginecache.pipeline.results import Entry, Explanation

CANDIDATES_SHOWN = 10


@asking
def get(
    asked: Asked,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Also put a copy of the plan there.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never build; exit 3 if no stored engine fits.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build even if an engine is stored, or a failure is remembered.")
    ] = False,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout", metavar="TIME", help="Longest wait for another builder, such as 30m; not for the build."
        ),
    ] = None,
    no_timing_cache: Annotated[
        bool, typer.Option("--no-timing-cache", help="Measure every tactic again, and keep no timings. TensorRT only.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare what the engine computes with ONNX Runtime, before it is published. A failed check: exit 9.",
        ),
    ] = False,
    require_check: Annotated[
        bool,
        typer.Option(
            "--require-check",
            help="Refuse an engine without a passed check; check a stored one first if needed.",
        ),
    ] = False,
    inputs: Inputs = None,
    input_range: InputRange = None,
    check_seed: CheckSeed = 0,
    max_error: MaxError = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only errors and warnings.")] = False,
) -> None:
    """Print the path of the engine for MODEL; build it first if needed.

    Standard output carries only the path, so that the command can stand inside another one.

    \b
    Examples:
      enginecache get model.onnx
      enginecache get model.onnx --dim batch=1:32:64 --workspace 1GiB
      enginecache get model.onnx --target sm_89 --target sm_120 --json
      enginecache get model.onnx --target sm_89 --fp16 --check
      trtexec --loadEngine=$(enginecache get model.onnx --backend tensorrt)
    """
    ask = asked.ask()
    how = check_options(inputs, input_range, check_seed, max_error)
    if how is not None and not (check or require_check):
        raise OptionError("options of a check are given without a check", "Add --check or --require-check.")
    timeout_s = read_value("--timeout", timeout, parse_duration_s)
    copy = None if output is None else _copy_path(output, asked)
    cache = open_cache(asked.dir)
    is_plain = not (rebuild or check or require_check or asked.verify_model)
    before = _look(cache) if copy is None and is_plain else None
    with BuildDisplay(asked.path.name, is_quiet=quiet) as display:
        entry = cache.get(
            asked.path,
            offline=offline,
            rebuild=rebuild,
            timeout_s=timeout_s,
            timing_cache=not no_timing_cache,
            check=check if how is None else how,
            require_check=require_check,
            progress=display.progress,
            waiting=display.waiting,
            made=None if quiet else _say_made,
            **ask,
        )
    if copy is not None:
        from enginecache.pipeline.copy import export_plan

        export_plan(entry.path, copy, keep_out=cache.root.path)
    _tell(entry, is_quiet=quiet)
    if copy is not None and not quiet:
        say(f"copied to {copy}")
    put(_printed(entry, is_json=json), is_answer=True)
    if before is not None:
        said = "" if quiet else f"{_said(entry, ELAPSED)}\n"
        _remember(cache, before, asked.path, entry, said, _printed(entry, is_json=json, elapsed=ELAPSED))


def _look(cache: EngineCache) -> Before | None:
    """Look at what the answer will depend on, before it is asked for; None if it cannot be remembered."""
    from enginecache.cli.remember import look

    with contextlib.suppress(OSError, ValueError):
        return look(cache, sys.argv[1:])
    return None


def _remember(cache: EngineCache, before: Before, model: Path, entry: Entry, said: str, printed: str) -> None:
    """Let the same command line be answered the same way by the fast path. Best effort: the answer was given."""
    from enginecache.cli.remember import remember

    warned = "".join(f"{printable(f'warning: {text}')}\n" for text in unknown_variables())  # as by every command
    with contextlib.suppress(EngineCacheError, OSError, ValueError):
        remember(cache, before, model, entry, (warned + said).encode(), encoded(printed), sys.argv[1:])


def _copy_path(text: str, asked: Asked) -> Path:
    """Return where ``-o`` puts the copy; refuse a bad place before anything is made or built."""
    from enginecache.pipeline.copy import check_target

    path = path_value("-o", text)
    if text == "-":
        raise OptionError(
            "-o: a plan is not written to standard output", "Name a file; the path that is printed has it."
        )
    if text.endswith(("/", "/.")) and not path.is_dir():
        raise OptionError(f"-o: {text} names a folder, and there is none", f"Name the file, such as -o {path}.plan.")
    check_target(path, Config.load(dir=asked.dir).dir, asked.path)
    return path


def _say_made(folder: Path) -> None:
    say(f"made a new cache in {folder}")


_WARNED = {"warning", "corrupt", "older_driver"}


def _tell(entry: Entry, *, is_quiet: bool) -> None:
    for reason in entry.reasons:
        if reason.code in _WARNED:
            warn(reason.text)
    if entry.outcome == "compatible":
        ways = "; ".join(reason.text for reason in entry.reasons if reason.code not in _WARNED)
        warn(f"the engine {entry.key[:12]} is not the one that was asked for: {ways}")
    if not is_quiet:
        say(_said(entry, f"{entry.elapsed_seconds:.2f}"))


def _said(entry: Entry, elapsed: str) -> str:
    why = "; ".join(reason.text for reason in entry.reasons if reason.code not in _WARNED | {"new_cache"})
    why = "a stored engine runs on the GPUs that were asked for" if entry.outcome == "compatible" else why
    reach = ", ".join(entry.record.compute_capabilities)
    what = f"{entry.record.backend} {entry.record.tensorrt_version}, compute capability {reach}, key {entry.key[:12]}"
    return f"{entry.outcome} in {elapsed} s {printable(f'({what}): {why}')}"


def _printed(entry: Entry, *, is_json: bool, elapsed: str = "") -> str:
    """Return the text for standard output: the path, or the record, with ``elapsed`` in place of the seconds."""
    if not is_json:
        return path_line(entry.path)
    record = entry.to_json()
    if not elapsed:
        return json_line(record)
    return json_line({**record, "elapsed_seconds": elapsed}).replace(dumps(elapsed), elapsed)


@asking
def explain(
    asked: Asked,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also the key's fields, and every stored engine of the model.")
    ] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 3 on a miss, to gate a deployment.")] = False,
    json: Json = False,
) -> None:
    """Say whether `get` would hit or miss, and why. Builds nothing.

    Takes the options that decide the engine, as `get` does. Exit 0 for a hit and a miss alike, but with --exit-code.

    \b
    Examples:
      enginecache explain model.onnx
      enginecache explain model.onnx --dim batch=1:32:64 --verbose
      enginecache explain model.onnx --exit-code
    """
    ask = asked.ask()
    explanation = open_cache(asked.dir).explain(asked.path, **ask)
    if json:
        print_json(explanation.to_json())
    elif verbose:
        _print_explanation(explanation)
    else:
        _print_verdict(explanation)
    if exit_code and explanation.verdict == "miss":
        raise typer.Exit(NotCachedError.exit_code)


def _print_verdict(explanation: Explanation) -> None:
    lines = [f"{explanation.verdict}: {explanation.reasons[0].text}"]
    lines += [f"{reason.code}: {reason.text}" for reason in explanation.reasons[1:]]
    lines += _check_lines(explanation)
    if explanation.verdict != "hit" and explanation.candidates:
        nearest = explanation.candidates[0]
        lines.append(f"nearest: {nearest.record.key[:12]}  {nearest.record.model_name}")
        lines += [f"  {reason.text}" for reason in nearest.verdict.reasons]
    lines += _failure_lines(explanation)
    put("".join(f"{printable(line)}\n" for line in lines))


def _check_lines(explanation: Explanation) -> list[str]:
    """Return the result of the last check of the engine that serves the request, if there was one."""
    check = None if explanation.entry is None else explanation.entry.check
    if check is None:
        return []
    why = f": {check['reason']}" if check["reason"] else ""
    return [f"check: {check['verdict']}, scope {check['scope']}, {check['checked_at']}{why}"]


def _print_explanation(explanation: Explanation) -> None:
    lines = [f"{explanation.verdict}: {explanation.reasons[0].text}"]
    lines += [f"{reason.code}: {reason.text}" for reason in explanation.reasons[1:]]
    lines.append(f"key      {explanation.requested_key}")
    for name, item in key_facts(explanation.fields):
        is_reach = name == "target.compute_capabilities" and isinstance(item, list)
        lines.append(f"  {name}: {', '.join(item) if is_reach else canonical_json(item)}")
    if explanation.entry is not None:
        if explanation.key != explanation.requested_key:
            lines.append(f"stored   {explanation.key}")
        lines.append(f"digest   {explanation.entry.digest}")
    lines += _check_lines(explanation)
    for candidate in explanation.candidates[:CANDIDATES_SHOWN]:
        level = candidate.verdict.level
        lines.append(f"{level:<11} {candidate.record.key}  {candidate.record.model_name}")
        lines += [f"  {reason.text}" for reason in candidate.verdict.reasons]
    more = len(explanation.candidates) - CANDIDATES_SHOWN
    if more > 0:
        lines.append(f"and {more} more of this model: see --json")
    lines += _failure_lines(explanation)
    put("".join(f"{printable(line)}\n" for line in lines))


def _failure_lines(explanation: Explanation) -> list[str]:
    """Say why the last attempt failed, unless it is among the reasons, and where its log is."""
    if not explanation.failure:
        return []
    if any(reason.code == "failed" for reason in explanation.reasons):
        return [f"log: {explanation.failure_log}"]
    return [f"the last attempt failed: {explanation.failure}", f"  log: {explanation.failure_log}"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(get)
    app.command()(explain)
