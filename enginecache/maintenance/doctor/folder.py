"""Checks of the settings, and of the cache's folder with its registry."""

from __future__ import annotations

import contextlib
import grp
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from enginecache.config import Config, config_path, unknown_variables
from enginecache.errors import EngineCacheError
from enginecache.files.os_errors import describe_os_error, free_inodes, shell_path
from enginecache.files.units import format_size
from enginecache.maintenance.findings import Check
from enginecache.storage.folder import Root
from enginecache.storage.registry import schema
from enginecache.storage.registry.database import Database
from enginecache.storage.space import Reserve, free_bytes

LOW_SPACE_BYTES = 5 << 30
LOW_INODES = 1000
"""Some sixty builds' worth: a build makes up to sixteen files, most of them for a moment."""
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "fuse.")
"""Beginnings of the names of file systems that other hosts may use too. Source: Linux, proc(5)."""


def check_settings() -> Check:
    """Return where the settings come from."""
    path = config_path()
    if path is None:
        facts: dict[str, object] = {"path": None, "exists": False}
        return Check("settings", "ok", "the defaults: this user has no home folder for a file", facts=facts)
    try:
        os.stat(path)
    except OSError as error:
        facts = {"path": str(path), "exists": False}
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return Check("settings", "ok", f"the defaults: there is no {path}", facts=facts)
        text, _ = describe_os_error(error, f"the defaults: {path} cannot be reached by this user", path)
        fix = "Set HOME to this user's own folder, or name a file with ENGINECACHE_CONFIG (/dev/null for none)."
        return Check("settings", "warning", text, fix, facts=facts)
    return Check("settings", "ok", str(path), facts={"path": str(path), "exists": True})


def check_variables(environ: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Yield a warning for each variable that looks like a setting and is not one."""
    for text in unknown_variables(environ):
        yield Check("variables", "warning", text, "Correct its name, or unset it.")


def check_root(config: Config) -> Iterator[Check]:
    """Yield the checks of the folder, its file system, its space and its registry."""
    try:
        root = Root.find(config.dir, config.shared)
        if root.is_made:
            yield _check_writable(root, config)
            yield from check_file_system(root.path)
            yield from check_parents(root.path)
            yield _check_space(root.path, root)
            yield _check_registry(root)
        else:
            yield _check_unmade(config)
            yield _check_space(config.dir)
    except EngineCacheError as error:
        yield Check("folder", "problem", error.what, error.fix, error.exit_code)


def _check_unmade(config: Config) -> Check:
    exists = os.path.lexists(config.dir)
    facts: dict[str, object] = {"path": str(config.dir), "exists": exists, "named_by": config.dir_from}
    if exists:
        return Check("folder", "ok", f"{config.dir} is empty; the first get makes a cache in it", facts=facts)
    if not config.dir_from:
        return Check("folder", "ok", f"{config.dir} will be made by the first get", facts=facts)
    text = f"{config.dir} does not exist, and is named by {config.dir_from}; the first get will make it"
    return Check("folder", "warning", text, "Correct the name, if it is not meant to be new.", facts=facts)


def _check_writable(root: Root, config: Config) -> Check:
    is_writable = os.access(root.path, os.W_OK)
    facts = {"path": str(root.path), "exists": True, "writable": is_writable, "shared": root.is_shared}
    group = f", shared with the group {_group_name(root.path.stat().st_gid)}" if root.is_shared else ""
    if not is_writable:
        text = f"{root.path}{group}, read-only: hits are served, nothing can be built"
        return Check("folder", "warning", text, f"Make {root.path} writable for this user.", facts=facts)
    if config.shared and not root.is_shared:
        group = ", private until the next get shares it with its group, as the settings say"
    elif root.is_shared and not config.shared:
        group += ": the folder itself says so, and the settings do not change it back"
    return Check("folder", "ok", f"{root.path}, readable and writable{group}", facts=facts)


def _group_name(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} ({gid})"
    except KeyError:
        return str(gid)


def check_parents(root: Path) -> Iterator[Check]:
    """Yield a warning where somebody else could replace the root by another folder while a program uses it."""
    trusted = {os.geteuid(), 0, root.stat().st_uid}
    for folder in root.resolve().parents:
        status = folder.stat()
        is_open = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if is_open or status.st_uid not in trusted:
            who = "everyone may write to it" if is_open else f"user {status.st_uid} owns it"
            text = f"{folder} is above the cache, and {who}: the cache could be replaced while a program uses it"
            fix = (
                f"Run `chmod o-w {shell_path(folder)}`"
                if is_open
                else "Name a folder in a place of this user's with --dir"
            )
            facts = {"path": str(folder), "mode": f"{stat.S_IMODE(status.st_mode):04o}", "owner": status.st_uid}
            yield Check("folders above", "warning", text, f"{fix}, unless nobody else can reach it.", facts=facts)


def check_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Iterator[Check]:
    """Yield a warning where locks and renames may not work as on a local file system."""
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


def _check_space(path: Path, root: Root | None = None) -> Check:
    while not path.exists():
        path = path.parent
    free, inodes = free_bytes(path), free_inodes(path)
    facts: dict[str, object] = {"free_bytes": free, "free_inodes": inodes}
    text = f"{format_size(free)} free"
    if root is not None:
        facts["has_reserve"] = Reserve(root).is_whole
    if inodes is not None and inodes < LOW_INODES:
        text += f", and only {inodes} inodes: each file needs one"
        counts = f"`df -i {shell_path(path)}` counts them"
        fix = f"Delete files on this file system ({counts}), or run `enginecache prune --older-than 30d`."
        return Check("space", "warning", text, fix, facts=facts)
    if free < LOW_SPACE_BYTES:
        fix = "Run `enginecache prune --older-than 30d`."
        return Check("space", "warning", text, fix, facts=facts)
    return Check("space", "ok", text, facts=facts)


def _check_registry(root: Root) -> Check:
    facts = {"schema": None, "newest_known": schema.HEAD, "sqlite": sqlite3.sqlite_version}
    database = Database(root.registry_path)
    try:
        revision = schema.current_revision(database)
        facts["schema"] = revision
        is_newer = revision is not None and revision not in schema.KNOWN
        if revision is not None and is_newer:
            schema.require_readable(database, revision)
    except EngineCacheError as error:
        return Check("registry", "problem", error.what, error.fix, error.exit_code, facts)
    text = f"schema {revision or 'not made yet'} (newest known {schema.HEAD}), SQLite {sqlite3.sqlite_version}"
    if is_newer:
        text += "; a newer enginecache wrote it, which one is not recorded, and this one can read it"
        return Check("registry", "warning", text, "Upgrade enginecache to the newest that uses this folder.", 0, facts)
    return Check("registry", "ok", text, facts=facts)
