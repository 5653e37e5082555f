"""``ls``, ``show``, ``path``, ``stats`` and ``doctor``: they change nothing."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginecache.cli.output import (
    Column,
    key_facts,
    print_facts,
    print_json,
    print_line,
    print_path,
    print_rows,
    say,
)
from enginecache.cli.parameters import Dir, Json, Key, open_stored
from enginecache.config import Config
from enginecache.files.units import time_json
from enginecache.key.options import BuildOptions
from enginecache.pipeline.results import SCHEMA, record_json

if TYPE_CHECKING:
    from enginecache.maintenance.findings import Check
    from enginecache.maintenance.inspect import StoredEngines
    from enginecache.maintenance.removal import Used
    from enginecache.storage.registry.rows import EntryRecord, MissRecord

_COLUMNS = (
    Column("key", "key", rank=1),
    Column("model", rank=0),
    Column("backend", "word", is_wide=True, rank=6),
    Column("version", "word", is_wide=True, rank=5),
    Column("reach", rank=4),
    Column("device", is_wide=True, rank=9),
    Column("size", "size", rank=2),
    Column("build", "seconds", is_wide=True, rank=8),
    Column("created", "age", is_wide=True, rank=7),
    Column("last used", "age", rank=3),
    Column("pinned", "word", is_wide=True, rank=10),
    Column("adopted", "word", is_wide=True, rank=11),
    Column("check", "word", is_wide=True, rank=12),
)
_MISS_COLUMNS = (
    Column("key", "key", rank=1),
    Column("model", rank=4),
    Column("reason", "word", rank=0),
    Column("nearest", rank=3),
    Column("differing", rank=2),
    Column("misses", "word", rank=5),
    Column("last", "age", rank=6),
)
_BUILDS_SHOWN = 3
_LATEST_MISSES = 5
_USED_WITHIN_DAYS = (1, 30)


def ls(
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, max=10**9, metavar="N", help="Only the N newest.")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print keys alone.")] = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """List the stored engines, newest first.

    A table on a terminal; on a pipe a line for each, of tab-separated full values: key, model, backend, version,
    compute capabilities, device, bytes, seconds of the build, created, last used, pinned, adopted, verdict of the last
    check.

    \b
    Examples:
      enginecache ls
      enginecache ls --limit 10 --json
      enginecache ls -q | head -1
    """
    cache = open_stored(dir)
    used = cache.entries(limit)
    if json:
        print_json([engine_json(cache, item) for item in used])
    elif quiet:
        print_rows((Column("key"),), [[item.record.key] for item in used])
    else:
        print_rows(_COLUMNS, [_row(item) for item in used])
        if not used and cache.root.is_made:
            say(f"no engine is stored in {cache.root.path}")


def _row(used: Used) -> list[Any]:
    record = used.record
    return [
        record.key,
        record.model_name,
        record.backend,
        record.tensorrt_version,
        record.compute_capabilities,
        record.device_name,
        record.size_bytes,
        record.build_seconds,
        record.created_at,
        used.last_used_at,
        record.is_pinned,
        record.is_adopted,
        (record.check or {}).get("verdict"),
    ]


def engine_json(cache: StoredEngines, used: Used) -> dict[str, Any]:
    """Return the record of a listing."""
    return {
        **record_json(used.record, cache.path(used.record)),
        "last_used_at": time_json(used.last_used_at),
        "pinned": used.record.is_pinned,
    }


def show(key: Key, json: Json = False, dir: Dir = None) -> None:
    """Show what is known of one stored engine.

    First where it is and what it is for, then how it was built. Options at their defaults share one line, and empty
    fields are left out; --json has everything, with every field of the key.

    \b
    Examples:
      enginecache show 3f9a
      enginecache show 3f9a --json
    """
    cache = open_stored(dir)
    record = cache.find(key)
    if json:
        print_json(_shown(cache, record))
    else:
        print_facts(stored_facts(cache, record))


def stored_facts(cache: StoredEngines, record: EntryRecord) -> list[tuple[str, Any]]:
    """Return everything known of a stored engine, as ``show`` prints it."""
    shown = _shown(cache, record)
    return [*_engine_facts(shown), *_key_facts(record.fields), *_build_facts(shown)]


def _shown(cache: StoredEngines, record: EntryRecord) -> dict[str, Any]:
    shown = engine_json(cache, cache.with_last_use(record))
    shown["fields"] = record.fields
    shown["driver_version"] = record.driver_version
    shown["builds"] = [
        {
            "id": build.id,
            "state": build.state,
            "started_at": time_json(build.started_at),
            "build_seconds": build.build_seconds,
            "host": build.host,
            "reason": build.reason,
            "log": str(cache.log_path(build)),
        }
        for build in cache.builds(record.key)
    ]
    return shown


def _engine_facts(shown: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return what most readers look for."""
    names = ("path", "size_bytes", "backend", "tensorrt_version", "compute_capabilities", "device", "driver_version")
    uses = ("created_at", "build_seconds", "last_used_at", "pinned")
    facts = [("key", shown["key"]), ("model", shown["model"]["name"]), *((name, shown[name]) for name in names)]
    if shown["adopted"]:
        facts.append(("adopted", "another program built it; what was not verified is its owner's word"))
    for index, profile in enumerate(shown["fields"].get("profiles", [])):
        facts += [(f"profiles[{index}].{name}", _range_text(shapes)) for name, shapes in profile.items()]
    facts += [*((name, shown[name]) for name in uses), *_check_facts(shown["check"])]
    return [fact for fact in facts if not _is_empty(fact[1])]


def _check_facts(check: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the verdict of the last check, how far it went, and each output where it was worst."""
    if check is None:
        return []
    place = f" on {check['device']}" if check["device"] else ""
    what = f"{check['verdict']}, scope {check['scope']}{place}, against {check['reference']}, {check['checked_at']}"
    facts = [("check", what), ("check.reason", check["reason"]), ("check.tolerance", check["tolerance"])]
    return [*facts, *((f"check.error.{output['name']}", output["error"]) for output in check["outputs"])]


def _range_text(shapes: dict[str, Any]) -> str:
    """Return ``1x3x32x32..8x3x32x32..16x3x32x32`` as the reasons of a miss have it; one shape where all are equal."""
    between = "," if shapes.get("kind") == "values" else "x"
    corners = [between.join(map(str, shapes[corner])) for corner in ("min", "opt", "max")]
    return corners[0] if len(set(corners)) == 1 else "..".join(corners)


def _option_facts(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the options that were changed, then the names of the others."""
    defaults = BuildOptions().keyed()
    usual = [name for name, value in options.items() if value == defaults.get(name, value)]
    changed = [(f"options.{name}", value) for name, value in options.items() if name not in usual]
    return [*changed, ("options_at_default", usual)]


def _key_facts(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the other fields of the key: the options, changed ones first, then the fields that are not empty."""
    shown = {"target.compute_capabilities", "toolchain.flavour", "toolchain.version"}
    rest = {name: value for name, value in fields.items() if name not in {"options", "profiles"}}
    others = [(name, value) for name, value in key_facts(rest) if name not in shown or value == "portable"]
    filled = [fact for fact in others if fact[1] is not False and not _is_empty(fact[1])]
    return [*_option_facts(fields.get("options", {})), *filled]


def _build_facts(shown: dict[str, Any]) -> list[tuple[str, Any]]:
    facts = [("digest", shown["digest"]), ("model.digest", shown["model"]["digest"])]
    facts += [] if shown["timing_cache"] is None else [("timing_cache", shown["timing_cache"])]
    # What was adopted or imported was not built here: there is no host and no log.
    builds = [build for build in shown["builds"] if build["host"]]
    for index, build in enumerate(builds[:_BUILDS_SHOWN]):
        took = "" if build["build_seconds"] is None else f" after {build['build_seconds']:.1f} s"
        reason = f": {build['reason']}" if build["reason"] else ""
        what = f"{build['state']}{took}, started {build['started_at']} on {build['host']}{reason}"
        facts += [(f"builds[{index}]", what), (f"builds[{index}].log", build["log"])]
    more = len(builds) - _BUILDS_SHOWN
    return facts if more <= 0 else [*facts, ("builds", f"{more} more: see --json")]


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def path(key: Key, dir: Dir = None) -> None:
    """Print the path of a stored engine, checked as `get` does.

    \b
    Examples:
      enginecache path 3f9a
      trtexec --loadEngine=$(enginecache path 3f9a)
    """
    cache = open_stored(dir)
    print_path(cache.path(cache.find_intact(key)))


def stats(json: Json = False, dir: Dir = None) -> None:
    """Show counts, and the latest misses with their reasons.

    Hits are not counted, since a hit writes nothing but the time of the last use: `used_within_1d` and
    `used_within_30d` are the engines that were used within that time. A model is named where an engine of the key is
    stored, or was set aside.

    On a pipe a line for each, of the same nine tab-separated columns: `count`, what is counted, the number, and six
    empty ones; or `miss`, model, how often, key, reason, nearest key, its model, differing fields, when last.

    \b
    Examples:
      enginecache stats
      enginecache stats --json
    """
    cache = open_stored(dir)
    counts = vars(cache.stats()) | _use_counts(cache)
    misses = cache.misses(limit=_LATEST_MISSES)
    if json:
        latest = [
            {
                "key": miss.key,
                "model": miss.model_name,
                "reason": miss.reason,
                "nearest": miss.nearest_key,
                "nearest_model": miss.nearest_model,
                "differing": list(miss.differing),
                "count": miss.count,
                "last_at": time_json(miss.last_at),
            }
            for miss in misses
        ]
        print_json({"schema": SCHEMA, "dir": str(cache.root.path), **counts, "latest_misses": latest})
    elif sys.stdout.isatty():
        print_facts(list(counts.items()))
        if misses:
            print_line("")
            print_rows(_MISS_COLUMNS, list(map(_miss_row, misses)))
    else:
        rows: list[list[Any]] = [["count", name, number, *[None] * 6] for name, number in counts.items()]
        for m in misses:
            nearest = [m.nearest_key, m.nearest_model]
            rows.append(["miss", m.model_name, m.count, m.key, m.reason, *nearest, m.differing, m.last_at])
        print_rows((), rows)


def _use_counts(cache: StoredEngines) -> dict[str, int]:
    now, used = dt.datetime.now(dt.timezone.utc), cache.last_uses()
    return {
        f"used_within_{days}d": sum(at >= now - dt.timedelta(days=days) for at in used) for days in _USED_WITHIN_DAYS
    }


def _miss_row(miss: MissRecord) -> list[Any]:
    near = (miss.nearest_key or "")[:12]
    if miss.nearest_model not in {None, miss.model_name}:
        near += f" ({miss.nearest_model})"
    return [miss.key, miss.model_name, miss.reason, near, miss.differing, miss.count, miss.last_at]


def doctor(json: Json = False, dir: Dir = None) -> None:
    """Report what works here, what does not, and what to do.

    Looks at the settings, the folder, the registry, the GPUs and the TensorRT flavours. Exits with the code of the
    worst problem; a warning is none: it names what is missing and may not be needed. On a pipe a line for each, of
    tab-separated values: status, name, text, what to do.

    \b
    Examples:
      enginecache doctor
      enginecache doctor --json
    """
    from enginecache.maintenance import doctor as diagnosis

    checks = diagnosis.diagnose(Config.load(dir=dir))
    if json:
        print_json([check.to_json() for check in checks])
    elif sys.stdout.isatty():
        _show_checks(checks)
    else:
        print_rows((), [[check.status, check.name, check.text, check.fix] for check in checks])
    code = max((check.exit_code for check in checks), default=0)
    if code:
        raise typer.Exit(code)


def _show_checks(checks: Sequence[Check]) -> None:
    for check in checks:
        fix = check.fix if check.status != "ok" else ""
        for index, line in enumerate([check.text, *fix.splitlines()]):
            head = f"{check.status:<8} {check.name:<13}" if index == 0 else ""
            print_line(f"{head:<22} {line}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (ls, show, path, stats, doctor):
        app.command()(command)
