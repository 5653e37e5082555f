"""``db``: the registry's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from enginecache.cli.output import print_json, print_line, say
from enginecache.cli.parameters import Dir, Json, existing_config, say_if_missing
from enginecache.config import Config
from enginecache.errors import SchemaError
from enginecache.pipeline.results import SCHEMA

if TYPE_CHECKING:
    from enginecache.storage.folder import Root


def _root(folder: str | None) -> Root:
    from enginecache.storage.folder import Root

    config = existing_config(folder)
    root = Root.find(config.dir, config.shared)
    say_if_missing(root)
    return root


def upgrade(json: Json = False, dir: Dir = None) -> None:
    """Bring the registry's schema up to this release.

    Idempotent; all or nothing.

    \b
    Examples:
      enginecache db upgrade
      enginecache db upgrade --dir /var/cache/enginecache
    """
    from enginecache.storage.folder import Root
    from enginecache.storage.rebuild import require_registry
    from enginecache.storage.registry import schema
    from enginecache.storage.registry.database import Database

    config = Config.load(dir=dir)
    root = Root.find(config.dir, config.shared)
    if root.make(config.shared):
        say(f"made a new cache in {root.path}")
    require_registry(root)
    registry = Database(root.registry_path)
    before = schema.current_revision(registry)
    schema.ensure_schema(registry, root.file_mode)
    after = schema.current_revision(registry)
    if json:
        print_json({"schema": SCHEMA, "before": before, "revision": after})
    say(f"schema {before or 'none'} -> {after}")


def current(json: Json = False, dir: Dir = None) -> None:
    """Print the registry's schema revision, or none.

    \b
    Examples:
      enginecache db current
      enginecache db current --json
    """
    from enginecache.storage.registry import schema
    from enginecache.storage.registry.database import Database

    revision = schema.current_revision(Database(_root(dir).registry_path))
    if json:
        print_json({"schema": SCHEMA, "revision": revision, "newest_known": schema.HEAD})
    else:
        print_line(revision or "none")


def check(dir: Dir = None) -> None:
    """Compare the tables with what this release expects.

    Changes nothing. Exit 6 where they differ, or there is no registry.

    \b
    Examples:
      enginecache db check
      enginecache db check --dir /var/cache/enginecache
    """
    from enginecache.storage.registry import schema
    from enginecache.storage.registry.database import Database

    registry = Database(_root(dir).registry_path)
    if schema.current_revision(registry) is None:
        raise SchemaError(f"there is no registry {registry.path}", "Run `enginecache db upgrade`, which makes it.")
    schema.check(registry)
    say(f"schema {schema.HEAD}: the tables are as they should be")


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Inspect and upgrade the registry's schema.", no_args_is_help=True, rich_markup_mode=None)
    for command in (upgrade, current, check):
        group.command()(command)
    app.add_typer(group, name="db")
