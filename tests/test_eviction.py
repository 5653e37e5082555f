from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import EPOCH, entry, hex_of

from enginecache.eviction import RECENT_USE_S, Garbage, Used, plan_prune

NOW = EPOCH + dt.timedelta(days=100)


def used(name, idle_s, size_bytes=100, *, blob=None, is_pinned=False):
    record = entry(name, digest=hex_of(blob or name), size_bytes=size_bytes, is_pinned=is_pinned)
    return Used(record, NOW - dt.timedelta(seconds=idle_s))


def names(plan):
    return [used.record.model_name.removesuffix(".onnx") for used in plan.entries]


def test_without_limits_nothing_goes():
    plan = plan_prune([used("a", 1e6)], [], NOW)
    assert plan.is_empty
    assert (plan.freed_bytes, plan.kept_bytes, plan.shortfall_bytes) == (0, 100, 0)


def test_the_least_recently_used_go_first_until_the_rest_fits():
    plan = plan_prune([used("b", 300), used("a", 400), used("c", 200)], [], NOW, max_size_bytes=150)
    assert names(plan) == ["a", "b"]
    assert (plan.freed_bytes, plan.kept_bytes, plan.shortfall_bytes) == (200, 100, 0)


def test_what_fits_stays():
    assert plan_prune([used("a", 400), used("b", 300)], [], NOW, max_size_bytes=200).is_empty


def test_old_ones_go_also_where_there_is_room():
    plan = plan_prune([used("a", 1001), used("b", 1000), used("c", 5000)], [], NOW, older_than_s=1000)
    assert names(plan) == ["c", "a"]


def test_pinned_ones_stay_and_the_shortfall_is_told():
    plan = plan_prune([used("a", 400, is_pinned=True), used("b", 300)], [], NOW, max_size_bytes=0, older_than_s=0)
    assert names(plan) == ["b"]
    assert (plan.kept_bytes, plan.shortfall_bytes) == (100, 100)


@pytest.mark.parametrize("idle_s", [-3600, 0, RECENT_USE_S - 1])
def test_what_was_just_used_stays(idle_s):
    plan = plan_prune([used("a", idle_s)], [], NOW, max_size_bytes=0, older_than_s=0)
    assert plan.is_empty
    assert plan.shortfall_bytes == 100


def test_a_shared_blob_goes_with_its_last_entry():
    shared = [used("a", 400, blob="x"), used("b", 300, blob="x")]
    assert plan_prune(shared, [], NOW, max_size_bytes=100).is_empty
    both = plan_prune(shared, [], NOW, max_size_bytes=99)
    assert (names(both), both.freed_bytes) == (["a", "b"], 100)
    one = plan_prune([used("a", 400, blob="x"), used("b", 30, blob="x")], [], NOW, max_size_bytes=0)
    assert (names(one), one.freed_bytes, one.kept_bytes) == (["a"], 0, 100)


def test_garbage_goes_always_and_counts():
    rubbish = Garbage(Path("orphan"), 7, "an orphan")
    plan = plan_prune([used("a", 400)], [rubbish], NOW)
    assert not plan.is_empty
    assert (plan.garbage, plan.freed_bytes, plan.kept_bytes) == ((rubbish,), 7, 100)


stored_entries = st.lists(st.tuples(st.integers(0, 5), st.floats(-100, 2000), st.booleans()), max_size=12).map(
    lambda rows: [
        used(f"{number}", idle_s, 10 ** (blob % 4), blob=str(blob), is_pinned=is_pinned)
        for number, (blob, idle_s, is_pinned) in enumerate(rows)
    ]
)
limits = st.none() | st.integers(0, 4000)


@given(stored_entries, limits, limits)
def test_any_plan_keeps_its_promises(stored, max_size_bytes, older_than_s):
    plan = plan_prune(stored, [], NOW, max_size_bytes=max_size_bytes, older_than_s=older_than_s)
    staying = [used for used in stored if used not in plan.entries]
    sizes = {used.record.digest: used.record.size_bytes for used in stored}
    kept = {used.record.digest for used in staying}
    assert not any(used.record.is_pinned for used in plan.entries)
    assert all((NOW - used.last_used_at).total_seconds() >= RECENT_USE_S for used in plan.entries)
    assert plan.kept_bytes == sum(sizes[digest] for digest in kept)
    assert plan.freed_bytes == sum(sizes.values()) - plan.kept_bytes
    if max_size_bytes is not None:
        assert plan.shortfall_bytes == max(plan.kept_bytes - max_size_bytes, 0)
        if plan.shortfall_bytes:
            assert all(
                used.record.is_pinned or (NOW - used.last_used_at).total_seconds() < RECENT_USE_S for used in staying
            )
    if max_size_bytes is None and older_than_s is None:
        assert plan.is_empty
    assert plan == plan_prune(stored[::-1], [], NOW, max_size_bytes=max_size_bytes, older_than_s=older_than_s)
