"""Failed builds are remembered for a while: which, how long, what the next caller sees, and what clears them."""

from __future__ import annotations

import datetime as dt
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import TOOLCHAIN, FakeBuilder, place_with
from hypothesis import given
from hypothesis import strategies as st
from models import linear, save
from waiting import LIMIT_S

from enginecache.cache import EngineCache
from enginecache.errors import (
    BackendError,
    BuilderCrashError,
    BuilderKilledError,
    BuildError,
    ConfigError,
    EngineCacheError,
    InvalidInputError,
    LockTimeoutError,
    ModelChangedError,
    ModelError,
    NoDeviceError,
    NotCachedError,
    OptionError,
    OutOfMemoryError,
    ProfileError,
    RegistryError,
    ResourceError,
    SchemaError,
    StoreError,
    TargetError,
    ToolchainError,
    UnsupportedOptionError,
)
from enginecache.files.units import WRONG_CLOCK_S, format_duration, utc_now
from enginecache.pipeline import failures, publish
from enginecache.pipeline.failures import LONGEST_S, failure_in_force, is_lasting
from enginecache.storage.registry.rows import BuildRecord
from enginecache.trt.build import codec

DIMS = {"batch": (1, 32, 64)}
NOW = dt.datetime(2026, 11, 24, 12, tzinfo=dt.timezone.utc)
HOUR_S = 3600.0
REASON = "TensorRT-RTX 1.7.1.116 refuses model.onnx: no tactic for node 7"


def attempt(age_s: float, *, is_lasting: bool | None = True, seconds: float = 0.0) -> BuildRecord:
    """An attempt that failed so many seconds before NOW."""
    started_at = NOW - dt.timedelta(seconds=age_s + seconds)
    return BuildRecord("a" * 32, "b" * 64, "failed", started_at, "host", 1, seconds, REASON, is_lasting)


def in_force(*ages_s: float, ttl_s: float = HOUR_S):
    return failure_in_force([attempt(age_s) for age_s in ages_s], NOW, ttl_s)


# Which failure is in force


@pytest.mark.parametrize(("age_s", "remaining_s"), [(0.0, 3600.0), (3599.0, 1.0), (3600.0, None), (1e9, None)])
def test_a_failure_counts_for_its_time(age_s, remaining_s):
    found = in_force(age_s)
    assert (None if found is None else (found.remaining_s, found.age_s, found.count)) == (
        None if remaining_s is None else (remaining_s, age_s, 1)
    )


def test_nothing_failed_and_nothing_remembered_are_no_failure():
    assert failure_in_force([], NOW, HOUR_S) is None
    assert in_force(0.0, ttl_s=0.0) is None


def test_each_failure_in_a_row_counts_twice_as_long_up_to_a_day():
    hours = [in_force(*range(count)).remaining_s / HOUR_S for count in range(1, 9)]
    assert hours == [1, 2, 4, 8, 16, 24, 24, 24]
    assert in_force(*range(5000)).remaining_s == LONGEST_S
    assert in_force(0.0, ttl_s=3 * LONGEST_S).remaining_s == 3 * LONGEST_S  # as it was asked for


def test_the_time_counts_from_the_end_of_the_build():
    assert failure_in_force([attempt(10.0, seconds=7200.0)], NOW, HOUR_S).age_s == 10.0


@pytest.mark.parametrize("lasting", [False, None])
def test_an_attempt_that_was_ended_from_outside_ends_the_row(lasting):
    killed = attempt(5.0, is_lasting=lasting)
    assert failure_in_force([killed, attempt(10.0)], NOW, HOUR_S) is None
    assert failure_in_force([attempt(1.0), killed, attempt(10.0)], NOW, HOUR_S).count == 1


def test_a_clock_that_was_set_back_a_little_hides_no_failure():
    found = in_force(-WRONG_CLOCK_S)
    assert (found.age_s, found.remaining_s) == (0.0, HOUR_S)


def test_a_failure_of_a_wrong_clocks_future_is_none_and_hides_none():
    assert in_force(-WRONG_CLOCK_S - 1) is None
    assert in_force(-1e8, 60.0).build == attempt(60.0)
    wrongly_killed = replace(attempt(-1e8), is_lasting=False)
    assert failure_in_force([wrongly_killed, attempt(60.0)], NOW, HOUR_S).count == 1


@given(st.lists(st.floats(-1e9, 1e9), max_size=20), st.floats(0.0, 10 * LONGEST_S), st.floats(0.0, 1e8), st.booleans())
def test_a_failure_never_counts_longer_than_it_may(ages_s, ttl_s, later_s, is_sorted):
    failures = [attempt(age_s) for age_s in (sorted(ages_s) if is_sorted else ages_s)]
    found = failure_in_force(failures, NOW, ttl_s)
    if found is not None:
        assert 0 < found.remaining_s <= max(LONGEST_S, ttl_s)
        assert found.build in failures
    # Without a further attempt it ends, whatever the clock said then.
    end = NOW + dt.timedelta(seconds=1e9 + 11 * LONGEST_S + later_s)
    assert failure_in_force(failures, end, ttl_s) is None


LASTING = {
    BuildError: "TensorRT or the converter refused this model",
    BuilderCrashError: "TensorRT had this model, and died of itself",
}
PASSING = {
    BuilderKilledError: "ended from outside, or without memory",
    ModelError: "cannot be read: found again as fast as it is remembered",
    ModelChangedError: "the model of the key was not the one that was built",
    ProfileError: "bad input: found again as fast",
    OptionError: "bad input, or another plugin library",
    ConfigError: "settings",
    InvalidInputError: "bad input",
    StoreError: "the disk",
    RegistryError: "the registry",
    SchemaError: "the registry",
    LockTimeoutError: "another builder has the GPU",
    BackendError: "the machine",
    NoDeviceError: "the machine",
    ToolchainError: "the installation; also a builder that died before it had the model",
    TargetError: "the installation: another release can",
    UnsupportedOptionError: "the installation: another release can",
    EngineCacheError: "a bug of enginecache",
    KeyboardInterrupt: "the user",
    MemoryError: "the machine",
    OutOfMemoryError: "the machine",
    ResourceError: "the machine",
    OSError: "the machine",
    ValueError: "the caller's callback",
}


@pytest.mark.parametrize("kind", [*LASTING, *PASSING], ids=lambda kind: kind.__name__)
def test_what_tensorrt_refused_or_crashed_on_is_lasting_and_nothing_else(kind):
    assert is_lasting(kind("why")) is (kind in LASTING)


def test_every_error_that_a_builder_may_report_is_in_the_table():
    assert set(codec._ERRORS.values()) <= LASTING.keys() | PASSING.keys()


def test_a_builder_that_could_not_be_started_is_not_lasting():
    error = BuildError("the builder process cannot be started")
    error.__cause__ = BlockingIOError(11, "Resource temporarily unavailable")
    assert not is_lasting(error)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (90, "90 s"), (150, "2 min"), (7199, "120 min"), (7200, "2 h"), (1e6, "12 days")],
)
def test_durations_are_told_in_the_largest_unit_of_which_there_are_two(seconds, text):
    assert format_duration(seconds) == text


# Only a verdict on the model of the key


def change_and_raise(error: Exception, change):
    """A build in which the model changes and the builder dies or refuses."""

    def act(request) -> None:
        change(request.source.path)
        raise error

    return FakeBuilder(before=act)


def truncate(path: Path) -> None:
    os.truncate(path, 0)


def damage_and_restore(path: Path) -> None:
    """With the old times, as ``cp -p`` sets them: ctime alone tells."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(b"")
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [truncate, damage_and_restore, Path.unlink])
@pytest.mark.parametrize("error", [BuilderCrashError("SIGBUS"), BuildError("refused")], ids=["crash", "refusal"])
def test_a_failure_on_a_changed_model_is_a_changed_model_and_not_remembered(open_cache, model, error, change):
    content = model.read_bytes()
    with pytest.raises(ModelChangedError) as caught:
        open_cache(change_and_raise(error, change)).get(model, dims=DIMS)
    assert caught.value.exit_code == 2
    assert caught.value.__cause__ is error
    cache = open_cache()
    assert cache.builds()[0].is_lasting is False
    model.write_bytes(content)
    assert cache.get(model, dims=DIMS).outcome == "built"


def test_a_crash_on_an_unreadable_model_is_not_remembered(open_cache, model, monkeypatch):
    """As on a disk that fails: the builder's mapping kills it, and no time stamp moves."""

    def fail(source):
        raise ModelError(f"{source.path} cannot be read: Input/output error")

    def act(_request) -> None:
        monkeypatch.setattr(publish, "identify", fail)
        raise BuilderCrashError("SIGBUS")

    with pytest.raises(ModelChangedError):
        open_cache(FakeBuilder(before=act)).get(model, dims=DIMS)


def test_a_crash_with_a_changed_plugin_library_is_not_remembered(open_cache, model, tmp_path):
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"code")
    builder = change_and_raise(BuilderCrashError("SIGSEGV"), lambda _path: library.write_bytes(b"edoc"))
    with pytest.raises(ModelChangedError):
        open_cache(builder).get(model, dims=DIMS, plugins=[library])


# What a caller sees


def refuse(_request) -> None:
    raise BuildError(REASON, "Change the model.")


class Clock:
    """The time that rows are written with and judged by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = dt.timedelta()
        self._read = utc_now
        for module in (failures, publish):
            monkeypatch.setattr(module, "utc_now", self.now)

    def now(self) -> dt.datetime:
        return self._read() + self._ahead

    def stop(self) -> None:
        """Let no time pass from here on, but by :meth:`move`."""
        moment = utc_now()
        self._read = lambda: moment

    def move(self, seconds: float) -> None:
        self._ahead += dt.timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def builder() -> FakeBuilder:
    return FakeBuilder(before=refuse)


@pytest.fixture
def cache(open_cache, builder) -> EngineCache:
    return open_cache(builder)


def refused(cache: EngineCache, model: Path, **ask) -> BuildError:
    with pytest.raises(BuildError) as caught:
        cache.get(model, dims=DIMS, **ask)
    return caught.value


def test_a_refusal_is_told_again_without_a_build(cache, builder, model, open_cache, clock):
    clock.stop()
    assert refused(cache, model).what == REASON
    for asked in (cache, open_cache(builder)):
        error = refused(asked, model)
        remembered = "the last attempt failed 0 s ago, and the build is not repeated for another 60 min"
        assert error.what == f"{REASON} (remembered: {remembered})"
        assert error.fix == "Fix the model or the options, or try again now with --rebuild."
        assert error.log_path == str(cache.log_path(cache.builds()[0]))
        assert error.exit_code == 7
    assert builder.count == len(cache.builds()) == 1
    assert cache.misses()[0].count == 3


def test_a_refusal_is_forgotten_after_its_time_and_longer_after_the_second(cache, builder, model, clock):
    refused(cache, model)
    clock.move(3590)
    refused(cache, model)
    assert builder.count == 1
    clock.move(20)
    assert refused(cache, model).what == REASON
    assert builder.count == 2
    clock.move(7100)
    assert "the last 2 attempts failed, the latest" in refused(cache, model).what
    clock.move(200)
    builder.before = None
    assert cache.get(model, dims=DIMS).outcome == "built"
    assert builder.count == 3


def test_a_success_ends_the_row(cache, builder, model, clock):
    refused(cache, model)
    builder.before = None
    entry = cache.get(model, dims=DIMS, rebuild=True)
    cache.remove(entry.record)
    builder.before = refuse
    assert refused(cache, model).what == REASON
    assert "not repeated for another 60 min" in refused(cache, model).what


def test_the_setting_decides_how_long_and_nothing_at_all(open_cache, builder, model, clock):
    short, off = open_cache(builder, failure_ttl_s=60.0), open_cache(builder, failure_ttl_s=0.0)
    refused(short, model)
    clock.move(30)
    refused(short, model)
    assert builder.count == 1
    refused(off, model)
    assert builder.count == 2


def test_rebuild_tries_at_once_and_its_own_failure_is_remembered(cache, builder, model):
    refused(cache, model)
    assert refused(cache, model, rebuild=True).what == REASON
    assert builder.count == 2
    assert "the last 2 attempts failed, the latest" in refused(cache, model).what
    builder.before = None
    assert cache.get(model, dims=DIMS, rebuild=True).outcome == "built"
    assert cache.get(model, dims=DIMS).outcome == "hit"


def test_rebuild_that_is_interrupted_clears_too(cache, builder, model):
    refused(cache, model)

    def interrupt(_request) -> None:
        raise KeyboardInterrupt

    builder.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        cache.get(model, dims=DIMS, rebuild=True)
    builder.before = None
    assert cache.get(model, dims=DIMS).outcome == "built"


def test_every_change_of_the_key_is_another_question(open_cache, cache, builder, model, tmp_path):
    refused(cache, model)
    builder.before = None
    assert cache.get(model, dims={"batch": (1, 32, 65)}).outcome == "built"
    assert cache.get(model, dims=DIMS, optimization_level=4).outcome == "built"
    assert cache.get(model, dims=DIMS, target="sm_120").outcome == "built"
    assert cache.get(save(linear(seed=9), tmp_path / "other.onnx"), dims=DIMS).outcome == "built"
    upgraded = open_cache(builder, place_with(toolchain=replace(TOOLCHAIN, version="1.7.1.117")))
    assert upgraded.get(model, dims=DIMS).outcome == "built"
    refused(cache, model)


@pytest.mark.parametrize(
    "error", [BuilderKilledError("killed"), StoreError("full"), ProfileError("no profile"), KeyboardInterrupt()]
)
def test_what_is_not_lasting_is_tried_again_at_once(cache, builder, model, error):
    def fail(_request) -> None:
        raise error

    builder.before = fail
    with pytest.raises(type(error)):
        cache.get(model, dims=DIMS)
    builder.before = None
    assert cache.get(model, dims=DIMS).outcome == "built"


def test_a_stored_engine_is_served_although_its_rebuild_failed(cache, builder, model):
    builder.before = None
    entry = cache.get(model, dims=DIMS)
    builder.before = refuse
    refused(cache, model, rebuild=True)
    assert cache.get(model, dims=DIMS).digest == entry.digest


def test_a_compatible_engine_is_served_where_an_exact_one_was_refused(cache, builder, model):
    builder.before = None
    wider = cache.get(model, dims={"batch": (1, 32, 128)})
    builder.before = refuse
    refused(cache, model)
    assert cache.get(model, dims=DIMS, accept="compatible").key == wider.key


def test_offline_stays_not_cached_and_names_the_failure(cache, model, clock):
    clock.stop()
    refused(cache, model)
    with pytest.raises(NotCachedError) as caught:
        cache.get(model, dims=DIMS, offline=True)
    assert caught.value.fix == (
        "Building would not help: the last attempt failed 0 s ago, and the build is not repeated for another 60 min: "
        f"{REASON}\nFix the model or the options, or give --rebuild in place of --offline."
    )


def test_explain_names_the_failure_in_force_and_no_other(cache, builder, model, clock):
    refused(cache, model)
    explained = cache.explain(model, dims=DIMS)
    assert (explained.verdict, [reason.code for reason in explained.reasons]) == ("miss", ["absent", "failed"])
    assert explained.reasons[-1].text.endswith(f"not repeated for another 60 min (--rebuild overrides this): {REASON}")
    clock.move(3700)
    explained = cache.explain(model, dims=DIMS)
    assert [reason.code for reason in explained.reasons] == ["absent"]
    assert explained.failure == REASON
    builder.before = None
    cache.get(model, dims=DIMS)
    assert [reason.code for reason in cache.explain(model, dims=DIMS).reasons] == ["exact"]


def test_a_log_that_is_gone_is_not_named(cache, model):
    refused(cache, model)
    cache.log_path(cache.builds()[0]).unlink()
    error = refused(cache, model)
    assert error.log_path == ""
    assert error.fix.endswith("The log of that attempt has been deleted.")


def test_waiters_of_a_build_that_fails_are_told_its_reason_and_build_nothing(open_cache, model, clock):
    clock.stop()
    begun, go_on = threading.Event(), threading.Event()

    def hang(request) -> None:
        begun.set()
        assert go_on.wait(LIMIT_S)
        refuse(request)

    builder = FakeBuilder(before=hang)
    cache, waits = open_cache(builder), threading.Semaphore(0)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(refused, cache, model)
        assert begun.wait(LIMIT_S)
        waiters = [pool.submit(refused, cache, model, waiting=lambda _: waits.release()) for _ in range(2)]
        waiters += [
            pool.submit(refused, cache, model, waiting=lambda _: waits.release(), rebuild=True) for _ in range(2)
        ]
        assert all(waits.acquire(timeout=LIMIT_S) for _ in waiters)
        go_on.set()
        errors = [waiter.result() for waiter in [first, *waiters]]
    assert builder.count == 1
    assert errors[0].what == REASON
    assert {error.what for error in errors[1:]} == {
        f"{REASON} (remembered: the last attempt failed 0 s ago, and the build is not repeated for another 60 min)"
    }


def test_a_refusal_is_told_while_another_process_rebuilds_for_long(open_cache, cache, model):
    refused(cache, model)
    with cache._storage.locks.hold(cache.explain(model, dims=DIMS).key, None):
        assert "remembered" in refused(cache, model, timeout_s=0.0).what
