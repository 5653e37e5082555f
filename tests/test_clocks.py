"""Clocks that were wrong, in either direction: nothing is lost by them, and nothing is older than it was."""

from __future__ import annotations

import datetime as dt
import os
import time

import pytest
from records import attempt, hex_of

from enginecache.cli import fast_path
from enginecache.files.units import utc_now
from enginecache.host import evidence
from enginecache.maintenance.eviction import plan_prune
from enginecache.maintenance.orphans import KEPT_FOR_S, find_orphans
from enginecache.maintenance.verify import check_builds
from enginecache.pipeline import hit_cache
from enginecache.pipeline.failures import failure_in_force
from enginecache.storage.folder import Root
from enginecache.storage.last_used import UseLog
from enginecache.storage.locks import FileLocks

KEY = hex_of("key")
DAY_S = 86400.0
ASK = {"dims": {"batch": (1, 2, 4)}}


class Clock:
    """The clock that programs read; the kernel's own, which files' times come from, stays right."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._right = time.time

    def now_s(self) -> float:
        return self._right() + self.ahead_s


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(time, "time", found.now_s)
    monkeypatch.setattr(time, "time_ns", lambda: int(found.now_s() * 1e9))
    return found


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def uses(root):
    return UseLog(root)


def note(root, ahead_s):
    """The times of a note that was last touched by a clock that was so much ahead."""
    path = root.uses / KEY
    path.touch()
    os.utime(path, (time.time() + ahead_s, time.time() + ahead_s))
    return path


# Last uses


@pytest.mark.parametrize("behind_s", [1.0, 3600.0, 400 * DAY_S])
def test_a_use_under_a_clock_that_is_behind_makes_no_entry_older(root, uses, clock, behind_s):
    path = note(root, 0.0)
    before = path.stat().st_mtime_ns
    clock.ahead_s = -behind_s
    uses.touch(KEY)
    evidence.note_use(str(path))
    assert path.stat().st_mtime_ns == before


def test_a_use_under_a_right_clock_is_later_than_any_before(root, uses):
    path = note(root, -3600.0)
    uses.touch(KEY)
    assert abs(path.stat().st_mtime - time.time()) < 60


def test_a_prune_sees_a_use_under_a_clock_that_is_behind_as_one_of_now(root, uses, clock):
    note(root, 0.0)
    clock.ahead_s = -400 * DAY_S
    uses.touch(KEY)
    assert uses.last_used(KEY).timestamp() > time.time()
    assert uses.all() == {KEY: uses.last_used(KEY)}


@pytest.mark.parametrize(("idle_s", "is_now"), [(DAY_S / 2, True), (2 * DAY_S, False)])
def test_a_use_by_a_clock_that_was_ahead_counts_for_a_day_after_the_last(root, uses, clock, idle_s, is_now):
    note(root, 1000 * DAY_S)  # its ctime is the kernel's, of now
    clock.ahead_s = idle_s
    assert (uses.last_used(KEY).timestamp() > time.time()) is is_now
    assert abs(uses.last_used(KEY).timestamp() - (time.time() - idle_s)) < 60 or is_now


def test_notes_by_a_clock_that_was_ahead_begin_to_age(root, uses, clock):
    path = note(root, 1000 * DAY_S)
    clock.ahead_s = -3600.0  # by this one the ctime is ahead too
    before = path.stat()
    uses.age_those_ahead()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ctime_ns > before.st_ctime_ns


def test_a_note_of_another_user_that_is_ahead_is_no_error(root, monkeypatch):
    path = note(root, DAY_S)

    def refuse(path, **how):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    evidence.note_use(str(path))


def test_a_note_beyond_any_calendar_is_a_use_now(root, uses, monkeypatch):
    status = os.stat_result((0o100600, 1, 1, 1, 0, 0, 0, 0, 2**40, 2**40))
    monkeypatch.setattr("pathlib.Path.lstat", lambda _: status)
    assert uses.last_used(KEY).year == 9999


def test_the_door_moves_no_use_back(root, clock):
    path = note(root, 0.0)
    before = path.stat().st_mtime_ns
    clock.ahead_s = -DAY_S
    fast_path.note_use(str(path))
    assert path.stat().st_mtime_ns == before


def test_what_was_used_under_a_clock_that_is_behind_is_not_pruned_when_it_is_right_again(
    open_cache, model, clock, monkeypatch
):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    clock.ahead_s = -400 * DAY_S
    assert cache.get(model, **ASK).outcome == "hit"
    clock.ahead_s = 0.0
    plan = cache.plan_prune(older_than_s=30 * DAY_S, max_size_bytes=0)
    assert plan.is_empty
    assert [used.record.key for used in cache.entries()] == [entry.key]


# What a wrong clock said, by what is decided from it


def standing(cache, model):
    cache.get(model, **ASK)
    (found,) = cache._registry.standings({})
    return found


@pytest.mark.parametrize("ahead_s", [-400 * DAY_S, -3600.0, 3600.0, 400 * DAY_S])
@pytest.mark.parametrize("limits", [{"older_than_s": 500 * DAY_S}, {"older_than_s": 1e300}], ids=str)
def test_absurd_limits_and_clocks_plan_nothing_that_is_not_old(open_cache, model, ahead_s, limits):
    found = standing(open_cache(), model)
    now = utc_now() + dt.timedelta(seconds=ahead_s)
    assert plan_prune([found], [], now, 0.0, **limits).is_empty


@pytest.mark.parametrize(
    ("changed_s", "dated_s", "is_past"),
    [
        (0, 0, False),
        (-2 * KEPT_FOR_S, -2 * KEPT_FOR_S, True),
        (-2 * KEPT_FOR_S, 1000 * DAY_S, True),  # a date ahead that somebody gave it
        (1000 * DAY_S, 1000 * DAY_S, False),  # a clock that was ahead, or is behind
        (1000 * DAY_S, 0, False),
    ],
)
def test_an_orphan_is_as_old_as_its_ctime_where_its_mtime_is_ahead(root, monkeypatch, changed_s, dated_s, is_past):
    path = root.logs / "0123456789abcdef0123456789abcdef.log"
    path.touch()
    given, now_s = os.lstat(path), time.time()
    times = (now_s, now_s + dated_s, now_s + changed_s)
    monkeypatch.setattr(os, "lstat", lambda _path: os.stat_result((*given[:7], *times)))
    past, _ = find_orphans(root, lambda _: True, DAY_S, now=now_s)
    assert [item.path for item in past if item.path == path] == [path] * is_past


@pytest.mark.parametrize("grace_s", [0.0, DAY_S, 1e15, float("inf")])
@pytest.mark.parametrize("began_s", [-400 * DAY_S, -2.0, 3600.0, 400 * DAY_S])
def test_an_attempt_whose_process_died_is_found_unless_it_is_within_its_grace_time(open_cache, began_s, grace_s, model):
    cache = open_cache()
    began_at = utc_now() + dt.timedelta(seconds=began_s)
    build = attempt("a")
    cache._registry.start_build(type(build)(**{**vars(build), "started_at": began_at}))
    found = list(check_builds(cache._registry, FileLocks(cache.root), grace_s))
    assert bool(found) is (began_s > 0 or -began_s >= grace_s)
    cache._registry.abandon_build(build.id)


@pytest.mark.parametrize("ttl_s", [1.0, 3600.0, 1e15, float("inf")])
@pytest.mark.parametrize("failed_s", [-400 * DAY_S, -1.0, 30.0, 400 * DAY_S])
def test_a_failure_counts_for_its_time_and_one_far_ahead_not_at_all(ttl_s, failed_s):
    now = utc_now()
    build = attempt("a")
    failed = type(build)(
        **{
            **vars(build),
            "state": "failed",
            "is_lasting": True,
            "build_seconds": 0.0,
            "started_at": now + dt.timedelta(seconds=failed_s),
        }
    )
    found = failure_in_force([failed], now, ttl_s)
    assert (found is not None) is (failed_s < 60 and -failed_s < ttl_s)
    assert found is None or found.text


@pytest.mark.parametrize(
    ("changed_ns", "is_settled"),
    [
        (1_790_000_000_123_456_789 - hit_cache.TICK_NS, True),
        (1_790_000_000_123_456_789, False),
        (1_790_000_000_123_456_789 + hit_cache.TICK_NS, True),  # a change now would have an earlier time
        (1_790_009_000_000_000_000, False),  # whole seconds: until the clock has come to it
    ],
)
@pytest.mark.parametrize("mtime_ns", [0, 1_890_000_000_000_000_000])
def test_the_registry_is_believed_by_its_ctime_also_ahead_of_the_clock(monkeypatch, changed_ns, is_settled, mtime_ns):
    monkeypatch.setattr(time, "time_ns", lambda: 1_790_000_000_123_456_789)
    assert hit_cache._are_settled((1, 4096, mtime_ns, changed_ns)) is is_settled
