"""The folders that operations begin with."""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from fakes import FakeBuilder, fake_cache
from models import linear, save
from records import hex_of

from enginecache.cache import EngineCache
from enginecache.errors import BuildError
from enginecache.pipeline.timing_caches import TimingCaches

FROZEN = Path(__file__).parents[1] / "migrations/data/registry-0001.sqlite"
DIMS = {"batch": (1, 2, 4)}
DAY_S = 24 * 3600
PLAN_BYTES = 4096
SLOT = "5" * 64


class CarefulBuilder(FakeBuilder):
    """A fake whose failures are a builder's."""

    def build(self, request, progress=None):
        try:
            return super().build(request, progress)
        except OSError as error:
            raise BuildError(f"the builder could not write: {error}") from error


def model(case: Path, name: str) -> Path:
    """One of four models, next to the cases: their fingerprints must be settled, and those of copies are not."""
    return case.parent / "models" / f"{name}.onnx"


def open_cache(case: Path, *, size_bytes: int = PLAN_BYTES, **settings) -> EngineCache:
    cache = fake_cache(case / "cache", CarefulBuilder(size_bytes=size_bytes), **settings)
    cache.make()
    return cache


cache_in = functools.cache(open_cache)
"""The same object for the same folder: it holds nothing of it, and its SQL is compiled once and not for each case."""


def get(case: Path, name: str, cache: EngineCache | None = None, **ask):
    return (cache or cache_in(case)).get(model(case, name), dims=DIMS, timeout_s=5.0, **ask)


def write_models(parent: Path) -> None:
    for number, name in enumerate("abcd"):
        save(linear(seed=number), parent / "models" / f"{name}.onnx")


def stock(case: Path) -> None:
    """Engines of three models, used a day ago, the first one pinned."""
    open_cache(case)
    for name in "abc":
        entry = get(case, name)
        os.utime(case / "cache/uses" / entry.key, (time.time() - DAY_S,) * 2)
    cache_in(case).pin(get(case, "a", offline=True).record)


def stock_shared(case: Path) -> None:
    """The same, for a group."""
    open_cache(case, shared="group")
    stock(case)


def empty(case: Path) -> None:
    case.mkdir()


def old_garbage(case: Path) -> None:
    """With a grace time of 0 s."""
    stock(case)
    with cache_in(case) as cache:
        orphan = cache.root.engines / "00" / f"{'0' * 64}.engine"
        orphan.parent.mkdir(mode=0o700, exist_ok=True)
        for path in (orphan, cache.root.tmp / "blob-leftover"):
            path.write_bytes(b"left")


def blob(case: Path, name: str) -> Path:
    with cache_in(case) as cache:
        return cache.path(next(used.record for used in cache.entries() if used.record.model_name == f"{name}.onnx"))


def flip(path: Path) -> None:
    """Damage a blob: same size, another byte."""
    path.chmod(0o600)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    path.chmod(0o400)


def damaged(case: Path) -> None:
    stock(case)
    flip(blob(case, "b"))


def much_damaged(case: Path) -> None:
    old_garbage(case)
    flip(blob(case, "b"))
    blob(case, "c").unlink()
    blob(case, "a").chmod(0o600)
    (case / "cache/timing-caches" / SLOT).write_bytes(b"no timing cache")


def of_first_release(case: Path) -> None:
    """The folder that revision 0001 wrote, with the one blob that its two entries name."""
    open_cache(case)
    cache = case / "cache"
    shutil.copyfile(FROZEN, cache / "registry.sqlite")
    text = b"blob a 1"
    path = cache / "engines" / hex_of("blob a 1")[:2] / f"{hex_of('blob a 1')}.engine"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(text)
    path.chmod(0o400)
    with closing(sqlite3.connect(cache / "registry.sqlite", isolation_level=None)) as connection:
        connection.execute("UPDATE blobs SET size_bytes = ?", (len(text),))


def timing_caches(case: Path) -> TimingCaches:
    with cache_in(case) as cache:
        return TimingCaches(cache.root)


def with_timing_cache(case: Path) -> None:
    stock(case)
    caches = timing_caches(case)
    assert caches.keep(caches.begin(SLOT), b"old") == ()
