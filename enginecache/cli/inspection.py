"""``ls``, ``show``, ``path``, ``stats`` and ``doctor``: they change nothing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from enginecache import doctor as diagnosis
from enginecache.cache import EngineCache
from enginecache.cli.output import Column, print_json, print_rows
from enginecache.cli.parameters import Dir, Json, Key, open_cache
from enginecache.config import Config
from enginecache.entry import record_json, time_json
from enginecache.eviction import Used
from enginecache.options import format_size

_COLUMNS = (
    Column("key", "key"),
    Column("model"),
    Column("backend"),
    Column("version"),
    Column("compute capabilities"),
    Column("device"),
    Column("size", "size"),
    Column("build", "seconds"),
    Column("created", "age"),
    Column("last used", "age"),
    Column("pinned"),
)


def ls(
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the N newest.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print keys alone.")] = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """List the stored engines, newest first: a table on a terminal, tab-separated full values on a pipe.

    \b
    Examples:
      enginecache ls
      enginecache ls --limit 10 --json
      enginecache ls -q | head -1
    """
    cache = open_cache(dir)
    used = cache.entries(limit)
    if json:
        print_json([_json(cache, item) for item in used])
    elif quiet:
        print_rows((Column("key"),), [[item.record.key] for item in used])
    else:
        print_rows(_COLUMNS, [_row(item) for item in used])


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
    ]


def _json(cache: EngineCache, used: Used) -> dict[str, Any]:
    return {
        **record_json(used.record, cache.path(used.record)),
        "last_used_at": time_json(used.last_used_at),
        "pinned": used.record.is_pinned,
    }


def show(key: Key, json: Json = False, dir: Dir = None) -> None:
    """Show all that is known of one stored engine, with every field of its key.

    \b
    Examples:
      enginecache show 3f9a
      enginecache show 3f9a --json
    """
    cache = open_cache(dir)
    record = cache.require(key)
    shown = _json(cache, cache.used(record))
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
    if json:
        print_json(shown)
        return
    for name, value in _flat(shown):
        print(f"{name:<32} {'' if value is None else value}")


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in _flat(item, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [row for index, item in enumerate(value) for row in _flat(item, f"{name}[{index}]")]
    return [(name, value)]


def path(key: Key, dir: Dir = None) -> None:
    """Print the path of a stored engine's plan.

    \b
    Examples:
      enginecache path 3f9a
      trtexec --loadEngine=$(enginecache path 3f9a)
    """
    cache = open_cache(dir)
    print(cache.path(cache.require_whole(key)))


def stats(json: Json = False, dir: Dir = None) -> None:
    """Count entries, bytes, builds and misses, with the latest misses and the fields in which they missed.

    \b
    Examples:
      enginecache stats
      enginecache stats --json
    """
    cache = open_cache(dir)
    totals = cache.totals()
    misses = cache.misses(limit=5)
    if json:
        latest = [
            {
                "key": miss.key,
                "reason": miss.reason,
                "nearest": miss.nearest_key,
                "differing": list(miss.differing),
                "count": miss.count,
                "last_at": time_json(miss.last_at),
            }
            for miss in misses
        ]
        print_json({"schema": 1, "dir": str(cache.root.path), **vars(totals), "latest_misses": latest})
        return
    rows = [[name.replace("_", " "), value] for name, value in vars(totals).items() if not name.endswith("bytes")]
    rows.append(["size", format_size(totals.size_bytes)])
    print_rows((Column("what"), Column("value")), rows)
    for miss in misses:
        fields = ", ".join(miss.differing) or "no engine of this model"
        print_rows((Column("miss"), Column("why")), [[f"miss {miss.key[:12]}", f"{miss.reason}: {fields}"]])


def doctor(json: Json = False, dir: Dir = None) -> None:
    """Check the folder, the registry, the GPUs and the TensorRT flavours: what works, what does not, what to do.

    \b
    Examples:
      enginecache doctor
      enginecache doctor --json
    """
    checks = diagnosis.diagnose(Config.load(dir=dir))
    if json:
        print_json([check.to_json() for check in checks])
    else:
        for check in checks:
            print(f"{check.status:<8} {check.name:<14} {check.text}")
            for line in check.fix.splitlines() if check.status != "ok" else ():
                print(f"{'':<23} {line}")
    code = max((check.exit_code for check in checks), default=0)
    if code:
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (ls, show, path, stats, doctor):
        app.command()(command)
