"""EngineCache as a library: what each verb does, and what it leaves alone. The builder counts instead of building."""

from __future__ import annotations

import datetime as dt
import importlib.util
import inspect
import multiprocessing
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
from fakes import H100, TOOLCHAIN, FakeBuilder, fake_cache
from models import linear, save
from waiting import LIMIT_S

import enginecache
from enginecache import errors as errors_module
from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.errors import (
    AmbiguousKeyError,
    BuilderCrashError,
    BuildError,
    EngineCacheError,
    LoadRefusedError,
    LockTimeoutError,
    ModelError,
    NotCachedError,
    OptionError,
    ProfileError,
    RegistryError,
    StoreError,
)
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.units import utc_now
from enginecache.host.targets import Target
from enginecache.key.matching import WIDER_REACH
from enginecache.maintenance.inspect import StoredEngines
from enginecache.pipeline import model_memo
from enginecache.pipeline.placement import Placement
from enginecache.pipeline.request import Ask, GetAsk
from enginecache.pipeline.results import Entry
from enginecache.trt.build.request import BuildProgress

DIMS = {"batch": (1, 32, 64)}
HOUR_S = 3600.0


class SameBytes(FakeBuilder):
    """Gives one plan to every request, as TensorRT may where an option changes nothing."""

    def build(self, request, progress=None):
        plan = super().build(request, progress)
        plan.plan_path.write_bytes(b"vtrt" + b"\0" * 4092)
        return plan


def age(path: Path, seconds: float) -> None:
    """Make a file look as if it had been written so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def unuse(cache: EngineCache, *entries, seconds: float = HOUR_S) -> None:
    """Make the last use of entries so long ago."""
    for entry in entries:
        age(cache.root.uses / entry.key, seconds)


def damage(path: Path) -> None:
    """Flip one bit in the middle of a stored engine, keeping its size and mode."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(mode)


def codes(entry) -> list[str]:
    return [reason.code for reason in entry.reasons]


@pytest.fixture
def builder() -> FakeBuilder:
    return FakeBuilder()


@pytest.fixture
def cache(open_cache, builder) -> EngineCache:
    return open_cache(builder)


@pytest.fixture
def models(tmp_path) -> list[Path]:
    """Three models of one graph and different weights."""
    return [save(linear(seed=seed), tmp_path / f"model{seed}.onnx") for seed in range(3)]


# get


def test_first_get_builds_and_second_hits(cache, builder, model):
    first, second = (cache.get(model, dims=DIMS) for _ in range(2))
    assert (first.outcome, second.outcome, builder.count) == ("built", "hit", 1)
    assert (first.key, first.digest, first.path) == (second.key, second.digest, second.path)
    assert (codes(first), codes(second)) == (["absent"], ["exact"])
    assert first.path.read_bytes().startswith(b"vtrt")
    assert first.path.stat().st_mode & 0o777 == 0o400


def test_entry_outlives_the_cache_that_made_it(open_cache, builder, model):
    open_cache(builder).get(model, dims=DIMS)
    assert open_cache(builder).get(model, dims=DIMS).outcome == "hit"


def test_model_bytes_have_the_key_of_their_file(cache, builder, model):
    entry = cache.get(model, dims=DIMS)
    assert cache.get(model.read_bytes(), dims=DIMS).key == entry.key
    assert builder.count == 1
    assert cache.get(model.read_bytes(), dims=DIMS).to_json()["model"]["path"] is None


def test_model_bytes_with_external_data_need_its_folder(cache, builder, tmp_path, model):
    external = save(linear(), tmp_path / "external" / "model.onnx", external="weights.bin")
    with pytest.raises(ModelError, match="base_dir"):
        cache.get(external.read_bytes(), dims=DIMS)
    entry = cache.get(external.read_bytes(), base_dir=external.parent, dims=DIMS)
    assert cache.get(model, dims=DIMS).key == entry.key
    assert builder.count == 1


def test_name_that_is_not_utf_8_is_stored_readably(cache, model, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.onnx"))
    path.write_bytes(model.read_bytes())
    assert cache.get(path, dims=DIMS).outcome == "built"
    assert [used.record.model_name for used in cache.entries()] == ["m\\udcff.onnx"]


def test_every_dimension_of_the_request_has_a_key_of_its_own(open_cache, cache, builder, model):
    asks = [
        {"dims": DIMS},
        {"dims": {"batch": 32}},
        {"dims": DIMS, "workspace_bytes": 1 << 30},
        {"dims": DIMS, "optimization_level": 5},
        {"dims": DIMS, "target": "sm_120"},
        {"dims": DIMS, "target": ("sm_89", "sm_120")},
        {"dims": DIMS, "target": "portable"},
    ]
    assert len({cache.get(model, **ask).key for ask in asks}) == builder.count == len(asks)


def test_build_record_names_the_device_it_was_built_on(open_cache, model):
    placement = Placement(TOOLCHAIN, Target((H100.compute_capability,), H100.model), H100, ())
    on_gpu = open_cache(place=lambda *_args, **_kwargs: placement)
    record = on_gpu.get(model, dims=DIMS).record
    assert (record.device_name, record.driver_version) == (H100.name, H100.driver_version)


def test_progress_is_passed_on(cache, model):
    steps: list[BuildProgress] = []
    cache.get(model, dims=DIMS, progress=steps.append)
    assert [step.phase for step in steps] == ["Building engine"]


def test_small_workspace_is_warned_of_when_it_is_built(cache, model):
    entry = cache.get(model, dims=DIMS, workspace_bytes=1 << 20)
    assert codes(entry) == ["absent", "warning"]


def test_bad_shapes_are_an_error_that_leaves_nothing(cache, builder, model):
    with pytest.raises(ProfileError):
        cache.get(model)
    assert builder.count == 0
    assert cache.builds() == []
    assert cache.misses() == []


def test_offline_miss_is_an_error_and_counts_as_a_miss(cache, builder, model):
    with pytest.raises(NotCachedError, match="no engine of this model is stored"):
        cache.get(model, dims=DIMS, offline=True)
    assert builder.count == 0
    assert cache.stats().misses == 1
    cache.get(model, dims=DIMS)
    assert cache.get(model, dims=DIMS, offline=True).outcome == "hit"


def test_rebuild_replaces_the_entry(cache, builder, model):
    before = cache.get(model, dims=DIMS)
    after = cache.get(model, dims=DIMS, rebuild=True)
    assert (after.outcome, builder.count, codes(after)) == ("built", 2, ["rebuild"])
    assert after.key == before.key
    assert after.record.created_at > before.record.created_at
    assert [used.record for used in cache.entries()] == [after.record]
    assert after.path.exists()


def test_offline_and_rebuild_exclude_each_other(cache, model):
    with pytest.raises(OptionError, match="exclude each other"):
        cache.get(model, dims=DIMS, offline=True, rebuild=True)


def test_rebuild_keeps_the_pin(cache, model):
    cache.pin(cache.get(model, dims=DIMS).record)
    assert cache.get(model, dims=DIMS, rebuild=True).record.is_pinned is False  # as it was committed
    assert cache.entries()[0].record.is_pinned


def test_rebuild_that_fails_leaves_the_stored_engine(open_cache, model):
    before = open_cache().get(model, dims=DIMS)

    def fail(_request):
        raise BuildError("no tactic", "try another")

    failing = open_cache(FakeBuilder(before=fail))
    with pytest.raises(BuildError):
        failing.get(model, dims=DIMS, rebuild=True)
    assert failing.get(model, dims=DIMS).digest == before.digest


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (BuildError("no tactic", "try another", "a log"), "no tactic"),
        (ValueError("in the callback"), "ValueError: in the callback"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_failed_attempt_leaves_its_reason_and_nothing_else(open_cache, model, raised, reason):
    def fail(_request):
        raise raised

    cache = open_cache(FakeBuilder(before=fail))
    with pytest.raises(type(raised)):
        cache.get(model, dims=DIMS)
    (build,) = cache.builds()
    assert (build.state, build.reason, build.pid) == ("failed", reason, os.getpid())
    assert cache.log_path(build).read_text() == "a fake build\n"
    assert cache.entries() == []
    assert list(cache.root.tmp.iterdir()) == []
    explained = cache.explain(model, dims=DIMS)
    assert (explained.failure, explained.failure_log) == (reason, cache.log_path(build))
    assert open_cache().get(model, dims=DIMS, rebuild=True).outcome == "built"
    assert [build.state for build in cache.builds()] == ["succeeded", "failed"]
    assert cache.explain(model, dims=DIMS).failure == ""


@pytest.mark.parametrize("is_committed", [False, True])
def test_blob_goes_again_when_its_row_cannot_be_committed(cache, monkeypatch, model, is_committed):
    def publish(*args):
        if is_committed:  # and the answer is lost
            real(*args)
        raise RegistryError("the disk is full", "free some space")

    real = cache._registry.publish
    monkeypatch.setattr(cache._registry, "publish", publish)
    with pytest.raises(RegistryError):
        cache.get(model, dims=DIMS)
    assert cache.verify(deep=True).young_orphans == ()
    monkeypatch.undo()
    assert cache.get(model, dims=DIMS).outcome == ("hit" if is_committed else "built")


def test_damaged_blob_is_a_miss_and_is_quarantined(cache, builder, model):
    entry = cache.get(model, dims=DIMS)
    damage(entry.path)
    again = cache.get(model, dims=DIMS)
    assert (again.outcome, codes(again), builder.count) == ("built", ["corrupt"], 2)
    assert again.path.read_bytes() == entry.path.read_bytes()
    (kept,) = cache.root.quarantine.iterdir()
    assert kept.name.startswith(entry.digest)
    assert cache.misses()[0].reason == "corrupt"


def test_missing_blob_is_a_miss(cache, model):
    entry = cache.get(model, dims=DIMS)
    entry.path.unlink()
    again = cache.get(model, dims=DIMS)
    assert (again.outcome, codes(again)) == ("built", ["corrupt"])
    assert "its file is missing" in again.reasons[0].text


def test_blob_that_was_replaced_by_a_link_is_not_served(cache, model, tmp_path):
    entry = cache.get(model, dims=DIMS)
    elsewhere = entry.path.rename(tmp_path / "elsewhere")
    entry.path.symlink_to(elsewhere)
    assert cache.get(model, dims=DIMS).outcome == "built"
    assert not entry.path.is_symlink()


def test_timeout_while_another_builds(open_cache, model):
    started, go_on = threading.Event(), threading.Event()

    def hang(_request):
        started.set()
        assert go_on.wait(LIMIT_S)

    cache = open_cache(FakeBuilder(before=hang))
    waits = []
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, model, dims=DIMS)
        assert started.wait(LIMIT_S)
        with pytest.raises(LockTimeoutError, match=f"process {os.getpid()} on"):
            cache.get(model, dims=DIMS, timeout_s=0.1, waiting=waits.append)
        with pytest.raises(LockTimeoutError):
            cache.get(model, dims=DIMS, timeout_s=0.0)
        go_on.set()
        assert first.result(LIMIT_S).outcome == "built"
    assert waits[0].holder.pid == os.getpid()


def test_configured_timeout_holds_where_none_is_asked(open_cache, model):
    cache = open_cache(timeout_s=0.05)
    with cache._storage.locks.hold(cache.explain(model, dims=DIMS).key, None), pytest.raises(LockTimeoutError):
        cache.get(model, dims=DIMS)


def test_threads_on_different_keys_build_at_once(open_cache, models):
    together = threading.Barrier(len(models), timeout=LIMIT_S)
    cache = open_cache(FakeBuilder(before=lambda _request: together.wait()))
    with ThreadPoolExecutor(len(models)) as pool:
        entries = list(pool.map(lambda path: cache.get(path, dims=DIMS), models))
    assert [entry.outcome for entry in entries] == ["built"] * len(models)


def test_who_waited_for_a_build_is_told_so(open_cache, model):
    started, waited = threading.Event(), threading.Event()

    def hang(_request):
        started.set()
        assert waited.wait(LIMIT_S)

    cache = open_cache(FakeBuilder(before=hang))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, model, dims=DIMS)
        assert started.wait(LIMIT_S)
        second = cache.get(model, dims=DIMS, waiting=lambda _wait: waited.set())
    assert (first.result().outcome, second.outcome) == ("built", "hit")
    assert codes(second) == ["waited", "absent"]


forking = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
"""From Python 3.12 on. A server may have threads, and forks nevertheless."""


@forking
def test_forked_child_uses_the_cache_it_inherited(cache, model):
    entry = cache.get(model, dims=DIMS)
    other = save(linear(seed=9), model.parent / "other.onnx")

    def use(results) -> None:
        results.put((cache.get(model, dims=DIMS).outcome, cache.get(other, dims=DIMS).outcome))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=use, args=(results,))
    child.start()
    child.join(LIMIT_S)
    assert child.exitcode == 0
    assert results.get() == ("hit", "built")
    assert cache.get(other, dims=DIMS).outcome == "hit"
    assert cache.get(model, dims=DIMS).digest == entry.digest


@forking
def test_process_forked_during_a_build_does_not_keep_its_lock(open_cache, model):
    pids = []

    def fork(_request) -> None:
        pid = os.fork()
        if not pid:
            time.sleep(10 * LIMIT_S)
            os._exit(0)  # never back into pytest
        pids.append(pid)

    cache = open_cache(FakeBuilder(before=fork))
    try:
        cache.get(model, dims=DIMS)
        cache.get(model, dims=DIMS, rebuild=True, timeout_s=0.0)
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    assert len(pids) == 2


# The memo


@pytest.fixture
def identified(monkeypatch) -> list[str]:
    """Names of the models that were read in full."""
    names = []

    def identify(source):
        names.append(source.name)
        return real(source)

    real = model_memo.identify
    monkeypatch.setattr(model_memo, "identify", identify)
    return names


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files count as settled at once: a test need not wait two seconds."""
    monkeypatch.setattr("enginecache.files.fingerprint.SETTLE_NS", 0)


@pytest.mark.usefixtures("settled")
def test_changed_external_data_is_a_miss(cache, identified, tmp_path):
    path = save(linear(), tmp_path / "external" / "model.onnx", external="weights.bin")
    first = cache.get(path, dims=DIMS)
    assert cache.get(path, dims=DIMS).outcome == "hit"
    damage(path.parent / "weights.bin")
    second = cache.get(path, dims=DIMS)
    assert second.key != first.key
    assert [c.verdict.level for c in cache.explain(path, dims=DIMS).candidates] == ["exact", "refused"]
    assert len(identified) == 2


def test_plan_that_is_deleted_between_get_and_load_is_built_again(cache, builder, model, monkeypatch):
    loaded = []

    def load(entry, **_):
        loaded.append(entry)
        if len(loaded) == 1:
            cache.remove(entry.record)
            raise NotCachedError("the engine was deleted")
        return "an engine"

    monkeypatch.setattr(Entry, "load", load)
    assert cache.load(model, dims=DIMS) == "an engine"
    assert builder.count == 2


# the limit


def idle(cache, *entries):
    """As if their last uses were an hour ago, in this order."""
    for number, entry in enumerate(entries):
        if (cache.root.uses / entry.key).exists():
            os.utime(cache.root.uses / entry.key, (time.time() - HOUR_S + number,) * 2)


def test_a_build_shrinks_the_cache_to_its_limit_and_spares_what_was_just_built(open_cache, models):
    cache = open_cache(max_size_bytes=2 * 4096)
    built = []
    for path in models[:3]:
        built.append(cache.get(path, dims=DIMS))
        idle(cache, *built[:-1])
    assert cache.stats().entries == 2
    assert built[2].path.exists()
    assert [reason.code for reason in built[2].reasons] == ["differs"]  # no warning


def test_a_limit_that_cannot_be_kept_is_a_warning_and_fails_no_build(open_cache, models):
    cache = open_cache(max_size_bytes=4096)
    for path in models[:2]:
        entry = cache.get(path, dims=DIMS)
    assert cache.stats().entries == 2  # both used just now
    (warning,) = [reason.text for reason in entry.reasons if reason.code == "warning"]
    assert warning == (
        "the cache is 4 KiB above its limit of 4 KiB: "
        "pinned engines and engines used within the last 10 min stay (`keep_recent`)"
    )


def test_the_next_build_removes_what_recent_use_kept_above_the_limit(open_cache, models):
    cache = open_cache(max_size_bytes=4096)
    above = [cache.get(path, dims=DIMS) for path in models[:2]]
    idle(cache, *above)
    last = cache.get(models[2], dims=DIMS)
    assert codes(last) == ["differs"]  # no warning
    assert [used.record.key for used in cache.entries()] == [last.key]


def test_without_a_time_to_keep_a_build_leaves_its_own_engine_alone(open_cache, models):
    cache = open_cache(FakeBuilder(seconds=0.2), max_size_bytes=4096, keep_recent_s=0.0)
    dear = cache.get(models[0], dims=DIMS)
    cheap = open_cache(FakeBuilder(), max_size_bytes=4096, keep_recent_s=0.0).get(models[1], dims=DIMS)
    assert (dear.path.exists(), cheap.path.exists()) == (False, True)
    small = open_cache(max_size_bytes=1024, keep_recent_s=0.0).get(models[2], dims=DIMS)
    (warning,) = [reason.text for reason in small.reasons if reason.code == "warning"]
    assert warning.endswith("above its limit of 1 KiB: pinned engines stay, and the one just built")
    assert [used.record.key for used in cache.entries()] == [small.key]


# explain


def test_explain_builds_nothing_and_counts_nothing(cache, builder, model):
    explained = cache.explain(model, dims=DIMS)
    assert (explained.verdict, explained.entry, explained.candidates) == ("miss", None, ())
    assert [reason.code for reason in explained.reasons] == ["absent"]
    assert builder.count == 0
    totals = cache.stats()
    assert (totals.misses, totals.entries, totals.builds_failed) == (0, 0, 0)
    assert cache.builds() == []
    assert list(cache.root.uses.iterdir()) == []


def test_explain_of_a_hit_is_no_use(cache, model):
    entry = cache.get(model, dims=DIMS)
    unuse(cache, entry)
    before = cache.entries()
    explained = cache.explain(model, dims=DIMS)
    assert (explained.verdict, explained.key) == ("hit", entry.key)
    assert explained.entry == entry.record
    assert cache.entries() == before


def test_explain_of_a_damaged_engine_is_a_miss_as_a_get_would_be(cache, builder, model):
    damage(cache.get(model, dims=DIMS).path)
    explained = cache.explain(model, dims=DIMS)
    assert (explained.verdict, explained.entry) == ("miss", None)
    assert [reason.code for reason in explained.reasons] == ["corrupt"]
    assert builder.count == 1
    assert cache.misses()[0].count == 1  # the one before


def test_explain_and_get_make_the_same_key(cache, model):
    asks = [{"dims": DIMS}, {"profiles": [{"x": ((1, 8), (32, 8), (64, 8))}]}]
    keys = {cache.explain(model, **ask).key for ask in asks} | {cache.get(model, **ask).key for ask in asks}
    assert len(keys) == 1


def test_nearest_engine_comes_first(cache, models):
    far = cache.get(models[1], dims=DIMS, workspace_bytes=1 << 30)
    near = cache.get(models[0], dims=DIMS, workspace_bytes=1 << 30)
    candidates = cache.explain(models[0], dims=DIMS).candidates
    assert [candidate.record.key for candidate in candidates] == [near.key, far.key]
    assert [difference.field for difference in candidates[0].verdict.differing] == ["options.workspace_bytes"]


def test_miss_is_recorded_with_the_field_that_differs(cache, model):
    near = cache.get(model, dims=DIMS)
    for _ in range(2):
        with pytest.raises(NotCachedError, match=r"options\.workspace_bytes: asked 1073741824, stored none"):
            cache.get(model, dims=DIMS, workspace_bytes=1 << 30, offline=True)
    miss = cache.misses()[0]
    assert (miss.nearest_key, miss.differing, miss.count) == (near.key, ("options.workspace_bytes",), 2)


# load


rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx")


@rtx
@pytest.mark.rtx
def test_plan_that_tensorrt_refuses_is_a_load_error_with_its_reason(cache, model):
    with pytest.raises(LoadRefusedError, match=r"TensorRT did not load the engine .*: \S+"):
        cache.load(model, dims=DIMS)


@rtx
@pytest.mark.rtx
def test_reason_of_a_refusal_is_of_this_load_alone(cache, models):
    reasons = []
    for path in models[:2]:
        with pytest.raises(LoadRefusedError) as caught:
            cache.load(path, dims=DIMS)
        reasons.append(caught.value.what.partition(".engine: ")[2])
    assert reasons[0]
    assert reasons[0] == reasons[1]


# Inspecting and keeping


def test_require_takes_a_unique_prefix_in_either_case(cache, model):
    entry = cache.get(model, dims=DIMS)
    for prefix in (entry.key, entry.key[:1], entry.key[:12].upper()):
        assert cache.find(prefix) == entry.record


def test_require_refuses_what_is_missing_ambiguous_or_no_key(cache, models):
    keys = []
    while len({key[0] for key in keys}) == len(keys):
        keys.append(cache.get(models[0], dims={"batch": len(keys) + 1}).key)
    shared = keys[-1][0]
    with pytest.raises(AmbiguousKeyError, match=f"several keys begin with {shared}") as caught:
        cache.find(shared)
    assert keys[-1][:16] in caught.value.fix
    unused = next(letter for letter in "0123456789abcdef" if letter not in {key[0] for key in keys})
    with pytest.raises(NotCachedError):
        cache.find(unused)
    for text in ("", "xyz", "a%", "*"):
        with pytest.raises(OptionError, match="is not a key"):
            cache.find(text)


def test_require_whole_does_not_hand_out_a_damaged_engine(cache, model):
    entry = cache.get(model, dims=DIMS)
    unuse(cache, entry)
    assert cache.find_intact(entry.key) == entry.record
    assert cache.entries()[0].last_used_at.timestamp() > time.time() - 60
    damage(entry.path)
    with pytest.raises(NotCachedError, match="was set aside"):
        cache.find_intact(entry.key)
    assert cache.entries() == []


def test_use_is_noted_at_every_hit_and_outside_the_blob(cache, model):
    entry = cache.get(model, dims=DIMS)
    unuse(cache, entry)
    before = entry.path.stat()
    cache.get(model, dims=DIMS)
    assert cache.entries()[0].last_used_at.timestamp() > time.time() - 60
    assert entry.path.stat().st_ctime_ns == before.st_ctime_ns


def test_remove_frees_the_blob_and_makes_a_miss(cache, model):
    entry = cache.get(model, dims=DIMS)
    assert cache.remove(entry.record) == entry.size_bytes
    assert not entry.path.exists()
    assert cache.remove(entry.record) == 0
    assert list(cache.root.uses.iterdir()) == []
    assert cache.get(model, dims=DIMS).outcome == "built"


def test_remove_of_an_entry_that_was_rebuilt_meanwhile_does_nothing(open_cache, model):
    cache = open_cache()
    old = cache.get(model, dims=DIMS)
    new = open_cache(FakeBuilder(size_bytes=8192)).get(model, dims=DIMS, rebuild=True)
    assert cache.remove(old.record) == 0
    assert cache.get(model, dims=DIMS).digest == new.digest


def test_pinned_entry_cannot_be_removed_until_it_is_unpinned(cache, model):
    entry = cache.get(model, dims=DIMS)
    for _ in range(2):
        cache.pin(entry.record)
    with pytest.raises(OptionError, match="is pinned") as caught:
        cache.remove(entry.record)
    assert f"enginecache unpin {entry.key[:12]}" in caught.value.fix
    assert entry.path.exists()
    for _ in range(2):
        cache.unpin(entry.record)
    assert cache.remove(entry.record) == entry.size_bytes


def test_blob_that_two_entries_share_goes_with_the_last(open_cache, model):
    cache = open_cache(SameBytes())
    first, second = (cache.get(model, dims=DIMS, optimization_level=level) for level in (3, 4))
    assert (first.digest, cache.stats().blobs, cache.stats().size_bytes) == (second.digest, 1, 4096)
    unuse(cache, first, second)
    plan = cache.plan_prune(max_size_bytes=0)
    assert (len(plan.entries), plan.freed_bytes) == (2, 4096)
    assert cache.remove(first.record) == 0
    assert cache.get(model, dims=DIMS, optimization_level=4).outcome == "hit"
    assert cache.remove(second.record) == 4096


def test_prune_takes_the_least_recently_used_and_frees_what_it_said(cache, models):
    entries = [cache.get(path, dims=DIMS) for path in models]
    for entry, seconds in zip(entries, (2000.0, 4000.0, 3000.0), strict=True):
        unuse(cache, entry, seconds=seconds)
    plan = cache.plan_prune(max_size_bytes=4096)
    assert [going.standing.key for going in plan.entries] == [entries[1].key, entries[2].key]
    assert len(cache.entries()) == 3
    assert cache.execute_prune(plan) == plan.freed_bytes == 8192
    assert [used.record.key for used in cache.entries()] == [entries[0].key]
    assert cache.plan_prune(max_size_bytes=4096).is_empty


def test_prune_by_age_takes_what_was_not_used_for_so_long(cache, models):
    old, *young = (cache.get(path, dims=DIMS) for path in models)
    unuse(cache, old, seconds=3 * HOUR_S)
    unuse(cache, *young, seconds=HOUR_S)
    assert [going.standing.key for going in cache.plan_prune(older_than_s=2 * HOUR_S).entries] == [old.key]


def test_prune_takes_the_configured_size(open_cache, models):
    cache = open_cache(max_size_bytes=4096)
    unuse(cache, *(cache.get(path, dims=DIMS) for path in models))
    assert len(cache.plan_prune().entries) == 2


def test_pinned_and_just_used_entries_survive_any_prune(cache, models):
    pinned, used, idle = (cache.get(path, dims=DIMS) for path in models)
    unuse(cache, pinned, idle)
    cache.pin(pinned.record)
    plan = cache.plan_prune(max_size_bytes=0, older_than_s=0.0)
    assert plan.shortfall_bytes == 8192
    cache.execute_prune(plan)
    assert {left.record.key for left in cache.entries()} == {pinned.key, used.key}
    assert not idle.path.exists()


def test_what_was_used_pinned_or_rebuilt_after_the_plan_stays(open_cache, models):
    cache = open_cache()
    used, pinned, rebuilt = (cache.get(path, dims=DIMS) for path in models)
    unuse(cache, used, pinned, rebuilt)
    plan = cache.plan_prune(max_size_bytes=0)
    assert len(plan.entries) == 3
    cache.get(models[0], dims=DIMS)
    cache.pin(pinned.record)
    open_cache(FakeBuilder(size_bytes=8192)).get(models[2], dims=DIMS, rebuild=True)
    assert cache.execute_prune(plan) == 0
    assert len(cache.entries()) == 3


def test_path_that_a_hit_hands_out_while_its_entry_is_pruned_stays_good(cache, monkeypatch, model):
    unuse(cache, cache.get(model, dims=DIMS))
    plan = cache.plan_prune(max_size_bytes=0)
    hits = []

    def remove(*args, **kwargs):
        hits.append(cache.get(model, dims=DIMS))  # after the prune looked for a use, before it takes the row
        return real(*args, **kwargs)

    real = cache._registry.remove
    monkeypatch.setattr(cache._registry, "remove", remove)
    assert cache.execute_prune(plan) == 0
    assert hits[0].outcome == "hit"
    assert hits[0].path.exists()
    assert [item.path for item in cache.verify().young_orphans] == [hits[0].path]
    assert cache.get(model, dims=DIMS).path == hits[0].path


def test_hit_that_reads_its_row_before_a_prune_takes_it_has_noted_its_use(cache, monkeypatch, model):
    entry = cache.get(model, dims=DIMS)
    unuse(cache, entry)
    plan = cache.plan_prune(max_size_bytes=0)

    def find(key):
        record = real(key)
        cache.execute_prune(plan)
        return record

    real = cache._lookup.find
    monkeypatch.setattr(cache._lookup, "find", find)
    hit = cache.get(model, dims=DIMS)
    assert (hit.outcome, hit.path.exists()) == ("hit", True)
    monkeypatch.undo()
    cache.get(model, dims=DIMS)


# verify


def test_totals_count_builds_misses_and_bytes(cache, models):
    for path in models[:2]:
        cache.get(path, dims=DIMS)
        cache.get(path, dims=DIMS)
    cache.pin(cache.entries()[0].record)
    totals = cache.stats()
    assert (totals.entries, totals.blobs, totals.size_bytes, totals.pinned) == (2, 2, 8192, 1)
    assert (totals.builds_succeeded, totals.builds_failed, totals.misses) == (2, 0, 2)
    assert totals.build_seconds == pytest.approx(0.002)
    assert [build.key for build in cache.builds()] == [used.record.key for used in cache.entries()]
    assert len(cache.builds(limit=1)) == 1


def test_folder_that_everyone_may_write_is_refused(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StoreError, match="everyone may write"):
        EngineCache(Config(dir=folder))


def test_every_error_of_a_get_is_one_of_ours(cache, tmp_path):
    for bad in (b"", b"\xff" * 64, tmp_path, tmp_path / "no.onnx", "\0"):
        with pytest.raises(EngineCacheError):
            cache.get(bad)


def test_rebuild_builds_although_the_stored_entry_is_from_the_future(cache, model, monkeypatch):
    cache.get(model, dims=DIMS)
    later = utc_now() + dt.timedelta(days=1)
    monkeypatch.setattr("enginecache.pipeline.publish.utc_now", lambda: later)
    cache.get(model, dims=DIMS, rebuild=True)
    monkeypatch.undo()
    assert cache.get(model, dims=DIMS, rebuild=True).outcome == "built"
    assert cache.stats().builds_succeeded == 3


@pytest.mark.rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx")
def test_load_heals_damage_that_moved_no_fingerprint(open_cache, model):
    builder = FakeBuilder()
    cache = open_cache(builder)
    entry = cache.get(model, dims=DIMS)
    entry.path.chmod(0o600)
    entry.path.write_bytes(b"rot" + entry.path.read_bytes()[3:])
    entry.path.chmod(0o400)
    cache._registry.remember("blob", Fingerprint.of_path(entry.path), {"digest": entry.digest})
    assert cache.get(model, dims=DIMS).outcome == "hit"  # nothing tells yet
    with pytest.raises(LoadRefusedError):  # of the fake plan that was built anew
        cache.load(model, dims=DIMS)
    assert builder.count == 2
    assert len(list(cache.root.quarantine.iterdir())) == 1


def test_model_that_is_exported_again_with_other_metadata_is_a_hit(open_cache, tmp_path):
    cache = open_cache()
    first = cache.get(save(linear(), tmp_path / "monday.onnx"), dims=DIMS)
    again = linear()
    again.producer_name, again.producer_version, again.model_version, again.ir_version = "exporter", "2", 7, 9
    again.graph.name = "other"
    again.metadata_props.add(key="date", value="2026-11-03")
    again.graph.node[0].metadata_props.add(key="git", value="0123abc")
    second = cache.get(save(again, tmp_path / "tuesday.onnx"), dims=DIMS)
    assert (second.outcome, second.key) == ("hit", first.key)


def test_value_info_is_no_reason_to_build_again_what_is_not_converted(open_cache, tmp_path):
    cache = open_cache()
    first = cache.get(save(linear(), tmp_path / "plain.onnx"), dims=DIMS)
    noted = linear()
    noted.graph.value_info.add(name="hidden")
    second = cache.get(save(noted, tmp_path / "noted.onnx"), dims=DIMS)
    assert (second.outcome, second.key) == ("hit", first.key)


@pytest.fixture
def linked(tmp_path):
    """A model whose external data is a link to another folder."""
    path = save(linear(), tmp_path / "model/m.onnx", external="w.bin")
    (tmp_path / "weights").write_bytes((path.parent / "w.bin").read_bytes())
    (path.parent / "w.bin").unlink()
    (path.parent / "w.bin").symlink_to(tmp_path / "weights")
    return path


def test_link_out_of_the_folder_is_followed_too_when_the_model_is_read_again_after_a_crash(open_cache, linked):
    def crash(_request):
        raise BuilderCrashError("SIGSEGV")

    with pytest.raises(BuilderCrashError):  # and not ModelChangedError
        open_cache(FakeBuilder(before=crash), follow_links=True).get(linked, dims=DIMS)


def test_link_out_of_the_folder_is_refused_although_it_was_followed_before(open_cache, linked, monkeypatch):
    monkeypatch.setattr("enginecache.files.fingerprint.SETTLE_NS", 0)
    with pytest.raises(ModelError, match="leaves the model's folder"):
        open_cache().get(linked, dims=DIMS)
    assert open_cache(follow_links=True).get(linked, dims=DIMS).outcome == "built"
    assert open_cache(follow_links=True).get(linked, dims=DIMS).outcome == "hit"
    with pytest.raises(ModelError, match="leaves the model's folder"):
        open_cache().get(linked, dims=DIMS)


# The keywords


ASKING = {name: inspect.signature(getattr(EngineCache, name)) for name in ("get", "load", "explain", "adopt")}


def keywords_of(name: str) -> dict[str, inspect.Parameter]:
    return {key: each for key, each in ASKING[name].parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ASKING)
def test_signature_shows_every_keyword_with_its_type_and_default(name):
    assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in ASKING[name].parameters.values())
    for each in keywords_of(name).values():
        assert each.annotation is not inspect.Parameter.empty
        assert each.default is not inspect.Parameter.empty


def test_get_load_explain_and_adopt_agree_on_their_keywords():
    get, load, explain, adopt = (keywords_of(name) for name in ASKING)
    assert {*get} == GetAsk.__optional_keys__
    assert {*explain} == Ask.__optional_keys__
    assert {*load} - {*get} == {"trial", "trusted", "if_unloadable"}
    assert {key: load[key] for key in get} == get
    assert {key: get[key] for key in explain} == explain == adopt


def test_help_describes_every_keyword_of_get():
    described = re.findall(r"^    +(\w+): ", inspect.getdoc(EngineCache.get).split("Raises:")[0], re.MULTILINE)
    assert described == ["model", *keywords_of("get")]


@pytest.mark.parametrize("name", ASKING)
def test_unknown_keyword_is_a_type_error_that_names_it(cache, model, name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'dim'"):
        getattr(cache, name)(*[model] * (2 if name == "adopt" else 1), dim={"batch": (1, 2, 4)})


def test_defaults_written_out_ask_for_the_same_as_defaults_left_out(cache, model):
    dims = {"batch": (1, 2, 4)}
    written = {key: each.default for key, each in keywords_of("explain").items()} | {"dims": dims}
    assert cache.explain(model, **written).key == cache.explain(model, dims=dims).key


@pytest.mark.parametrize("precision", ["FP16", ["fp16"], ("Fp16",)])
def test_precision_is_read_in_any_case(cache, model, precision):
    dims = {"batch": (1, 2, 4)}
    assert cache.explain(model, dims=dims, precision=precision).fields["options"]["precision"] == ["fp16"]


# Opening


OPENERS = {"call": EngineCache, "open": EngineCache.open, "stored": StoredEngines.open}


@pytest.mark.parametrize(
    "open_one", [EngineCache, EngineCache.open, StoredEngines.open], ids=["call", "open", "stored"]
)
def test_cache_opens_from_a_path_a_config_or_the_environment(open_one, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ENGINECACHE_DIR", str(tmp_path / "other"))
    assert open_one(folder).root.path == open_one(str(folder)).root.path == open_one(dir=folder).root.path == folder
    assert open_one(Config(dir=folder, grace_s=5.0)).config.grace_s == 5.0
    assert open_one().root.path == tmp_path / "other"


@pytest.mark.parametrize("open_one", [EngineCache, EngineCache.open], ids=["call", "open"])
def test_settings_are_keywords_and_an_unknown_one_is_a_type_error(open_one, tmp_path):
    opened = open_one(tmp_path, max_size_bytes=1 << 20, timeout_s=0, follow_links=True, pass_environment=["A"])
    assert (opened.config.max_size_bytes, opened.config.timeout_s) == (1 << 20, 0)
    assert (opened.config.follow_links, opened.config.pass_environment) == (True, ("A",))
    with pytest.raises(TypeError, match="directory"):
        open_one(directory=tmp_path)
    with pytest.raises(TypeError, match="grace_s"):
        open_one(Config(dir=tmp_path), grace_s=5.0)


@pytest.mark.parametrize(
    "open_one", [EngineCache, EngineCache.open, StoredEngines.open], ids=["call", "open", "stored"]
)
def test_every_setting_is_a_typed_keyword(open_one):
    parameters = inspect.signature(open_one).parameters
    settings = [field.name for field in fields(Config) if field.name != "dir_from"]
    assert [name for name in parameters if name not in {"builder", "place"}] == settings
    assert all(each.annotation is not inspect.Parameter.empty for each in parameters.values())


# What names an engine


def test_verbs_take_an_entry_its_row_its_key_or_the_first_characters_of_that(cache, model):
    entry = cache.get(model, dims={"batch": (1, 2, 4)})
    (used,) = cache.entries()
    for engine in (entry, entry.record, entry.key, entry.key[:8], used):
        assert cache.path(engine) == entry.path
        assert cache.is_intact(engine)
        assert cache.with_last_use(engine).record.key == entry.key
        cache.pin(engine)
        assert cache.find(entry.key).is_pinned
        cache.unpin(engine)
        assert not cache.find(entry.key).is_pinned
        assert cache.remove(engine) == entry.size_bytes
        cache.get(model, dims={"batch": (1, 2, 4)})


def test_key_that_names_nothing_is_not_cached(cache):
    for verb in (cache.pin, cache.unpin, cache.path, cache.is_intact, cache.remove):
        with pytest.raises(NotCachedError):
            verb("ab" * 32)


def test_entry_is_a_path_with_a_short_repr(cache, model):
    entry = cache.get(model, dims={"batch": (1, 2, 4)})
    assert os.fspath(entry) == str(entry.path)
    assert Path(entry).read_bytes() == entry.path.read_bytes()
    assert isinstance(entry, os.PathLike)
    assert repr(entry) == f"Entry('built', key='{entry.key[:12]}', path='{entry.path}')"
    assert entry.record.key_json not in repr(entry.record)


# Public names


def test_every_error_is_importable_from_the_package():
    errors = {name for name in vars(errors_module) if name.endswith("Error")}
    assert errors <= {*enginecache.__all__}
    assert all(getattr(enginecache, name) is getattr(errors_module, name) for name in errors)
    assert {*enginecache.__all__} == {*enginecache._HOMES, "__version__"}


def test_reason_codes_are_those_of_the_code_and_each_is_described():
    code = "\n".join(path.read_text(encoding="utf-8") for path in Path(enginecache.__file__).parent.rglob("*.py"))
    used = {*re.findall(r"\bReason\(\s*\"(\w+)\"", code)} | {WIDER_REACH}
    assert used == {*enginecache.REASON_CODES}
    assert re.findall(r"\bReason\(\s*(?!\"|WIDER_REACH|NamedTuple)\w+", code) == []
    assert used <= {*re.findall(r"``(\w+)``", inspect.getdoc(enginecache.Reason))}


def test_load_sees_a_cache_that_another_process_made_since_it_was_opened(model, tmp_path):
    cache, other = fake_cache(tmp_path / "new"), fake_cache(tmp_path / "new")
    other.get(model, dims={"batch": (1, 2, 4)})
    with pytest.raises(NotCachedError, match="the nearest stored engine"):
        cache.load(model, dims={"batch": (1, 2, 5)}, offline=True)
    assert cache.root.is_made
