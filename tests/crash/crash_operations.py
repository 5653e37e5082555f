"""Every operation that writes: the folder that it finds, the doing, and what must be true once it says that it is done.

``prepare`` and ``check`` run in the test, ``act`` in the child that is to be killed; it may be done twice.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crash_folders import (
    PLAN_BYTES,
    SLOT,
    cache_in,
    damaged,
    empty,
    get,
    much_damaged,
    of_first_release,
    old_garbage,
    open_cache,
    stock,
    stock_shared,
    timing_caches,
    with_timing_cache,
)
from fakes import fake_cache
from records import hex_of, loads_of

from enginecache.errors import StoreError
from enginecache.exchange.bundle import open_bundle
from enginecache.exchange.foreign import open_regular
from enginecache.exchange.transfer import export_bundle, import_bundle
from enginecache.pipeline.copy import export_plan
from enginecache.storage.registry.rows import LoadRecord

LOADED_AT = dt.datetime(2026, 11, 1, tzinfo=dt.timezone.utc)
LOAD = LoadRecord(hex_of("blob"), "sm_90", "13", "580", "loaded", "", LOADED_AT, "boot")


@dataclass(frozen=True)
class Operation:
    """One of them.

    Attributes:
        prepare: Makes the folder that it begins with.
        act: Does it.
        check: Raises unless it is done.
        always: Raises where something is lost that stays whatever happens.
        kept: Models whose engines stay, whatever happens.
        asked: The model that must be served afterwards.
        findings: What ``verify`` may find, because it was there before.
        opens: How the next process opens the folder.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    check: Callable[[Path], object]
    always: Callable[[Path], object]
    kept: str = "abc"
    asked: str = "d"
    findings: frozenset[str] = field(default=frozenset())
    opens: Callable[[Path], object] = open_cache


def is_hit(case: Path, name: str) -> None:
    assert get(case, name, offline=True).outcome == "hit"


def rebuild(case: Path) -> None:
    get(case, "b", cache_in(case, size_bytes=PLAN_BYTES + 1), rebuild=True)


def is_rebuilt(case: Path) -> None:
    assert get(case, "b", offline=True).record.size_bytes == PLAN_BYTES + 1


def evict(case: Path) -> None:
    with cache_in(case, grace_s=0.0) as cache:
        plan = cache.plan_prune(max_size_bytes=2 * PLAN_BYTES)
        if cache.execute_prune(plan) < plan.freed_bytes:
            raise StoreError("not all could be deleted")


def is_evicted(case: Path) -> None:
    with cache_in(case) as cache:
        assert cache.stats().size_bytes == 2 * PLAN_BYTES
        assert len(list(cache.root.engines.glob("*/*.engine"))) == 2
        assert list(cache.root.tmp.iterdir()) == []


def remove(case: Path) -> None:
    with cache_in(case) as cache:
        for used in cache.entries():
            if used.record.model_name == "b.onnx":
                cache.remove(used.record)


def is_removed(case: Path) -> None:
    with cache_in(case) as cache:
        assert {used.record.model_name for used in cache.entries()} == {"a.onnx", "c.onnx"}


def is_set_aside(case: Path) -> None:
    """After a fault between the row's deletion and the move, the damaged file is garbage, which a rebuild replaces."""
    is_hit(case, "b")
    kept = [path.read_bytes()[:1] for path in (case / "cache/quarantine").iterdir()]
    assert kept in ([b"X"], [])


def repair(case: Path) -> None:
    with cache_in(case, grace_s=0.0) as cache:
        found = cache.verify(deep=True, repair=True)
    if not found.is_clean:
        raise StoreError("not all could be repaired")


def is_clean(case: Path) -> None:
    with cache_in(case) as cache:
        found = cache.verify(deep=True)
    assert (found.findings, found.young_orphans) == ((), ())


def migrate(case: Path) -> None:
    open_cache(case)


def open_shared(case: Path) -> None:
    open_cache(case, shared="group")


def is_migrated(case: Path) -> None:
    with cache_in(case) as cache:
        assert len(cache.entries()) == 2


def pinned(case: Path) -> set[str]:
    with cache_in(case) as cache:
        return {used.record.model_name for used in cache.entries() if used.record.is_pinned}


def pin(case: Path) -> None:
    with cache_in(case) as cache:
        cache.pin(get(case, "b", cache, offline=True).record)


def unpin(case: Path) -> None:
    with cache_in(case) as cache:
        cache.unpin(get(case, "a", cache, offline=True).record)


def is_pinned(case: Path) -> None:
    assert pinned(case) == {"a.onnx", "b.onnx"}


def is_unpinned(case: Path) -> None:
    assert pinned(case) == set()


def keep_timing_cache(case: Path) -> None:
    caches = timing_caches(case)
    start = caches.begin(SLOT)
    warnings = caches.keep(start, b"old+ours")
    if warnings:
        raise StoreError(*warnings)


def has_new_timing_cache(case: Path) -> None:
    assert timing_caches(case).begin(SLOT).data == b"old+ours"


def has_timing_cache(case: Path) -> None:
    """Whatever happens: what was kept before is there."""
    assert b"old" in timing_caches(case).begin(SLOT).data.split(b"+")


def record_load(case: Path) -> None:
    with cache_in(case) as cache:
        cache._registry.record_load(LOAD)


def is_recorded(case: Path) -> None:
    with cache_in(case) as cache:
        assert loads_of(cache._registry, LOAD.digest) == [LOAD]


def export(case: Path) -> None:
    entry = get(case, "b", offline=True)
    export_plan(entry.path, case / "copy.engine", case / "cache")


def is_exported(case: Path) -> None:
    assert (case / "copy.engine").read_bytes() == get(case, "b", offline=True).path.read_bytes()


def with_bundle(case: Path) -> None:
    """And next to it, a bundle with an engine of the fourth model and one that is stored."""
    stock(case)
    other = fake_cache(case / "other")
    for name in "ad":
        get(case, name, other)
    export_bundle(other._storage, [used.record for used in other.entries()], case / "bundle.tar")
    shutil.rmtree(case / "other")


def take_bundle(case: Path) -> None:
    cache = cache_in(case)
    import_bundle(cache._storage, case / "bundle.tar", cache.make)


def make_bundle(case: Path) -> None:
    storage = cache_in(case)._storage
    export_bundle(storage, storage.registry.entries(), case / "bundle.tar")


def is_bundled(case: Path) -> None:
    with open_regular(case / "bundle.tar") as file:
        assert len(open_bundle(case / "bundle.tar", file).records) == 3


def over_limit(case: Path) -> None:
    get(case, "d", cache_in(case, max_size_bytes=3 * PLAN_BYTES))


def is_within_limit(case: Path) -> None:
    """An eviction that fails is a warning: the engine is stored."""
    is_hit(case, "d")


def nothing(_case: Path) -> None:
    """Nothing beyond what every folder keeps."""


def still_pinned(case: Path) -> None:
    assert "a.onnx" in pinned(case)


OPERATIONS = {
    "open": Operation(empty, migrate, nothing, nothing, kept=""),
    "open a shared folder": Operation(empty, open_shared, nothing, nothing, kept="", opens=open_shared),
    "migrate": Operation(
        # The keys of the frozen rows are made up.
        of_first_release,
        migrate,
        is_migrated,
        is_migrated,
        kept="",
        findings=frozenset({"row", "build"}),
    ),
    "hit": Operation(stock, lambda case: is_hit(case, "b"), nothing, still_pinned),
    "publish": Operation(stock, lambda case: get(case, "d"), lambda case: is_hit(case, "d"), still_pinned),
    "publish to a group": Operation(
        stock_shared, lambda case: get(case, "d"), lambda case: is_hit(case, "d"), still_pinned
    ),
    "publish over the limit": Operation(stock, over_limit, is_within_limit, still_pinned, kept="a"),
    "rebuild": Operation(stock, rebuild, is_rebuilt, still_pinned, asked="b"),
    "evict": Operation(old_garbage, evict, is_evicted, still_pinned, kept="a", asked="b"),
    "remove": Operation(stock, remove, is_removed, still_pinned, kept="ac", asked="b"),
    "quarantine": Operation(
        damaged,
        lambda case: get(case, "b"),
        is_set_aside,
        still_pinned,
        kept="ac",
        asked="b",
        findings=frozenset({"digest"}),
    ),
    "repair": Operation(
        much_damaged,
        repair,
        is_clean,
        still_pinned,
        kept="a",
        asked="b",
        findings=frozenset({"digest", "dangling", "mode", "artefact"}),
    ),
    "pin": Operation(stock, pin, is_pinned, still_pinned),
    "unpin": Operation(stock, unpin, is_unpinned, nothing),
    "timing cache": Operation(with_timing_cache, keep_timing_cache, has_new_timing_cache, has_timing_cache),
    "record of a load": Operation(stock, record_load, is_recorded, still_pinned),
    "export": Operation(stock, export, is_exported, still_pinned),
    "import a bundle": Operation(with_bundle, take_bundle, lambda case: is_hit(case, "d"), still_pinned),
    "export a bundle": Operation(stock, make_bundle, is_bundled, still_pinned),
}
