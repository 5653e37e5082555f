"""Effect of an eviction on a real folder, and on files that it must leave alone."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest
from fakes import FakeBuilder
from models import linear, save

from enginecache.files.units import utc_now
from enginecache.maintenance import removal
from enginecache.maintenance.eviction import Staying, rebuild_cost
from enginecache.storage.blobs import Blobs
from enginecache.storage.folder import Root

DIMS = {"batch": (1, 2, 4)}
DAY_S = 86400.0
KEEP_RECENT_S = 60.0
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def engines(open_cache, tmp_path):
    """Three engines that nobody used for an hour, in a cache of 12 KiB."""
    cache = open_cache()
    found = [cache.get(save(linear(seed=seed), tmp_path / f"{seed}.onnx"), dims=DIMS) for seed in range(3)]
    unuse(cache, *found)
    return cache, found


def unuse(cache, *entries, seconds=3600.0):
    for entry in entries:
        os.utime(cache.root.uses / entry.key, (time.time() - seconds,) * 2)


def keys(cache):
    return {used.record.key for used in cache.entries()}


class SameBytes(FakeBuilder):
    """Plans that are alike, whatever is asked."""

    def build(self, request, progress=None):
        built = super().build(request, progress)
        built.plan_path.write_bytes(b"vtrt" * 1024)
        return built


def test_a_shared_blob_of_which_one_entry_must_stay_keeps_all_of_them(open_cache, model):
    cache = open_cache(SameBytes())
    first, second = (cache.get(model, dims=DIMS, optimization_level=level) for level in (3, 4))
    unuse(cache, first, second)
    plan = cache._removal.plan((), KEEP_RECENT_S, max_size_bytes=0)
    cache.pin(second.record)
    assert cache.execute_prune(plan) == 0
    assert keys(cache) == {first.key, second.key}
    cache.unpin(second.record)
    assert cache.execute_prune(plan) == 4096
    assert keys(cache) == set()


def test_a_cache_within_its_limit_is_left_alone(engines):
    cache, _ = engines
    assert cache._removal.enforce(3 * 4096, KEEP_RECENT_S) is None
    assert len(keys(cache)) == 3


def test_enforcing_a_limit_takes_the_cheapest_and_never_what_was_just_built(engines, open_cache, model):
    cache, (first, *_) = engines
    dear = open_cache(FakeBuilder(seconds=0.05)).get(model, dims=DIMS, optimization_level=5)
    unuse(cache, dear, seconds=DAY_S)
    unuse(cache, first, seconds=7200)
    plan = cache._removal.enforce(3 * 4096, KEEP_RECENT_S)
    assert [going.standing.key for going in plan.entries] == [first.key]
    new = open_cache(FakeBuilder(size_bytes=1 << 20)).get(model, dims=DIMS, optimization_level=1)
    plan = cache._removal.enforce(4096, KEEP_RECENT_S)
    assert keys(cache) == {new.key}
    assert plan.staying == (Staying("young", 1, 1 << 20),)
    assert new.path.exists()


def test_priorities_outlive_the_process_and_a_use_right_after_an_eviction_counts_more(engines, open_cache, monkeypatch):
    cache, (gone, used, idle) = engines
    unuse(cache, gone, seconds=7200)
    cache._removal.enforce(2 * 4096, KEEP_RECENT_S)
    cache._storage.last_used.touch(used.key)
    later = open_cache()
    (step,) = later._registry.inflation()
    assert step.value == rebuild_cost(gone.record)
    monkeypatch.setattr(removal, "utc_now", lambda: utc_now() + dt.timedelta(minutes=2))
    plan = later._removal.plan((), KEEP_RECENT_S, max_size_bytes=0)
    assert [(going.standing.key, going.priority) for going in plan.entries] == [
        (idle.key, rebuild_cost(idle.record)),
        (used.key, step.value + rebuild_cost(used.record)),
    ]


def test_only_an_eviction_by_size_raises_inflation(engines):
    cache, _ = engines
    cache.execute_prune(cache._removal.plan((), KEEP_RECENT_S, older_than_s=60))
    assert keys(cache) == set()
    assert cache._registry.inflation() == []


def test_what_this_host_cannot_use_goes_first_and_the_host_is_looked_at_only_where_needed(engines):
    cache, (foreign, *others) = engines
    asked = []
    cache._removal._usability = lambda: asked.append(1) or (lambda record: record.key != foreign.key)
    unuse(cache, foreign, seconds=2 * DAY_S)
    unuse(cache, *others, seconds=9 * DAY_S)
    assert cache._removal.enforce(3 * 4096, KEEP_RECENT_S) is None
    assert len(cache._removal.plan((), KEEP_RECENT_S, older_than_s=1.0).entries) == 3
    assert asked == []
    plan = cache._removal.enforce(2 * 4096, KEEP_RECENT_S)
    assert [(going.standing.key, going.reason) for going in plan.entries] == [(foreign.key, "unusable")]


# Blobs that lost their row while their path may have been handed out


@pytest.fixture
def shared_root():
    """A shared folder that other users reach: pytest's own are closed to them."""
    if os.geteuid():
        pytest.skip("probe: not root, so no other user can be")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Root.open(Path(name) / "cache", "group")


def test_another_user_of_the_group_makes_a_blob_young_that_lost_its_row(shared_root, tmp_path):
    store = Blobs(shared_root)
    source = tmp_path / "plan"
    source.write_bytes(b"vtrt" * 1024)
    staged = store.stage(source)
    path = store.publish(staged)
    before = path.stat()

    def retire():
        os.setuid(65534)
        store.retire(staged.digest)

    child = FORK.Process(target=retire)
    child.start()
    child.join()
    assert child.exitcode == 0
    after = path.stat()
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (after.st_uid, after.st_mode, after.st_gid) == (65534, before.st_mode, before.st_gid)
    assert store.read(staged.digest).digest == staged.digest
    assert list(shared_root.tmp.iterdir()) == []
