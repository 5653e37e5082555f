"""Fixtures that every test may use. Every cache that a test opens must verify clean when the test ends."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_cache
from hypothesis import settings
from models import linear, save

from enginecache.cache import EngineCache
from enginecache.environment import is_keyed

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and every process that a test interrupts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Some containers set it, and every process that a test starts would then compile the whole package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("quick", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes the user's cache or settings."""
    for name in list(os.environ):
        if name.startswith("ENGINECACHE_") or is_keyed(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg-runtime"))


@pytest.fixture(autouse=True)
def _collected_garbage() -> Iterator[None]:
    """The command line, which ends with its process, switches the collector off; a test run would grow to 14 GB."""
    yield
    gc.enable()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with a dynamic dimension ``batch``."""
    return save(linear(), tmp_path / "model.onnx")


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new cache. Copying it takes 5 ms, and making one 90, most of that Alembic's."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    fake_cache(folder).make()
    return folder


@pytest.fixture
def open_cache(tmp_path: Path, made_folder: Path) -> Iterator[Callable[..., EngineCache]]:
    """Open caches with a fake builder, by default all in one folder, and verify each when the test ends."""
    opened: list[EngineCache] = []

    def open_one(*args: Any, folder: Path | None = None, is_made: bool = True, **settings: Any) -> EngineCache:
        folder = folder or tmp_path / "cache"
        if is_made and not folder.exists() and "shared" not in settings:
            shutil.copytree(made_folder, folder, symlinks=True)
        cache = fake_cache(folder, *args, **settings)
        if is_made:
            cache.make()
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        found = cache.verify(deep=True)
        assert found.is_clean, found
        # A rebuild leaves the blob that it replaced for the grace time; nothing else may stay.
        assert {item.what for item in found.young_orphans} <= {"a stored engine without a row"}, found
