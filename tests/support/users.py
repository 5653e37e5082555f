"""Work done as another user, for tests that run as root."""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import enginecache

FORK = multiprocessing.get_context("fork")


def as_user(user: int, group: int, work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns in a process of another user, who may not be able to read this checkout."""
    _import_everything()
    reader, writer = FORK.Pipe(duplex=False)
    scripts = _readable_migrations()

    def run() -> None:
        importlib.import_module("enginecache.migrations").__file__ = str(scripts / "__init__.py")
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        try:
            writer.send(work())
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            writer.send(f"{type(error).__name__}: {error}")

    child = FORK.Process(target=run)
    child.start()
    found = reader.recv()
    child.join()
    return found


@functools.cache
def _import_everything() -> None:
    """Import every module of enginecache that the installed extras allow: the other user may not reach the files."""
    for module in pkgutil.walk_packages(enginecache.__path__, "enginecache."):
        if not module.name.startswith("enginecache.migrations.") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@functools.cache
def _readable_migrations() -> Path:
    """Copy the migrations to a folder that everybody may read; Alembic runs them from their files."""
    folder = Path(tempfile.mkdtemp(prefix="enginecache-migrations-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    scripts = folder / "migrations"
    shutil.copytree(Path(str(importlib.import_module("enginecache.migrations").__file__)).parent, scripts)
    for path in (folder, scripts, *scripts.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return scripts
