"""``pin``, ``unpin``, ``rm``, ``prune`` and ``verify``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from enginecache.cli.output import Column, count, print_json, print_rows, say
from enginecache.cli.parameters import (
    Dir,
    DryRun,
    Json,
    Key,
    Yes,
    existing_config,
    open_stored,
    read_value,
    say_if_missing,
)
from enginecache.errors import ConfirmationError
from enginecache.files.units import format_duration, format_size, parse_duration_s, parse_limit, time_json
from enginecache.pipeline.results import SCHEMA

if TYPE_CHECKING:
    from enginecache.maintenance.eviction import Going, PrunePlan, Staying
    from enginecache.maintenance.findings import Verification

_COLUMNS = (
    Column("key", "key"),
    Column("model"),
    Column("size", "size"),
    Column("last used", "age"),
    Column("build", "seconds"),
    Column("why", "word"),
    Column("priority", "word", is_wide=True),
)


def require_leave(what: str, *, is_yes: bool, preview: str = "--dry-run") -> None:
    """Refuse to go on without ``--yes`` where nobody can be asked.

    Raises:
        ConfirmationError: If ``--yes`` is missing there.
    """
    if not is_yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfirmationError(f"refusing to {what} without --yes", f"Add --yes, or see it first with {preview}.")


def confirm(what: str, *, is_yes: bool, preview: str = "--dry-run") -> bool:
    """Ask on a terminal; elsewhere ``--yes`` must have been given. Print that nothing was changed if the answer is no.

    Returns:
        Whether to go on.

    Raises:
        ConfirmationError: Nobody can be asked, and ``--yes`` was not given.
    """
    require_leave(what, is_yes=is_yes, preview=preview)
    if is_yes or _ask(what):
        return True
    say("nothing was changed")
    return False


def _ask(what: str) -> bool:
    # Neither input() nor typer.confirm: both write to standard output.
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def pin(key: Key, dir: Dir = None) -> None:
    """Keep a stored engine, whatever `prune` wants.

    \b
    Examples:
      enginecache pin 3f9a
    """
    cache = open_stored(dir)
    record = cache.find(key)
    cache.pin(record)
    say(f"pinned {record.key}")


def unpin(key: Key, dir: Dir = None) -> None:
    """Allow `prune` to delete a stored engine again.

    \b
    Examples:
      enginecache unpin 3f9a
    """
    cache = open_stored(dir)
    record = cache.find(key)
    cache.unpin(record)
    say(f"unpinned {record.key}")


def rm(key: Key, dry_run: DryRun = False, yes: Yes = False, json: Json = False, dir: Dir = None) -> None:
    """Delete one stored engine. A program that has it open keeps its bytes.

    \b
    Examples:
      enginecache rm 3f9a --dry-run
      enginecache rm 3f9a --yes
    """
    cache = open_stored(dir)
    record = cache.find(key)
    if record.is_pinned:
        from enginecache.maintenance.removal import pinned_error

        raise pinned_error(record)
    what = f"delete the engine {record.key[:12]} of {record.model_name} ({format_size(record.size_bytes)})"
    freed = 0
    is_declined = not dry_run and not confirm(what, is_yes=yes)
    if not dry_run and not is_declined:
        freed = cache.remove(record)
    if json:
        print_json({"schema": SCHEMA, "dry_run": dry_run, "key": record.key, "freed_bytes": freed})
    if not is_declined:
        say(f"would {what}" if dry_run else f"deleted {record.key}; freed {format_size(freed)}")


def prune(
    max_size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="Shrink to this, such as 20GiB.")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="TIME", help="Delete engines that were not used for this long, such as 30d."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Delete the engines that are cheapest to rebuild, and leftovers.

    With --max-size, engines are deleted until the rest fits: first those that no TensorRT and no GPU of this host can
    use, and that nobody used for a day; then those whose build took the fewest seconds for each byte, where recent use
    counts in favour. Stray files are leftovers of crashes.

    Pinned engines stay, and so do those used or published lately (setting keep_recent, 10 min by default): a program
    may have received their path and not opened it yet.

    On a pipe a line for each engine: key, model, bytes, last used, seconds of its build, why it is deleted (old,
    unusable, cheapest), its priority in seconds per GiB.

    \b
    Examples:
      enginecache prune --max-size 20GiB --dry-run
      enginecache prune --older-than 30d --yes
    """
    max_size_bytes = read_value("--max-size", max_size, parse_limit)
    older_than_s = read_value("--older-than", older_than, parse_duration_s)
    cache = open_stored(dir)
    plan = cache.plan_prune(max_size_bytes=max_size_bytes, older_than_s=older_than_s)
    is_acting = not dry_run and not plan.is_empty
    if is_acting:
        require_leave(f"delete {_summary(plan)}", is_yes=yes)
    if not json:
        _print_plan(plan)
    freed, is_declined = 0, False
    if is_acting:
        is_declined = not confirm(f"delete {_summary(plan)}", is_yes=yes)
        freed = 0 if is_declined else cache.execute_prune(plan)
    if json:
        print_json(_plan_json(plan, freed, is_dry_run=dry_run))
    if not is_declined:
        has_limit = max_size_bytes is not None or older_than_s is not None or cache.config.max_size_bytes is not None
        _say_pruned(plan, freed, cache.config.keep_recent_s, is_dry_run=dry_run, has_limit=has_limit)


def _say_pruned(plan: PrunePlan, freed: int, keep_recent_s: float, *, is_dry_run: bool, has_limit: bool) -> None:
    if plan.is_empty:
        say("nothing to delete")
    else:
        say(f"would delete {_summary(plan)}" if is_dry_run else f"deleted {_summary(plan)}; freed {format_size(freed)}")
    if plan.shortfall_bytes:
        why = ", ".join(_staying_text(staying, keep_recent_s) for staying in plan.staying)
        say(f"still {format_size(plan.shortfall_bytes)} over the limit; kept: {why}")
    elif not has_limit:
        say("no limit was given: give --max-size or --older-than, or set max_size")


def _summary(plan: PrunePlan) -> str:
    files = f" and {count(len(plan.orphans), 'stray file')}" if plan.orphans else ""
    return f"{count(len(plan.entries), 'engine')}{files} ({format_size(plan.freed_bytes)})"


def _print_plan(plan: PrunePlan) -> None:
    rows = [_going_row(going) for going in plan.entries]
    if rows:
        print_rows(_COLUMNS, rows)
    if plan.orphans:
        rows = [[str(item.path), item.what, item.size_bytes] for item in plan.orphans]
        print_rows((Column("file"), Column("what"), Column("size", "size")), rows)


def _going_row(going: Going) -> list[object]:
    standing = going.standing
    # Numbers on a pipe, as everywhere. A priority only means something next to another one.
    priority = round(going.priority, 3)
    return [
        standing.key,
        standing.model_name,
        standing.size_bytes,
        standing.last_used_at,
        standing.build_seconds,
        going.reason,
        priority,
    ]


def _staying_text(staying: Staying, keep_recent_s: float) -> str:
    recent = f"used or published within the last {format_duration(keep_recent_s)}"
    why = "pinned" if staying.reason == "pinned" else recent
    return f"{count(staying.blobs, 'engine')} {why} ({format_size(staying.size_bytes)})"


def _plan_json(plan: PrunePlan, freed: int, *, is_dry_run: bool) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "dry_run": is_dry_run,
        "entries": [
            {
                "key": going.standing.key,
                "size_bytes": going.standing.size_bytes,
                "build_seconds": going.standing.build_seconds,
                "last_used_at": time_json(going.standing.last_used_at),
                "reason": going.reason,
                "priority": going.priority,
            }
            for going in plan.entries
        ],
        "garbage": [
            {"path": str(item.path), "size_bytes": item.size_bytes, "what": item.what} for item in plan.orphans
        ],
        "planned_bytes": plan.freed_bytes,
        "freed_bytes": freed,
        "kept_bytes": plan.kept_bytes,
        "shortfall_bytes": plan.shortfall_bytes,
        "staying": [
            {"reason": staying.reason, "engines": staying.blobs, "size_bytes": staying.size_bytes}
            for staying in plan.staying
        ],
    }


def verify(
    deep: Annotated[bool, typer.Option("--deep", help="Read the bytes of every engine again.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Repair what is found.")] = False,
    yes: Yes = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Compare the registry with the stored engines. Exit 4 while anything is wrong.

    Files of a build that may still be running are reported, and are not findings. Only --deep sees damage that the disk
    did by itself.

    A damaged registry is kept in quarantine/, and rebuilt from the small record next to each engine: all whole engines
    come back, and the pins that can still be read. The history of builds, remembered failures, misses and outcomes of
    loading are lost.

    \b
    Examples:
      enginecache verify
      enginecache verify --deep --repair --yes
    """
    from enginecache.maintenance.inspect import StoredEngines
    from enginecache.storage.folder import Root

    config = existing_config(dir)
    say_if_missing(Root.find(config.dir, config.shared))
    found = StoredEngines.verify_folder(config, deep=deep)
    if repair and not found.is_clean:
        for finding in found.findings:
            say(f"{finding.kind}: {finding.text}: {finding.repair}")
        what = f"repair {count(len(found.findings), 'finding')}"
        if confirm(what, is_yes=yes, preview="`enginecache verify` alone"):
            found = StoredEngines.verify_folder(config, deep=deep, repair=True)
    if json:
        print_json(found.to_json())
    else:
        _print_findings(found)
    if not found.is_clean:
        raise typer.Exit(4)


def _print_findings(found: Verification) -> None:
    columns = (Column("kind"), Column("subject"), Column("what"), Column("repair"))
    rows = [
        [item.kind, item.subject, item.text, "repaired" if item.is_repaired else f"--repair would {item.repair}"]
        for item in found.findings
    ]
    if rows:
        print_rows(columns, rows)
    for item in found.young_orphans:
        say(f"orphan within its grace time: {item.path} ({item.what})")
    for lost in found.kept.set_asides:
        say(f"not built anew since: {lost.key[:12]} ({lost.model_name}): {lost}")
    kept = (
        (found.kept.quarantined, "quarantined engine"),
        (found.kept.registries, "damaged registry file"),
        (found.kept.failures, "remembered failure"),
        (found.kept.unfinished_builds, "unfinished attempt"),
    )
    if any(number for number, _ in kept):
        say(f"kept, not a fault: {', '.join(count(number, what) for number, what in kept if number)}")
    engines = f"{count(found.entries, 'engine')} checked"
    say(f"OK: {engines}, nothing to repair" if not rows else f"{engines}, {count(len(rows), 'finding')}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (pin, unpin, rm, prune, verify):
        app.command()(command)
