"""The settings, and the cache's folder with its registry."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from enginecache.config import Config, config_path
from enginecache.doctor.check import Check
from enginecache.errors import EngineCacheError
from enginecache.options import format_size
from enginecache.registry import schema
from enginecache.registry.database import journal_mode
from enginecache.store.root import Root

LOW_SPACE_BYTES = 5 << 30
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "fuse.")
"""How the names of file systems begin that are not, or may not be, of this host alone. Source: Linux, proc(5)."""


def check_settings() -> Check:
    """Where the settings come from."""
    path = config_path()
    facts = {"path": str(path), "exists": path.exists()}
    return Check("settings", "ok", str(path) if path.exists() else f"the defaults: there is no {path}", facts=facts)


def check_root(config: Config) -> Iterator[Check]:
    """The folder, its file system, its space and its registry."""
    if not config.dir.exists() and not config.dir.is_symlink():
        facts = {"path": str(config.dir), "exists": False}
        yield Check("folder", "ok", f"{config.dir} will be made by the first get", facts=facts)
        yield _check_space(config.dir)
        return
    try:
        root = Root.check(config.dir, config.shared)
        yield _check_writable(root.path)
        yield from check_file_system(root.path)
        yield _check_space(root.path)
        yield _check_registry(root)
    except EngineCacheError as error:
        yield Check("folder", "problem", error.what, error.fix, error.exit_code)


def _check_writable(path: Path) -> Check:
    facts = {"path": str(path), "exists": True, "writable": os.access(path, os.W_OK)}
    if facts["writable"]:
        return Check("folder", "ok", f"{path}, readable and writable", facts=facts)
    text = f"{path}, read-only: hits are served, nothing can be built"
    return Check("folder", "warning", text, f"Make {path} writable for this user.", facts=facts)


def check_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Iterator[Check]:
    """A warning where locks and renames may not be what they are on a local file system."""
    kinds = {}
    with contextlib.suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, point, kind, *_ = line.split(" ")
            kinds[point.replace("\\040", " ")] = kind
    point = next((str(folder) for folder in (path, *path.parents) if str(folder) in kinds), "")
    kind = kinds.get(point, "")
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        text = f"{point} is {kind}: locks may not exclude other hosts"
        fix = "Name a folder on a local disk with --dir or ENGINECACHE_DIR."
        yield Check("file system", "warning", text, fix, facts={"mount": point, "type": kind})


def _check_space(path: Path) -> Check:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    facts = {"free_bytes": free}
    if free < LOW_SPACE_BYTES:
        fix = "Run `enginecache prune --older-than 30d`."
        return Check("space", "warning", f"{format_size(free)} free", fix, facts=facts)
    return Check("space", "ok", f"{format_size(free)} free", facts=facts)


def _check_registry(root: Root) -> Check:
    facts = {"schema": None, "newest_known": schema.HEAD, "sqlite": sqlite3.sqlite_version}
    try:
        revision = schema.current_revision(root.registry_path)
        facts["schema"] = revision
        is_newer = revision is not None and revision not in schema.KNOWN
        if revision is not None and is_newer:
            schema.require_readable(root.registry_path, revision)
    except EngineCacheError as error:
        return Check("registry", "problem", error.what, error.fix, error.exit_code, facts)
    sqlite = f"SQLite {sqlite3.sqlite_version}, journal {journal_mode(sqlite3.sqlite_version_info)}"
    text = f"schema {revision or 'not made yet'} (newest known {schema.HEAD}), {sqlite}"
    if is_newer:
        text += "; a newer enginecache wrote it, which one is not recorded, and this one can read it"
        return Check("registry", "warning", text, "Upgrade enginecache to the newest that uses this folder.", 0, facts)
    return Check("registry", "ok", text, facts=facts)
