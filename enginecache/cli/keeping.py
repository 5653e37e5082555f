"""``pin``, ``unpin``, ``rm``, ``prune`` and ``verify``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from enginecache.cli.output import Column, print_json, print_rows, say
from enginecache.cli.parameters import Dir, DryRun, Json, Key, Yes, duration_option, open_cache, size_option
from enginecache.errors import ConfirmationError
from enginecache.eviction import PrunePlan
from enginecache.options import format_size


def confirm(what: str, *, is_yes: bool) -> None:
    """Ask on a terminal; elsewhere ``--yes`` must have been given.

    Raises:
        ConfirmationError: It was not, or the answer is no.
    """
    if is_yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfirmationError(f"not done without confirmation: {what}", "Add --yes, or see it first with --dry-run.")
    if not typer.confirm(f"{what}?", err=True):
        raise ConfirmationError(f"not done: {what}", "Nothing was changed.")


def pin(key: Key, dir: Dir = None) -> None:
    """Keep a stored engine whatever `prune` wants.

    \b
    Examples:
      enginecache pin 3f9a
    """
    cache = open_cache(dir)
    record = cache.require(key)
    cache.pin(record)
    say(f"pinned {record.key}")


def unpin(key: Key, dir: Dir = None) -> None:
    """Let a stored engine go when `prune` wants.

    \b
    Examples:
      enginecache unpin 3f9a
    """
    cache = open_cache(dir)
    record = cache.require(key)
    cache.unpin(record)
    say(f"unpinned {record.key}")


def rm(key: Key, dry_run: DryRun = False, yes: Yes = False, dir: Dir = None) -> None:
    """Delete one stored engine. A program that has it open keeps its bytes.

    \b
    Examples:
      enginecache rm 3f9a --dry-run
      enginecache rm 3f9a --yes
    """
    cache = open_cache(dir)
    record = cache.require(key)
    what = f"delete the engine {record.key[:12]} of {record.model_name} ({format_size(record.size_bytes)})"
    if dry_run:
        say(f"would {what}")
        return
    confirm(what, is_yes=yes)
    say(f"deleted {record.key}; freed {format_size(cache.remove(record))}")


def prune(
    max_size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="Shrink to this, such as 20GiB.")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="TIME", help="Delete what was not used for so long, such as 30d."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Delete the least recently used engines, and files that crashes left behind. Pinned engines stay.

    Engines used within the last minute stay too: their path may have been handed out and not opened yet.

    \b
    Examples:
      enginecache prune --max-size 20GiB --dry-run
      enginecache prune --older-than 30d --yes
    """
    cache = open_cache(dir)
    plan = cache.plan_prune(max_size_bytes=size_option(max_size), older_than_s=duration_option(older_than))
    freed = 0
    if not dry_run and not plan.is_empty:
        confirm(f"delete {_summary(plan)}", is_yes=yes)
        freed = cache.execute_prune(plan)
    if json:
        print_json(_plan_json(plan, freed, is_dry_run=dry_run))
    else:
        _print_plan(plan)
        say("nothing to delete" if plan.is_empty else f"{'would delete' if dry_run else 'deleted'} {_summary(plan)}")
    if plan.shortfall_bytes:
        say(f"{format_size(plan.shortfall_bytes)} more than asked stay: they are pinned or were used just now")


def _summary(plan: PrunePlan) -> str:
    count = len(plan.entries)
    engines = f"{count} engine{'' if count == 1 else 's'}"
    files = f" and {len(plan.garbage)} stray files" if plan.garbage else ""
    return f"{engines}{files} ({format_size(plan.freed_bytes)})"


def _print_plan(plan: PrunePlan) -> None:
    columns = (Column("key", "key"), Column("model"), Column("size", "size"), Column("last used", "age"))
    rows = [
        [used.record.key, used.record.model_name, used.record.size_bytes, used.last_used_at] for used in plan.entries
    ]
    if rows:
        print_rows(columns, rows)
    if plan.garbage:
        rows = [[str(item.path), item.what, item.size_bytes] for item in plan.garbage]
        print_rows((Column("file"), Column("what"), Column("size", "size")), rows)


def _plan_json(plan: PrunePlan, freed: int, *, is_dry_run: bool) -> dict[str, object]:
    return {
        "schema": 1,
        "dry_run": is_dry_run,
        "entries": [{"key": used.record.key, "size_bytes": used.record.size_bytes} for used in plan.entries],
        "garbage": [{"path": str(item.path), "size_bytes": item.size_bytes} for item in plan.garbage],
        "planned_bytes": plan.freed_bytes,
        "freed_bytes": freed,
        "kept_bytes": plan.kept_bytes,
        "shortfall_bytes": plan.shortfall_bytes,
    }


def verify(
    deep: Annotated[bool, typer.Option("--deep", help="Read every engine's bytes again.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is found.")] = False,
    yes: Yes = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Compare the registry with the stored engines. Exit 4 while anything is wrong.

    Files of a build that may still be under way are reported and are no finding.

    \b
    Examples:
      enginecache verify
      enginecache verify --deep --repair --yes
    """
    cache = open_cache(dir)
    found = cache.verify(deep=deep)
    if repair and not found.is_clean:
        for finding in found.findings:
            say(f"{finding.kind}: {finding.text}: {finding.repair}")
        confirm(f"repair {len(found.findings)} findings", is_yes=yes)
        found = cache.verify(deep=deep, repair=True)
    if json:
        print_json(found.to_json())
    else:
        for finding in found.findings:
            state = "repaired" if finding.is_repaired else f"--repair would {finding.repair}"
            print_rows(
                (Column("kind"), Column("subject", "key"), Column("what"), Column("repair")),
                [[finding.kind, finding.subject, finding.text, state]],
            )
        for item in found.young_garbage:
            say(f"garbage within its grace time: {item.path} ({item.what})")
        say(f"{found.entries} entries, {len(found.findings)} findings")
    if not found.is_clean:
        raise typer.Exit(4)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (pin, unpin, rm, prune, verify):
        app.command()(command)
