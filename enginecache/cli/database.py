"""``db``: the registry's schema."""

from __future__ import annotations

import typer

from enginecache.cli.output import print_json, say
from enginecache.cli.parameters import Dir, Json
from enginecache.config import Config
from enginecache.registry import schema
from enginecache.registry.database import Database
from enginecache.store.root import Root


def _open(folder: Dir) -> tuple[Root, Database]:
    config = Config.load(dir=folder)
    root = Root.open(config.dir, config.shared)
    return root, Database(root.registry_path)


def upgrade(dir: Dir = None) -> None:
    """Bring the registry's schema up to this release. Idempotent; all or nothing."""
    root, database = _open(dir)
    before = schema.current_revision(root.registry_path)
    schema.ensure_schema(database, root.file_mode)
    say(f"schema {before or 'none'} -> {schema.current_revision(root.registry_path)}")


def current(json: Json = False, dir: Dir = None) -> None:
    """Print the registry's schema revision."""
    root, _ = _open(dir)
    revision = schema.current_revision(root.registry_path)
    if json:
        print_json({"schema": 1, "revision": revision, "newest_known": schema.HEAD})
    else:
        print(revision or "none")


def check(dir: Dir = None) -> None:
    """Compare the registry's tables with what this release expects. Exit 6 where they differ."""
    root, database = _open(dir)
    schema.ensure_schema(database, root.file_mode)
    schema.check(database)
    say(f"schema {schema.HEAD}: the tables are as they should be")


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Inspect and upgrade the registry's schema.", no_args_is_help=True, rich_markup_mode=None)
    for command in (upgrade, current, check):
        group.command()(command)
    app.add_typer(group, name="db")
