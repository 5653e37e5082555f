"""Engines that a program uses are not evicted: leases, open files, and what an eviction does about them."""

from __future__ import annotations

import contextlib
import datetime as dt
import mmap
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fakes import FakeBuilder
from models import linear, save
from records import hex_of

from enginecache.errors import LockTimeoutError, NotCachedError
from enginecache.files.units import utc_now
from enginecache.maintenance import removal
from enginecache.maintenance.eviction import Staying, rebuild_cost
from enginecache.storage.blobs import LocalBlobStore
from enginecache.storage.folder import Root
from enginecache.storage.leases import Lease, is_in_use, open_digests, unleased

DIMS = {"batch": (1, 2, 4)}
DAY_S = 86400.0
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def blob(tmp_path):
    path = tmp_path / f"{hex_of('blob')}.engine"
    path.write_bytes(b"vtrt" * 1024)
    path.chmod(0o400)
    return path


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


@contextlib.contextmanager
def program(code, *arguments):
    """Another process, which has run the code and now waits."""
    code = f"import mmap, sys\n{code}\nprint(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        yield process
        process.kill()


# Leases


def test_a_blob_is_in_use_while_it_has_a_lease(blob):
    assert not is_in_use(blob)
    with Lease(blob), Lease(blob) as second:
        second.close()
        second.close()
        assert is_in_use(blob)
    assert not is_in_use(blob)


def test_to_look_whether_a_blob_is_in_use_is_no_use(blob):
    with Lease(blob):
        assert [is_in_use(blob) for _ in range(2)] == [True, True]
    assert [is_in_use(blob) for _ in range(2)] == [False, False]


def test_a_lease_ends_with_its_process(blob):
    code = "from enginecache.storage.leases import Lease; from pathlib import Path; kept = Lease(Path(sys.argv[1]))"
    with program(code, blob) as process:
        with unleased(blob) as is_free:
            assert not is_free
        process.kill()
        process.wait()
        with unleased(blob) as is_free:
            assert is_free


def test_what_was_forked_keeps_a_lease_and_ends_only_its_own(blob):
    ended, closed, end = FORK.Event(), FORK.Event(), FORK.Event()
    lease = Lease(blob)
    keeper = FORK.Process(target=end.wait)
    closer = FORK.Process(target=lambda: (lease.close(), closed.set(), ended.wait()))
    for child in (keeper, closer):
        child.start()
    closed.wait()
    ended.set()
    closer.join()
    assert is_in_use(blob)
    lease.close()
    assert is_in_use(blob)
    end.set()
    keeper.join()
    assert not is_in_use(blob)


def test_no_lease_is_had_while_an_eviction_decides_and_one_right_after(blob):
    with unleased(blob) as is_free:
        assert is_free
        with pytest.raises(LockTimeoutError, match="an eviction has held") as caught:
            Lease(blob, timeout_s=0.03)
        assert "enginecache prune" in caught.value.fix
        with unleased(blob) as is_free_too:
            assert not is_free_too
    Lease(blob, timeout_s=0.0).close()


def test_what_is_forked_while_an_eviction_decides_does_not_prolong_it(blob):
    end = FORK.Event()
    with unleased(blob):
        child = FORK.Process(target=end.wait)
        child.start()
    Lease(blob, timeout_s=0.0).close()
    end.set()
    child.join()


def test_a_lease_is_on_the_file_that_the_path_names_now(blob, tmp_path):
    with unleased(blob):
        shutil.copy(blob, tmp_path / "equal").replace(blob)
        with Lease(blob, timeout_s=0.0):
            assert is_in_use(blob)


def test_a_blob_that_is_gone_gives_no_lease_and_is_not_in_use(blob):
    blob.unlink()
    with pytest.raises(NotCachedError, match="is gone"):
        Lease(blob)
    assert not is_in_use(blob)


def test_what_cannot_be_looked_at_is_taken_as_in_use(blob, tmp_path):
    (tmp_path / "link").symlink_to(blob)
    assert is_in_use(tmp_path / "link")


# Open files

OPENED = "kept = open(sys.argv[1], 'rb')"
MAPPED = "with open(sys.argv[1], 'rb') as file: kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)"


@pytest.mark.parametrize("code", [OPENED, MAPPED])
def test_a_blob_is_in_use_while_another_process_has_it_open_or_mapped(blob, code):
    with program(code, blob):
        assert open_digests() >= {blob.stem}
        assert is_in_use(blob)
    assert not is_in_use(blob)


def test_a_mapping_that_outlives_its_name_is_a_use_of_the_same_bytes(blob):
    with blob.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    blob.unlink()
    assert blob.stem in open_digests()
    content.close()
    assert blob.stem not in open_digests()


def test_without_a_list_of_processes_nothing_is_known_to_be_open(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "self").mkdir()
    assert open_digests(tmp_path) == open_digests(tmp_path / "absent") == frozenset()


# Evictions


@pytest.mark.parametrize("use", [Lease, lambda path: path.open("rb")])
def test_what_is_in_use_is_in_no_plan_and_the_plan_says_so(engines, use):
    cache, (busy, *_) = engines
    with use(busy.path):
        plan = cache._removal.plan((), max_size_bytes=0)
        assert busy.key not in {going.standing.key for going in plan.entries}
        assert plan.staying == (Staying("in_use", 1, 4096),)
        assert (cache.execute_prune(plan), plan.shortfall_bytes) == (8192, 4096)
        assert keys(cache) == {busy.key}
    assert cache.execute_prune(cache._removal.plan((), max_size_bytes=0)) == 4096


@pytest.mark.parametrize("use", [Lease, lambda path: path.open("rb")])
def test_what_came_into_use_after_the_plan_stays(engines, use):
    cache, (busy, *_) = engines
    plan = cache._removal.plan((), max_size_bytes=0)
    assert len(plan.entries) == 3
    with use(busy.path):
        assert cache.execute_prune(plan) == 8192
    assert keys(cache) == {busy.key}


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
    plan = cache._removal.plan((), max_size_bytes=0)
    cache.pin(second.record)
    assert cache.execute_prune(plan) == 0
    assert keys(cache) == {first.key, second.key}
    cache.unpin(second.record)
    assert cache.execute_prune(plan) == 4096
    assert keys(cache) == set()


def test_a_cache_within_its_limit_is_left_alone(engines):
    cache, _ = engines
    assert cache._removal.enforce(3 * 4096) is None
    assert len(keys(cache)) == 3


def test_enforcing_a_limit_takes_the_cheapest_and_never_what_was_just_built(engines, open_cache, model):
    cache, (first, *_) = engines
    dear = open_cache(FakeBuilder(seconds=0.05)).get(model, dims=DIMS, optimization_level=5)
    unuse(cache, dear, seconds=DAY_S)
    unuse(cache, first, seconds=7200)
    plan = cache._removal.enforce(3 * 4096)
    assert [going.standing.key for going in plan.entries] == [first.key]
    new = open_cache(FakeBuilder(size_bytes=1 << 20)).get(model, dims=DIMS, optimization_level=1)
    plan = cache._removal.enforce(4096)
    assert keys(cache) == {new.key}
    assert plan.staying == (Staying("young", 1, 1 << 20),)
    assert new.path.exists()


def test_priorities_outlive_the_process_and_a_use_right_after_an_eviction_counts_more(engines, open_cache, monkeypatch):
    cache, (gone, used, idle) = engines
    unuse(cache, gone, seconds=7200)
    cache._removal.enforce(2 * 4096)
    cache._storage.last_used.touch(used.key)
    later = open_cache()
    (step,) = later._registry.inflation()
    assert step.value == rebuild_cost(gone.record)
    monkeypatch.setattr(removal, "utc_now", lambda: utc_now() + dt.timedelta(minutes=2))
    plan = later._removal.plan((), max_size_bytes=0)
    assert [(going.standing.key, going.priority) for going in plan.entries] == [
        (idle.key, rebuild_cost(idle.record)),
        (used.key, step.value + rebuild_cost(used.record)),
    ]


def test_only_an_eviction_by_size_raises_inflation(engines):
    cache, _ = engines
    cache.execute_prune(cache._removal.plan((), older_than_s=60))
    assert keys(cache) == set()
    assert cache._registry.inflation() == []


def test_what_this_host_cannot_use_goes_first_and_the_host_is_looked_at_only_where_needed(engines):
    cache, (foreign, *others) = engines
    asked = []
    cache._removal._usability = lambda: asked.append(1) or (lambda record: record.key != foreign.key)
    unuse(cache, foreign, seconds=2 * DAY_S)
    unuse(cache, *others, seconds=9 * DAY_S)
    assert cache._removal.enforce(3 * 4096) is None
    assert len(cache._removal.plan((), older_than_s=1.0).entries) == 3
    assert asked == []
    plan = cache._removal.enforce(2 * 4096)
    assert [(going.standing.key, going.reason) for going in plan.entries] == [(foreign.key, "unusable")]


# Blobs that lost their row while they may be in use


@pytest.fixture
def shared_root():
    """A shared folder that other users reach: pytest's own are closed to them."""
    if os.geteuid():
        pytest.skip("probe: not root, so no other user can be")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Root.open(Path(name) / "cache", "group")


def test_another_user_of_the_group_makes_a_blob_young_that_lost_its_row(shared_root, tmp_path):
    store = LocalBlobStore(shared_root)
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
