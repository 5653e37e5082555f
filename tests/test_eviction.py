from __future__ import annotations

import dataclasses
import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import H100, TOOLCHAIN
from hypothesis import given
from hypothesis import strategies as st
from records import EPOCH, entry, hex_of, standing

from enginecache.files.units import DAY_S
from enginecache.maintenance import eviction
from enginecache.maintenance.eviction import (
    FOREIGN_USE_S,
    Orphan,
    Staying,
    inflation_after,
    rebuild_cost,
    usable_here,
)
from enginecache.storage.registry.rows import InflationStep

NOW = EPOCH + dt.timedelta(days=100)
GIB = 1 << 30
BENCHMARK = Path(__file__).parents[1] / "benchmarks/eviction.py"
KEEP_RECENT_S = 60.0


def plan_prune(stored, garbage, now, keep_recent_s=KEEP_RECENT_S, **limits):
    return eviction.plan_prune(stored, garbage, now, keep_recent_s, **limits)


def used(name, idle_s, size_bytes=100, *, blob=None, **values):
    record = entry(name, digest=hex_of(blob or name), size_bytes=size_bytes, **values)
    return standing(record, ago(idle_s))


def ago(idle_s):
    return NOW - dt.timedelta(seconds=idle_s)


def step(idle_s, value):
    return InflationStep(ago(idle_s), value)


def names(plan):
    return [going.standing.model_name.removesuffix(".onnx") for going in plan.entries]


def reasons(plan):
    return [going.reason for going in plan.entries]


def test_without_limits_nothing_goes():
    plan = plan_prune([used("a", 1e6)], [], NOW)
    assert plan.is_empty
    assert (plan.freed_bytes, plan.kept_bytes, plan.shortfall_bytes, plan.staying) == (0, 100, 0, ())


# By size


def test_of_equal_size_the_quickest_to_build_goes_first():
    stored = [
        used("a", 300, build_seconds=60.0),
        used("b", 300, build_seconds=20.0),
        used("c", 900, build_seconds=40.0),
    ]
    plan = plan_prune(stored, [], NOW, max_size_bytes=150)
    assert names(plan) == ["b", "c"]
    assert reasons(plan) == ["cheapest"] * 2
    assert (plan.freed_bytes, plan.kept_bytes, plan.shortfall_bytes) == (200, 100, 0)


def test_of_equal_cost_the_largest_goes_first():
    assert names(plan_prune([used("a", 900, 10), used("b", 300, 1000)], [], NOW, max_size_bytes=100)) == ["b"]


def test_the_cost_is_seconds_per_gib_also_of_an_empty_blob():
    assert rebuild_cost(entry("a", size_bytes=GIB, build_seconds=60.0)) == 60.0
    assert rebuild_cost(entry("a", size_bytes=GIB // 4, build_seconds=60.0)) == 240.0
    assert rebuild_cost(entry("a", size_bytes=0, build_seconds=1.0)) == GIB


def test_of_equal_cost_and_size_the_least_recently_used_go_first_until_the_rest_fits():
    plan = plan_prune([used("b", 300), used("a", 400), used("c", 200)], [], NOW, max_size_bytes=150)
    assert names(plan) == ["a", "b"]


def test_what_fits_stays():
    assert plan_prune([used("a", 400), used("b", 300)], [], NOW, max_size_bytes=200).is_empty


def test_what_was_used_since_inflation_rose_outranks_what_costs_more():
    stored = [used("dear", 500, GIB, build_seconds=60.0), used("cheap", 100, GIB, build_seconds=20.0)]
    assert names(plan_prune(stored, [], NOW, max_size_bytes=GIB)) == ["cheap"]
    plan = plan_prune(stored, [], NOW, max_size_bytes=GIB, inflation=[step(900, 10.0), step(300, 60.0)])
    assert names(plan) == ["dear"]
    assert plan.entries[0].priority == 10.0 + 60.0


def test_a_use_at_the_very_time_of_a_step_has_its_value():
    plan = plan_prune([used("a", 300, GIB)], [], NOW, max_size_bytes=0, inflation=[step(300, 50.0)])
    assert plan.entries[0].priority == 52.5


def test_a_step_of_a_clock_that_was_ahead_counts_from_now_on():
    stored = [used("before", 300, GIB), used("ahead", -7200, GIB, build_seconds=0.0)]
    inflation = [step(600, 10.0), step(-3600, 50.0)]
    plan = plan_prune(stored, [], NOW, max_size_bytes=0, inflation=inflation)
    assert [(going.standing.model_name, going.priority) for going in plan.entries] == [("before.onnx", 12.5)]
    assert plan.staying == (Staying("young", 1, GIB),)


def test_inflation_rises_to_the_highest_priority_that_went_by_size():
    stored = [used(name, 300, GIB, build_seconds=seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    plan = plan_prune(stored, [], NOW, max_size_bytes=GIB)
    assert inflation_after(plan.entries) == 2.0
    by_age = plan_prune(stored, [], NOW, older_than_s=0)
    assert len(by_age.entries) == 3
    assert inflation_after(by_age.entries) is None
    unusable = plan_prune([used("a", DAY_S * 2)], [], NOW, max_size_bytes=0, is_usable=lambda _: False)
    assert (reasons(unusable), inflation_after(unusable.entries)) == (["unusable"], None)


def textbook(requests, engines, capacity):
    """GreedyDual-Size as Cao and Irani wrote it down; which engines are stored after each request."""
    stored, inflation = {}, 0.0
    for number in requests:
        record = engines[number]
        if number not in stored:
            while sum(engines[other].size_bytes for other in stored) + record.size_bytes > capacity:
                lowest = min(stored, key=stored.get)
                inflation = stored.pop(lowest)
        stored[number] = inflation + rebuild_cost(record)
        yield set(stored)


def planned(requests, engines, capacity):
    """The same through plans: each engine is published, the limit enforced, and then its use noted."""
    stored, inflation, now = {}, [], NOW
    for number in requests:
        now += dt.timedelta(seconds=KEEP_RECENT_S)
        stored[number] = standing(engines[number], now)
        plan = plan_prune(list(stored.values()), [], now, max_size_bytes=capacity, inflation=inflation)
        for going in plan.entries:
            del stored[int(going.standing.model_name)]
        value = inflation_after(plan.entries)
        if value is not None:
            inflation.append(InflationStep(now, value))
        stored[number] = standing(engines[number], now)
        yield set(stored)


@given(st.lists(st.integers(0, 7), max_size=60), st.lists(st.tuples(st.integers(1, 5), st.floats(1, 100)), min_size=8))
def test_what_stays_is_what_the_paper_says(requests, shapes):
    engines = [
        # Priorities that are alike would leave the choice open.
        entry(f"{number}", model_name=f"{number}", size_bytes=size * 100, build_seconds=seconds + number * 1e-3)
        for number, (size, seconds) in enumerate(shapes)
    ]
    assert list(planned(requests, engines, 1000)) == list(textbook(requests, engines, 1000))


# By age


def test_old_ones_go_also_where_there_is_room():
    plan = plan_prune([used("a", 1001), used("b", 1000), used("c", 5000)], [], NOW, older_than_s=1000)
    assert names(plan) == ["c", "a"]
    assert reasons(plan) == ["old", "old"]


def test_after_the_old_ones_the_size_decides():
    stored = [used("old", 5000, build_seconds=99.0), used("dear", 90, build_seconds=9.0), used("cheap", 80)]
    plan = plan_prune(stored, [], NOW, older_than_s=1000, max_size_bytes=100)
    assert list(zip(names(plan), reasons(plan), strict=True)) == [("old", "old"), ("cheap", "cheapest")]


# What this host cannot use


def test_what_this_host_cannot_use_goes_first_and_only_where_the_size_is_too_much():
    stored = [used("dear", FOREIGN_USE_S, build_seconds=1e6), used("cheap", DAY_S * 9), used("mine", DAY_S * 9)]

    def is_usable(record):
        return record.model_name != "dear.onnx"

    plan = plan_prune(stored, [], NOW, max_size_bytes=100, is_usable=is_usable)
    assert (names(plan), reasons(plan)) == (["dear", "cheap"], ["unusable", "cheapest"])
    assert plan_prune(stored, [], NOW, max_size_bytes=300, is_usable=is_usable).is_empty


def test_what_another_container_used_within_a_day_keeps_its_rank():
    stored = [used("foreign", FOREIGN_USE_S - 1, build_seconds=9.0), used("cheap", 100)]
    plan = plan_prune(stored, [], NOW, max_size_bytes=100, is_usable=lambda record: record.model_name == "cheap.onnx")
    assert names(plan) == ["cheap"]


def test_a_blob_that_one_of_its_entries_can_use_is_usable():
    stored = [used("a", DAY_S * 2, blob="x"), used("b", DAY_S * 2, blob="x")]
    plan = plan_prune(stored, [], NOW, max_size_bytes=0, is_usable=lambda record: record.model_name == "b.onnx")
    assert reasons(plan) == ["cheapest"] * 2


@pytest.mark.parametrize(
    ("values", "toolchains", "devices", "expected"),
    [
        ({}, [TOOLCHAIN], [], True),
        ({"tensorrt_version": "1.7.0.1"}, [TOOLCHAIN], [], False),
        ({"backend": "tensorrt"}, [TOOLCHAIN], [], False),
        ({"tensorrt_version": "1.7.0.1"}, [], [], True),
        ({"compute_capabilities": ("8.9",)}, [TOOLCHAIN], [H100], False),
        ({"compute_capabilities": ("8.9", "9.0")}, [TOOLCHAIN], [H100], True),
        ({"compute_capabilities": ("8.0+",)}, [TOOLCHAIN], [H100], True),
        ({"compute_capabilities": ("a later release's",)}, [TOOLCHAIN], [H100], True),
    ],
)
def test_usable_is_what_an_installed_toolchain_and_a_gpu_here_can_use(values, toolchains, devices, expected):
    assert usable_here(toolchains, devices)(entry("a", **values)) is expected


# What stays


def test_pinned_engines_stay_and_the_shortfall_is_reported():
    plan = plan_prune([used("a", 400, is_pinned=True), used("b", 300)], [], NOW, max_size_bytes=0, older_than_s=0)
    assert names(plan) == ["b"]
    assert (plan.kept_bytes, plan.shortfall_bytes, plan.staying) == (100, 100, (Staying("pinned", 1, 100),))


@pytest.mark.parametrize("idle_s", [-(10**9), -3600, 0, KEEP_RECENT_S - 1])
def test_what_was_just_used_stays_also_by_a_clock_that_was_ahead(idle_s):
    plan = plan_prune([used("a", idle_s)], [], NOW, max_size_bytes=0, older_than_s=0)
    assert plan.is_empty
    assert (plan.shortfall_bytes, plan.staying) == (100, (Staying("young", 1, 100),))


def test_without_a_time_to_keep_what_was_just_used_goes_too():
    stored = [used("a", 0), used("ahead", -3600), used("pinned", 0, is_pinned=True)]
    plan = plan_prune(stored, [], NOW, 0.0, max_size_bytes=0)
    assert set(names(plan)) == {"a", "ahead"}
    assert plan.staying == (Staying("pinned", 1, 100),)


def test_what_was_just_built_stays_whatever_the_time_to_keep():
    stored = [used("built", 1, build_seconds=0.1), used("dear", 400, build_seconds=99.0)]
    plan = plan_prune(stored, [], NOW, 0.0, max_size_bytes=100, built=hex_of("built"))
    assert names(plan) == ["dear"]
    assert plan_prune(stored, [], NOW, 0.0, max_size_bytes=0, built=hex_of("built")).staying == (
        Staying("young", 1, 100),
    )


# Shared blobs


def test_a_shared_blob_goes_with_all_its_entries_or_not_at_all():
    shared = [used("b", 300, blob="x"), used("a", 400, blob="x")]
    assert plan_prune(shared, [], NOW, max_size_bytes=100).is_empty
    both = plan_prune(shared, [], NOW, max_size_bytes=99)
    assert (set(names(both)), both.freed_bytes) == ({"a", "b"}, 100)
    assert [len(group) for group in both.groups] == [2]


@pytest.mark.parametrize("other", [used("b", 30, blob="x"), used("b", 300, blob="x", is_pinned=True)])
def test_an_entry_that_must_stay_keeps_the_others_of_its_blob(other):
    plan = plan_prune([used("a", 400, blob="x"), other], [], NOW, max_size_bytes=0, older_than_s=0)
    assert plan.is_empty
    assert plan.shortfall_bytes == 100


def test_the_best_of_its_entries_speaks_for_a_shared_blob():
    stored = [
        used("a", 900, GIB, blob="x", build_seconds=1.0),
        used("b", 900, GIB, blob="x", build_seconds=50.0),
        used("c", 900, GIB, build_seconds=20.0),
    ]
    assert names(plan_prune(stored, [], NOW, max_size_bytes=GIB)) == ["c"]


def test_orphans_are_always_deleted_and_counted():
    rubbish = Orphan(Path("orphan"), 7, "an orphan")
    plan = plan_prune([used("a", 400)], [rubbish], NOW)
    assert not plan.is_empty
    assert (plan.orphans, plan.freed_bytes, plan.kept_bytes) == ((rubbish,), 7, 100)


# Any plan


@st.composite
def caches(draw):
    """Entries, some of which share blobs, with what else a plan is made from."""
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 5), st.floats(-100, 3 * DAY_S), st.booleans(), st.floats(0, 100)), max_size=12
        )
    )
    stored = [
        used(f"{number}", idle_s, 10 ** (blob % 4), blob=f"{blob}", is_pinned=is_pinned, build_seconds=seconds)
        for number, (blob, idle_s, is_pinned, seconds) in enumerate(rows)
    ]
    steps = sorted(draw(st.dictionaries(st.floats(-100, 2000), st.floats(0, 1e9), max_size=4)).items(), reverse=True)
    values = sorted(value for _, value in steps)
    built = hex_of(f"{draw(st.integers(0, 5))}")
    foreign = {f"{number}.onnx" for number in draw(st.sets(st.integers(0, 11)))}
    return stored, {
        "keep_recent_s": draw(st.sampled_from([0.0, KEEP_RECENT_S, DAY_S])),
        "max_size_bytes": draw(st.none() | st.integers(0, 4000)),
        "older_than_s": draw(st.none() | st.integers(0, 4000)),
        "inflation": [step(idle_s, value) for (idle_s, _), value in zip(steps, values, strict=True)],
        "built": draw(st.none() | st.just(built)),
        "is_usable": lambda record: record.model_name not in foreign,
    }


@given(caches())
def test_any_plan_keeps_its_promises(cache):
    stored, asked = cache
    plan = plan_prune(stored, [], NOW, **asked)
    going = [item.standing for item in plan.entries]
    staying = [item for item in stored if item not in going]
    sizes = {item.digest: item.size_bytes for item in stored}
    kept = {item.digest for item in staying}

    def must_stay(item):
        is_young = max((NOW - item.last_used_at).total_seconds(), 0.0) < asked["keep_recent_s"]
        return item.is_pinned or is_young or item.digest == asked["built"]

    assert not any(must_stay(item) for item in going)
    assert kept.isdisjoint(item.digest for item in going)
    assert plan.kept_bytes == sum(sizes[digest] for digest in kept)
    assert plan.freed_bytes == sum(sizes.values()) - plan.kept_bytes
    limit = asked["max_size_bytes"]
    assert plan.shortfall_bytes == (0 if limit is None else max(plan.kept_bytes - limit, 0))
    if plan.shortfall_bytes:
        busy = {item.digest for item in staying if must_stay(item)}
        assert busy == kept
        assert sum(passed.blobs for passed in plan.staying) == len(kept)
        assert sum(passed.size_bytes for passed in plan.staying) == plan.kept_bytes
    if limit is None and asked["older_than_s"] is None:
        assert plan.is_empty


@given(caches())
def test_a_plan_does_not_depend_on_the_order_of_the_entries(cache):
    stored, asked = cache
    assert plan_prune(stored, [], NOW, **asked) == plan_prune(stored[::-1], [], NOW, **asked)


@given(caches())
def test_when_a_plan_is_carried_out_nothing_is_left_to_do(cache):
    stored, asked = cache
    plan = plan_prune(stored, [], NOW, **asked)
    left = [item for item in stored if item not in [going.standing for going in plan.entries]]
    value = inflation_after(plan.entries)
    if value is not None:
        asked["inflation"] = [*asked["inflation"], InflationStep(NOW, value)]
    again = plan_prune(left, [], NOW, **asked)
    assert again.is_empty
    assert again == dataclasses.replace(again, kept_bytes=plan.kept_bytes, shortfall_bytes=plan.shortfall_bytes)


def test_the_benchmark_replays_the_planner_and_finds_it_better_than_lru():
    command = [sys.executable, str(BENCHMARK), "--requests", "3000", "--keys", "400", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert {row["trace"] for row in rows} == {"fleet", "recency"}
    ratios = {(row["trace"], row["policy"]): row["to_lru"] for row in rows if row["capacity"] == 0.15}
    assert ratios["fleet", "lru"] == 1.0
    assert ratios["fleet", "clairvoyant"] < ratios["fleet", "gds (enginecache)"] < 0.8
    assert ratios["recency", "gds (enginecache)"] < 1.1
