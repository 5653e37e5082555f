"""``ls``, ``show``, ``path``, ``stats`` and ``doctor``: they change nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginecache.cli.output import (
    Column,
    flat_facts,
    print_facts,
    print_json,
    print_line,
    print_path,
    print_rows,
    say,
)
from enginecache.cli.parameters import Dir, Json, Key, open_stored
from enginecache.config import Config
from enginecache.entry import SCHEMA, record_json, time_json

if TYPE_CHECKING:
    from enginecache.doctor.check import Check
    from enginecache.removal import Used
    from enginecache.stored import StoredEngines

_COLUMNS = (
    Column("key", "key"),
    Column("model"),
    Column("backend", "word", is_wide=True),
    Column("version", "word", is_wide=True),
    Column("reach"),
    Column("device", is_wide=True),
    Column("size", "size"),
    Column("build", "seconds", is_wide=True),
    Column("created", "age", is_wide=True),
    Column("last used", "age"),
    Column("pinned", "word", is_wide=True),
)
_MISS_COLUMNS = (
    Column("", "word"),
    Column("key", "key"),
    Column("reason", "word"),
    Column("nearest", "key"),
    Column("differing"),
    Column("count", "word"),
    Column("last", "age"),
)


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
    compute capabilities, device, bytes, seconds of the build, created, last used, pinned.

    \b
    Examples:
      enginecache ls
      enginecache ls --limit 10 --json
      enginecache ls -q | head -1
    """
    cache = open_stored(dir)
    used = cache.entries(limit)
    if json:
        print_json([_json(cache, item) for item in used])
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
    ]


def _json(cache: StoredEngines, used: Used) -> dict[str, Any]:
    return {
        **record_json(used.record, cache.path(used.record)),
        "last_used_at": time_json(used.last_used_at),
        "pinned": used.record.is_pinned,
    }


def show(key: Key, json: Json = False, dir: Dir = None) -> None:
    """Show all that is known of one stored engine.

    With every field of its key, and the attempts to build it.

    \b
    Examples:
      enginecache show 3f9a
      enginecache show 3f9a --json
    """
    cache = open_stored(dir)
    record = cache.find(key)
    shown = _json(cache, cache.with_last_use(record))
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
    else:
        # The key's fields have them too, and a stored engine has no path of its model.
        shown = {name: value for name, value in shown.items() if name != "options"}
        print_facts([fact for fact in flat_facts(shown) if fact[0] != "model.path"])


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
    """Count engines, bytes, builds and misses, and say why it missed.

    On a pipe: the counts, then a line for each of the latest misses: `miss`, key, reason, nearest key, differing
    fields, count, time.

    \b
    Examples:
      enginecache stats
      enginecache stats --json
    """
    cache = open_stored(dir)
    totals = cache.stats()
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
        print_json({"schema": SCHEMA, "dir": str(cache.root.path), **vars(totals), "latest_misses": latest})
        return
    print_facts(list(vars(totals).items()))
    if misses:
        print_rows(
            _MISS_COLUMNS,
            [["miss", m.key, m.reason, m.nearest_key, m.differing, m.count, m.last_at] for m in misses],
        )


def doctor(json: Json = False, dir: Dir = None) -> None:
    """Say what works here, what does not, and what to do.

    Looks at the settings, the folder, the registry, the GPUs and the TensorRT flavours. Exits with the code of the
    worst problem; a warning is none: it names what is missing and may not be needed. On a pipe a line for each, of
    tab-separated values: status, name, text, what to do.

    \b
    Examples:
      enginecache doctor
      enginecache doctor --json
    """
    from enginecache import doctor as diagnosis

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
