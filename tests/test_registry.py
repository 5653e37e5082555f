from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from records import EPOCH, attempt, entry, fields_of, hex_of, publish, standing
from sqlalchemy.dialects import sqlite
from waiting import LIMIT_S

from enginecache.errors import OptionError, RegistryError
from enginecache.files.canonical import canonical_json
from enginecache.files.fingerprint import Fingerprint
from enginecache.storage.registry import memos, reader, tables
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import AnswerRecord, InflationStep, RegistryTotals, stored_time, time_text
from enginecache.storage.registry.schema import ensure_schema

BIG = Fingerprint(2**64 - 1, 2**64 - 2, 2**40, 1_790_000_000_123_456_789, 1_790_000_000_987_654_321, 2**64 - 3)


def open_registry(folder: Path, host: str | None = None) -> Registry:
    database = Database(folder / "registry.sqlite")
    ensure_schema(database, 0o600)
    return Registry(database, host)


@pytest.fixture
def opener(tmp_path: Path) -> Callable[..., Registry]:
    """Opens one registry, again for each call; can be sent to another process."""
    return functools.partial(open_registry, tmp_path)


@pytest.fixture
def registry(opener: Callable[..., Registry]) -> Registry:
    return opener()


def snapshot(registry: Registry) -> tuple[Any, ...]:
    return registry.entries(), registry.builds(), registry.totals()


# Entries


def test_an_empty_registry_has_nothing(registry):
    assert registry.find("a" * 64) is None
    assert registry.find_prefix("") == registry.entries() == registry.builds() == registry.misses() == []
    assert list(registry.relatives("a" * 64, "b" * 64)) == []
    assert registry.totals() == RegistryTotals(0, 0, 0, 0, 0, 0, 0.0, 0)


def test_a_published_entry_is_found_as_it_was_in_another_connection_too(registry, opener):
    record = publish(registry, "a", device_name="NVIDIA H100", driver_version="580.65.06", size_bytes=2**40)
    assert registry.find(record.key) == opener().find(record.key) == record
    assert record.fields == fields_of("a")


def test_only_exactly_the_key_is_found(registry):
    record = publish(registry, "a")
    assert registry.find(record.key[:-1]) is None
    assert registry.find(record.key.upper()) is None
    assert registry.find(f"{record.key}0") is None


def test_entries_come_newest_first_and_as_many_as_asked(registry):
    records = [publish(registry, name, number) for number, name in enumerate("abc")]
    assert registry.entries() == records[::-1]
    assert registry.entries(2) == records[:0:-1]
    assert registry.entries(0) == []


def test_a_prefix_finds_keys_in_their_order_up_to_the_limit(registry):
    keys = ["0" * 64, "ab" + "0" * 62, "ab" + "f" * 62, "ac" + "0" * 62, "f" * 64]
    for number, key in enumerate(keys):
        registry.start_build(attempt("a", number))
        registry.publish(entry("a", number, key=key))
    assert [record.key for record in registry.find_prefix("ab")] == keys[1:3]
    assert [record.key for record in registry.find_prefix("f")] == keys[4:]
    assert [record.key for record in registry.find_prefix("a", limit=2)] == keys[1:3]
    assert [record.key for record in registry.find_prefix(keys[3])] == [keys[3]]
    assert registry.find_prefix("ab1") == []


@pytest.mark.parametrize("prefix", ["%", "_", "a%", "*", "'", '"', "ü", "\x00"])
def test_no_character_of_a_prefix_is_special(registry, prefix):
    publish(registry, "a")
    assert registry.find_prefix(prefix) == []


def test_relatives_share_the_graph_or_the_weights(registry):
    records = {}
    for number, (name, shared) in enumerate({"same": {}, "graph": {"weights": "1" * 64}, "other": None}.items()):
        fields = fields_of("other") if shared is None else fields_of("a", **shared)
        registry.start_build(attempt(name, number))
        records[name] = entry(name, number, key_json=canonical_json(fields))
        registry.publish(records[name])
    asked = fields_of("a")["model"]
    found = list(registry.relatives(asked["structure"], asked["weights"]))
    assert found == [records["graph"], records["same"]]
    assert [record.key for record in registry.relatives("0" * 64, "1" * 64)] == [records["graph"].key]
    assert list(registry.relatives("0" * 64, "0" * 64)) == []


def test_publishing_again_replaces_the_entry(registry):
    publish(registry, "a", 1)
    second = publish(registry, "a", 2, tensorrt_version="9", build_seconds=9.0)
    assert registry.entries() == [second]
    assert not registry.is_referenced(entry("a", 1).digest)
    assert registry.totals().blobs == 1


def test_publishing_equal_bytes_again_keeps_the_blob(registry):
    digest = publish(registry, "a", 1).digest
    second = publish(registry, "a", 2, digest=digest)
    assert registry.entries() == [second]
    assert registry.is_referenced(digest)


def test_two_entries_share_a_blob_and_it_counts_once(registry):
    first = publish(registry, "a")
    second = publish(registry, "b", digest=first.digest)
    assert (registry.totals().blobs, registry.totals().size_bytes) == (1, 1000)
    registry.remove(first.key)
    assert registry.is_referenced(first.digest)
    assert registry.entries() == [second]
    registry.remove(second.key)
    assert not registry.is_referenced(first.digest)


def test_a_models_first_name_stays(registry):
    publish(registry, "a")
    publish(registry, "b", model_digest=entry("a").model_digest)
    assert registry.find(entry("b").key).model_name == "a.onnx"


def test_publishing_without_its_attempt_writes_nothing(registry):
    publish(registry, "old")
    before = snapshot(registry)
    with pytest.raises(RegistryError):
        registry.publish(entry("a"))
    assert snapshot(registry) == before
    registry.start_build(attempt("a"))
    registry.publish(entry("a"))


def test_a_failing_replacement_keeps_the_old_entry(registry):
    old = publish(registry, "a")
    with pytest.raises(RegistryError):
        registry.publish(entry("a", 2))
    assert registry.find(old.key) == old
    assert registry.is_referenced(old.digest)


# Removal and pins


def test_check_is_kept_with_its_entry_and_is_not_part_of_the_seal(registry, opener):
    record = publish(registry, "a")
    assert registry.record_check(record.key, record.build_id, '{"verdict":"passed"}')
    found = opener().find(record.key)
    assert found == dataclasses.replace(record, check_json='{"verdict":"passed"}')
    assert found.is_as_written


def test_check_of_an_entry_that_was_replaced_meanwhile_marks_nothing(registry):
    first = publish(registry, "a")
    second = publish(registry, "a", 2)
    assert not registry.record_check(first.key, first.build_id, "{}")
    assert registry.find(second.key).check_json is None


def test_replaced_entry_loses_its_check(registry):
    record = publish(registry, "a", check_json="{}")
    assert registry.find(record.key).check_json == "{}"
    assert registry.find(publish(registry, "a", 2).key).check_json is None


def test_removing_returns_whether_the_entry_was_there(registry):
    record = publish(registry, "a")
    assert registry.remove(record.key)
    assert not registry.remove(record.key)
    assert registry.find(record.key) is None
    assert registry.totals().blobs == 0


def test_removing_what_was_replaced_meanwhile_removes_nothing(registry):
    old = publish(registry, "a", 1)
    new = publish(registry, "a", 2)
    assert not registry.remove(old.key, digest=old.digest)
    assert registry.find(old.key) == new
    assert registry.remove(new.key, digest=new.digest)


def test_a_pinned_entry_is_not_removed(registry):
    record = publish(registry, "a")
    registry.pin(record.key)
    assert not registry.remove(record.key)
    assert not registry.remove(record.key, digest=record.digest)
    assert registry.find(record.key) == dataclasses.replace(record, is_pinned=True)
    registry.unpin(record.key)
    assert registry.remove(record.key, digest=record.digest)
    publish(registry, "a", 2)
    assert not registry.find(record.key).is_pinned


def test_another_entrys_pin_protects_only_that_one(registry):
    registry.pin(publish(registry, "a").key)
    assert registry.remove(publish(registry, "b").key)
    assert [record.is_pinned for record in registry.entries()] == [True]


def test_pin_and_unpin_are_idempotent(registry):
    record = publish(registry, "a")
    for pin, expected in ((registry.pin, True), (registry.unpin, False)):
        pin(record.key)
        pin(record.key)
        assert registry.find(record.key).is_pinned is expected
        assert registry.totals().pinned == int(expected)


def test_standings_are_the_entries_with_their_last_use(registry):
    first, second = publish(registry, "a"), publish(registry, "b", size_bytes=7)
    registry.pin(second.key)
    second = registry.find(second.key)
    noted = {first.key: EPOCH + dt.timedelta(days=3), "e" * 64: EPOCH}
    expected = {standing(first, noted[first.key]), standing(second, second.created_at)}
    assert set(registry.standings(noted)) == expected
    assert registry.named() == {first.digest, second.digest}


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("blobs", "size_bytes = 'x'"),
        ("blobs", "size_bytes = -1"),
        ("entries", "build_seconds = 'x'"),
        ("entries", "build_seconds = 9e999"),
        ("entries", "created_at = 'yesterday'"),
        ("entries", "compute_capabilities = '['"),
        ("entries", "created_at = x'00'"),
    ],
)
def test_standings_of_damaged_rows_are_an_error(sqlite_path, table, change):
    registry = Registry(Database(sqlite_path))
    publish(registry, "a")
    with contextlib.closing(sqlite3.connect(sqlite_path)) as connection:
        connection.execute(f"UPDATE {table} SET {change}")
        connection.commit()
    with pytest.raises(RegistryError, match="is damaged") as caught:
        registry.standings({})
    assert "verify --repair" in caught.value.fix


def test_an_entry_without_its_model_is_not_evicted_and_its_blob_is_still_named(sqlite_path):
    registry = Registry(Database(sqlite_path))
    record = publish(registry, "a")
    with contextlib.closing(sqlite3.connect(sqlite_path)) as connection:
        connection.execute("DELETE FROM models")
        connection.commit()
    assert registry.standings({}) == []
    assert registry.named() == {record.digest}


def test_forgetting_a_blob_takes_every_entry_of_it_and_no_other(registry):
    first = publish(registry, "a")
    second = publish(registry, "b", digest=first.digest)
    third = publish(registry, "c")
    assert registry.forget_blob(first.digest, "bit rot") == sorted([first.key, second.key])
    assert registry.entries() == [third]
    assert not registry.is_referenced(first.digest)
    assert registry.forget_blob(first.digest, "again") == []
    assert registry.forget_blob("0" * 64, "unknown") == []


def test_what_was_damaged_is_known_by_its_key_until_it_is_published_again(registry):
    first = publish(registry, "a")
    second = publish(registry, "b", digest=first.digest)
    assert registry.set_asides() == []
    registry.forget_blob(first.digest, "bit rot")
    lost = registry.set_aside(first.key)
    assert (lost.key, lost.digest, lost.model_name, lost.reason) == (first.key, first.digest, "a.onnx", "bit rot")
    assert {one.key for one in registry.set_asides()} == {first.key, second.key}
    publish(registry, "a", 2)
    assert registry.set_aside(first.key) is None
    assert [one.key for one in registry.set_asides()] == [second.key]


def test_siblings_are_the_attempts_that_made_the_entries_of_a_model(registry):
    first = publish(registry, "a")
    second = publish(registry, "b", model_digest=first.model_digest)
    publish(registry, "c")
    found = registry.siblings(first.model_digest)
    by_key = sorted([first, second], key=lambda record: record.key)
    assert found == ",".join(record.build_id for record in by_key)
    publish(registry, "a", 2, model_digest=first.model_digest)
    assert registry.siblings(first.model_digest) != found
    assert registry.siblings("0" * 64) == ""


def test_a_pin_outlives_a_forgotten_blob_and_holds_for_the_engine_rebuilt(registry):
    record = publish(registry, "a")
    registry.pin(record.key)
    registry.forget_blob(record.digest, "bit rot")
    assert registry.totals().pinned == 0
    publish(registry, "a", 2, digest=record.digest)
    assert registry.find(record.key).is_pinned


# Attempts


def test_an_attempt_runs_then_succeeds_with_its_entry(registry):
    registry.start_build(attempt("a"))
    assert registry.builds() == [attempt("a")]
    registry.publish(entry("a"))
    assert registry.builds() == [attempt("a", state="succeeded", build_seconds=2.5)]


def test_a_new_attempt_abandons_the_running_ones_of_its_key_only(registry):
    registry.start_build(attempt("a", 1))
    registry.start_build(attempt("b", 1))
    registry.start_build(attempt("a", 2))
    assert [build.state for build in registry.builds(attempt("a").key)] == ["running", "abandoned"]
    assert [build.state for build in registry.builds(attempt("b").key)] == ["running"]
    assert "its process ended" in registry.builds(attempt("a").key)[1].reason


def test_a_new_attempt_leaves_finished_ones_as_they_are(registry):
    publish(registry, "a", 1)
    registry.start_build(attempt("a", 2))
    registry.fail_build(attempt("a", 2).id, 1.5, "refused")
    before = registry.builds()
    registry.start_build(attempt("a", 3))
    assert registry.builds()[1:] == before


def test_a_failed_attempt_keeps_its_reason(registry):
    registry.start_build(attempt("a"))
    registry.fail_build(attempt("a").id, 1.5, "TensorRT said: ünsupported\n'; DROP TABLE builds; --")
    (build,) = registry.builds()
    assert (build.state, build.build_seconds) == ("failed", 1.5)
    assert build.reason == "TensorRT said: ünsupported\n'; DROP TABLE builds; --"


def test_an_attempt_that_succeeded_cannot_fail_afterwards(registry):
    publish(registry, "a")
    registry.fail_build(attempt("a").id, 1.5, "interrupted after the commit")
    assert [build.state for build in registry.builds()] == ["succeeded"]


def test_attempts_come_newest_first_and_as_many_as_asked(registry):
    for number in range(5):
        registry.start_build(attempt("a", number))
    assert [build.id for build in registry.builds(limit=2)] == [attempt("a", 4).id, attempt("a", 3).id]


def test_a_failure_keeps_whether_it_would_come_again(registry):
    for number, lasting in enumerate((True, False)):
        registry.start_build(attempt("a", number))
        registry.fail_build(attempt("a", number).id, 1.5, "refused", is_lasting=lasting)
    registry.start_build(attempt("a", 2))
    registry.fail_build(attempt("a", 2).id, 1.5, "refused")
    publish(registry, "a", 3)
    assert [build.is_lasting for build in registry.builds()] == [None, False, False, True]


def test_attempts_since_success_are_those_of_the_key_newest_first(registry):
    def fail(name: str, number: int) -> None:
        registry.start_build(attempt(name, number))
        registry.fail_build(attempt(name, number).id, 1.0, f"refused {number}")

    key = attempt("a").key
    assert registry.attempts_since_success(key) == []
    fail("a", 1)
    fail("b", 2)
    assert [build.reason for build in registry.attempts_since_success(key)] == ["refused 1"]
    publish(registry, "a", 3)
    publish(registry, "b", 4)
    assert registry.attempts_since_success(key) == []
    fail("a", 5)
    registry.start_build(attempt("a", 6))  # abandoned by the next
    fail("a", 7)
    registry.start_build(attempt("a", 8))
    recent = registry.attempts_since_success(key)
    assert [build.state for build in recent] == ["running", "failed", "abandoned", "failed"]
    assert [build.reason for build in recent if build.state == "failed"] == ["refused 7", "refused 5"]


# Inflation and size


def step(minutes: float, value: float) -> InflationStep:
    return InflationStep(EPOCH + dt.timedelta(minutes=minutes), value)


def test_inflation_comes_back_as_it_was_oldest_first(registry, opener):
    assert registry.inflation() == []
    for number in (1, 2, 3):
        registry.record_inflation(step(number, 100.5 * number), EPOCH)
    assert registry.inflation() == opener().inflation() == [step(1, 100.5), step(2, 201.0), step(3, 301.5)]


def test_inflation_never_falls(registry):
    registry.record_inflation(step(1, 7.0), EPOCH)
    registry.record_inflation(step(2, 3.0), EPOCH)
    assert registry.inflation() == [step(1, 7.0), step(2, 7.0)]
    registry.record_inflation(step(2, 9.0), EPOCH)
    assert registry.inflation() == [step(1, 7.0), step(2, 9.0)]


@pytest.mark.parametrize(("oldest", "kept"), [(0, [1, 2, 3, 4]), (2, [2, 3, 4]), (2.5, [2, 3, 4]), (99, [3, 4])])
def test_steps_that_ended_before_the_oldest_use_are_forgotten(registry, oldest, kept):
    for number in (1, 2, 3):
        registry.record_inflation(step(number, float(number)), EPOCH)
    registry.record_inflation(step(4, 4.0), step(oldest, 0.0).at)
    assert registry.inflation() == [step(number, float(number)) for number in kept]


def test_steps_of_a_clock_that_was_ahead_move_to_the_next_step(registry):
    registry.record_inflation(step(1, 1.0), EPOCH)
    registry.record_inflation(step(10**6, 5.0), EPOCH)
    registry.record_inflation(step(2, 3.0), EPOCH)
    assert registry.inflation() == [step(1, 1.0), step(2, 5.0)]


def test_stored_bytes_count_each_blob_that_an_entry_names_once(registry):
    assert registry.stored_bytes() == 0
    first = publish(registry, "a", size_bytes=2**40)
    publish(registry, "b", digest=first.digest, size_bytes=2**40)
    publish(registry, "c", size_bytes=500)
    assert registry.stored_bytes() == registry.totals().size_bytes == 2**40 + 500
    registry.forget_blob(first.digest, "bit rot")
    assert registry.stored_bytes() == 500


# Misses


def test_misses_of_a_key_are_counted_and_the_last_reason_is_kept(registry):
    key, other = hex_of("key"), hex_of("other")
    registry.record_miss(key, "absent", None, [])
    registry.record_miss(other, "absent", None, [])
    registry.record_miss(key, "differs", other, ["options.fp16", "profiles[0].x"])
    first, second = registry.misses()
    assert (first.key, first.reason, first.nearest_key, first.count) == (key, "differs", other, 2)
    assert first.differing == ("options.fp16", "profiles[0].x")
    assert (second.key, second.count) == (other, 1)
    assert first.last_at >= second.last_at
    assert registry.misses(limit=1) == [first]
    assert (first.model_name, first.nearest_model) == (None, None)  # no engine of these keys is stored
    assert registry.totals().misses == 3


def test_times_come_back_aware_and_to_the_microsecond(registry):
    east = dt.timezone(dt.timedelta(hours=9))
    publish(registry, "a", created_at=EPOCH.astimezone(east))
    (record,) = registry.entries()
    assert record.created_at == EPOCH
    assert record.created_at.tzinfo is dt.timezone.utc
    assert registry.builds()[0].started_at.tzinfo is dt.timezone.utc


def test_totals_count_what_is_there(registry):
    registry.pin(publish(registry, "a", 1).key)
    publish(registry, "b", 1, size_bytes=500)
    registry.start_build(attempt("c"))
    registry.fail_build(attempt("c").id, 100.0, "refused")
    registry.forget_blob(entry("b").digest, "bit rot")
    registry.record_miss("0" * 64, "absent", None, [])
    assert registry.totals() == RegistryTotals(1, 1, 1000, 1, 2, 1, 5.0, 1)


def test_a_success_ends_the_failures_before_it_whatever_the_clock(registry):
    """The failure is dated after it, by a clock that was ahead."""
    registry.start_build(attempt("a", 9))
    registry.fail_build(attempt("a", 9).id, 1.0, "refused", is_lasting=True)
    publish(registry, "a", 1)
    assert registry.attempts_since_success(entry("a").key) == []
    assert registry.lasting_failures() == 0
    registry.start_build(attempt("a", 0))  # by one that is behind
    registry.fail_build(attempt("a", 0).id, 1.0, "refused", is_lasting=True)
    assert [build.id for build in registry.attempts_since_success(entry("a").key)] == [attempt("a", 0).id]
    assert registry.lasting_failures() == 1


# Memo


def test_the_memo_gives_back_what_was_found(registry, opener):
    found = {"digest": "ü", "nested": [1, None, {"dims": [2**31, "batch", None]}]}
    registry.remember("model", BIG, found)
    assert registry.recall("model", BIG) == opener().recall("model", BIG) == found


@pytest.mark.parametrize("field", Fingerprint._fields)
def test_the_memo_knows_only_exactly_the_fingerprint(registry, field):
    registry.remember("blob", BIG, {"digest": "x"})
    assert registry.recall("blob", BIG._replace(**{field: getattr(BIG, field) - 1})) is None
    assert registry.recall("model", BIG) is None


def test_two_mounts_of_one_file_do_not_displace_each_other(registry):
    other = BIG._replace(mount=BIG.mount - 1)
    registry.remember("blob", BIG, {"digest": "x"})
    registry.remember("blob", other, {"digest": "y"})
    assert registry.recall("blob", BIG) == {"digest": "x"}
    assert registry.recall("blob", other) == {"digest": "y"}


def test_without_a_boot_nothing_is_remembered(opener):
    opener("").remember("blob", BIG, {"digest": "x"})
    assert opener("").recall("blob", BIG) is None


def test_what_was_found_in_other_boots_is_pruned(opener, monkeypatch):
    monkeypatch.setattr(memos, "MAX_OF_OTHER_BOOTS", 3)
    files = [BIG._replace(inode=number) for number in range(5)]
    for file in files:
        opener("before").remember("blob", file, {"digest": "x"})
    opener("now").remember("blob", BIG, {"digest": "x"})
    known = [opener("before").recall("blob", file) is not None for file in files]
    assert known == [False, False, False, True, True]
    assert opener("now").recall("blob", BIG) == {"digest": "x"}


def test_the_oldest_of_too_many_memos_are_pruned_whatever_the_clock_says(opener, monkeypatch):
    monkeypatch.setattr(memos, "MAX_MEMOS", 3)
    files = [BIG._replace(inode=number) for number in range(5)]
    for file in files:
        opener().remember("blob", file, {"digest": "x"})
    opener().remember("blob", files[2], {"digest": "again"})
    assert [opener().recall("blob", file) is not None for file in files] == [False, False, True, True, True]


def test_the_memo_keeps_one_thing_a_file_and_kind(registry):
    registry.remember("blob", BIG, {"digest": "old"})
    newer = BIG._replace(ctime_ns=BIG.ctime_ns + 1)
    registry.remember("blob", newer, {"digest": "new"})
    registry.remember("model", BIG, {"model": 1})
    assert registry.recall("blob", BIG) is None
    assert registry.recall("blob", newer) == {"digest": "new"}
    assert registry.recall("model", BIG) == {"model": 1}


def test_what_was_found_in_another_boot_is_not_believed(opener):
    opener("here").remember("blob", BIG, {"digest": "x"})
    assert opener("there").recall("blob", BIG) is None
    assert opener("here").recall("blob", BIG) == {"digest": "x"}


@pytest.mark.parametrize("field", ["mtime_ns", "ctime_ns"])
@pytest.mark.parametrize("time_ns", [-(10**18), 2**63 - 1, 2**63, 2**63 + 10**18])
def test_a_file_of_any_date_is_in_the_memo(registry, field, time_ns):
    dated = BIG._replace(**{field: time_ns})
    registry.remember("blob", dated, {"digest": "x"})
    assert registry.recall("blob", dated) == {"digest": "x"}
    assert registry.recall("blob", dated._replace(**{field: time_ns + 1})) is None
    assert registry.recall("blob", BIG) is None


# Together


def count_misses(registry: Registry, times: int) -> None:
    for _ in range(times):
        registry.record_miss("0" * 64, "absent", None, [])


def replace_entries(registry: Registry, worker: int, times: int) -> None:
    for number in range(times):
        publish(registry, "a", worker * 1000 + number)


def run_together(*calls: Callable[[], object]) -> None:
    failures = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def work_as_a_process(opener: Callable[..., Registry], worker: int) -> None:
    registry = opener()
    count_misses(registry, 5)
    replace_entries(registry, worker, 2)


def test_eight_threads_lose_nothing(registry):
    run_together(*[functools.partial(count_misses, registry, 5)] * 8)
    assert registry.totals().misses == 40


def test_eight_threads_that_replace_one_entry_leave_one_blob(registry):
    run_together(*(functools.partial(replace_entries, registry, worker, 2) for worker in range(8)))
    assert len(registry.builds(limit=1000)) == 16
    assert (registry.totals().entries, registry.totals().blobs) == (1, 1)


def test_four_processes_lose_nothing(opener):
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work_as_a_process, args=(opener, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    totals = opener().totals()
    assert totals.misses == 20
    assert (totals.entries, totals.blobs) == (1, 1)


def test_a_registry_works_on_both_sides_of_a_fork(registry):
    publish(registry, "a")
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=count_misses, args=(registry, 10)) for _ in range(2)]
    for child in children:
        child.start()
    count_misses(registry, 10)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert registry.totals().misses == 30


# Connections


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection that is opened from now on."""
    connections = []
    connect = sqlite3.connect

    def counting(*args: Any, **options: Any) -> sqlite3.Connection:
        connections.append(connect(*args, **options))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", counting)
    return connections


def is_open(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return False
    return True


def test_one_connection_serves_all_transactions_of_a_block_and_is_closed_after_it(registry, opened):
    with registry.connected(), registry.connected():
        record = publish(registry, "a")
        assert registry.find(record.key) == registry.entries()[0] == record
        registry.remember("blob", BIG, {"digest": "x"})
        assert registry.recall("blob", BIG) == {"digest": "x"}
        assert len(opened) == 1
        assert is_open(opened[0])
    assert not is_open(opened[0])


def test_a_snapshot_within_a_block_ends_before_the_next_transaction(registry):
    record = publish(registry, "a")
    with registry.connected():
        assert [found.key for found in registry.standings({})] == [record.key]
        registry.pin(record.key)
        assert [found.is_pinned for found in registry.standings({})] == [True]


def test_without_a_block_each_transaction_closes_its_connection(registry, opened):
    publish(registry, "a")
    registry.find("0" * 64)
    assert len(opened) > 1
    assert not any(map(is_open, opened))


def test_a_block_that_needs_no_transaction_opens_nothing(registry, opened):
    with registry.connected():
        assert opened == []


def fail_after_a_write(registry: Registry) -> None:
    registry.pin("0" * 64)
    raise OptionError("what", "fix")


def test_reading_within_a_transaction_of_a_block_does_not_end_it(registry):
    record = publish(registry, "a")
    with registry.connected():
        with registry._database.writing() as connection:
            connection.exec_driver_sql("UPDATE entries SET check_json = 'x'")
            assert registry.find(record.key) == record
        assert registry.find(record.key).check_json == "x"


def test_an_exception_closes_the_connection_of_a_block(registry, opened):
    with pytest.raises(OptionError), registry.connected():
        fail_after_a_write(registry)
    assert [is_open(connection) for connection in opened] == [False]


def test_each_thread_has_a_connection_of_its_own(registry, opened):
    start = threading.Barrier(4)

    def work() -> None:
        with registry.connected():
            start.wait()
            count_misses(registry, 3)
            registry.totals()

    run_together(*[work] * 4)
    assert len(opened) == 4
    assert registry.totals().misses == 12


def test_a_block_goes_on_in_the_file_that_a_repair_put_in_its_place(registry, sqlite_path, tmp_path):
    with registry.connected():
        old = publish(registry, "a")
        (tmp_path / "new").mkdir()
        new = publish(open_registry(tmp_path / "new"), "b")
        sqlite_path.rename(tmp_path / "kept.sqlite")
        (tmp_path / "new/registry.sqlite").rename(sqlite_path)
        assert registry.entries() == [new]
        assert registry.find(old.key) is None
        registry.pin(new.key)
    assert registry.find(new.key).is_pinned


def work_after_a_fork(registry: Registry, opened: list[Any]) -> None:
    before = len(opened)
    with registry.connected():
        count_misses(registry, 5)
    assert len(opened) == before + 1
    count_misses(registry, 5)


def test_a_child_that_is_forked_within_a_block_opens_a_connection_of_its_own(registry, opened):
    fork = multiprocessing.get_context("fork")
    with registry.connected():
        count_misses(registry, 5)
        child = fork.Process(target=work_after_a_fork, args=(registry, opened))
        child.start()
        count_misses(registry, 5)
        child.join()
        count_misses(registry, 5)
        assert child.exitcode == 0
        assert registry.totals().misses == 25
    assert not is_open(opened[0])


def test_what_does_not_wait_leaves_the_usual_time_out_to_the_rest_of_its_block(registry, opened):
    with registry.connected():
        registry.remember("blob", BIG, {"digest": "x"})
        assert opened[0].execute("PRAGMA busy_timeout").fetchone() == (60_000,)


# SQLite


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    open_registry(tmp_path)
    return tmp_path / "registry.sqlite"


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_remember_neither_waits_nor_fails_while_another_writes(sqlite_path, kind):
    registry = Registry(Database(sqlite_path, busy_timeout_s=10 * LIMIT_S))
    registry.remember("blob", BIG, {"digest": "old"})
    other = sqlite3.connect(sqlite_path, isolation_level=None)
    other.execute(f"BEGIN {kind}")
    started = time.monotonic()
    registry.remember("blob", BIG, {"digest": "new"})
    assert time.monotonic() - started < LIMIT_S  # it waits ten times as long, or not at all
    other.close()
    assert registry.recall("blob", BIG) == {"digest": "old"}


def test_reading_does_not_wait_for_a_writer_that_has_not_committed(sqlite_path):
    registry = Registry(Database(sqlite_path, busy_timeout_s=0.0))
    record = publish(registry, "a")
    other = sqlite3.connect(sqlite_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert registry.find(record.key) == record
    other.close()


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_writing_waits_for_another_writer(sqlite_path, kind):
    registry = Registry(Database(sqlite_path, busy_timeout_s=LIMIT_S))
    other = sqlite3.connect(sqlite_path, isolation_level=None, check_same_thread=False)
    other.execute(f"BEGIN {kind}")
    is_given_up = threading.Event()

    def give_up() -> None:
        is_given_up.set()
        other.execute("ROLLBACK")

    threading.Timer(0.3, give_up).start()
    registry.pin("0" * 64)
    assert is_given_up.is_set()
    other.close()


def test_a_registry_that_stays_busy_says_that_another_holds_it(sqlite_path):
    registry = Registry(Database(sqlite_path, busy_timeout_s=0.1))
    other = sqlite3.connect(sqlite_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RegistryError, match="locked") as caught:
        registry.pin("0" * 64)
    assert "try again" in caught.value.fix
    other.close()


def test_a_failing_transaction_leaves_no_lock_behind(sqlite_path):
    database = Database(sqlite_path, busy_timeout_s=0.0)

    def fail() -> None:
        with database.writing() as connection:
            connection.exec_driver_sql("DELETE FROM schema_info")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    Registry(database).pin("0" * 64)
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM schema_info").scalar() == 1


def no_database(path: Path) -> None:
    path.write_bytes(b"this is no database, and longer than a header of one hundred bytes" * 10)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_tables(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [no_database, cut_short, folder, no_tables])
def test_a_registry_that_is_none_is_an_error_with_the_way_out(sqlite_path, spoil):
    registry = Registry(Database(sqlite_path))
    registry.totals()  # as a running server, that has had it
    spoil(sqlite_path)
    for call in (registry.entries, registry.totals, lambda: registry.pin("0" * 64)):
        with pytest.raises(RegistryError, match="is unavailable") as caught:
            call()
        assert str(sqlite_path) in caught.value.what
        assert "enginecache verify" in caught.value.fix
        assert caught.value.exit_code == 6
    registry.remember("blob", BIG, {"digest": "x"})


def test_an_entry_is_current_by_its_key_its_attempt_and_its_check(registry):
    record = publish(registry, "a")
    assert registry.has_entry(record.key)
    assert not registry.has_entry(attempt("b").key)
    assert registry.is_current(record)
    assert not registry.is_current(dataclasses.replace(record, build_id=attempt("a", 2).id))
    assert not registry.is_current(dataclasses.replace(record, key=attempt("b").key))
    registry.record_check(record.key, record.build_id, "{}")
    assert not registry.is_current(record)
    assert registry.is_current(dataclasses.replace(record, check_json="{}"))


def test_answer_that_was_given_before_a_check_is_not_remembered_after_it(registry):
    record = publish(registry, "a")
    answer = AnswerRecord("a" * 64, record.key, record.build_id, b"", b"", b"", "f" * 64)

    def count() -> int:
        with registry._database.looking() as connection:
            return connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    registry.record_check(record.key, record.build_id, "{}")
    registry.remember_answer(answer, record.check_json)
    assert count() == 0
    registry.remember_answer(answer, "{}")
    assert count() == 1
    registry.restore([record])  # as an import after a prune
    assert count() == 0


def test_answers_go_with_their_entries_and_the_newest_are_kept(registry, monkeypatch):
    record, gone = publish(registry, "a"), publish(registry, "b")

    def answers() -> list[str]:
        with registry._database.looking() as connection:
            return [row[0][0] for row in connection.execute("SELECT command FROM answers ORDER BY at")]

    def remember(letter: str, entry) -> None:
        registry.remember_answer(AnswerRecord(letter * 64, entry.key, entry.build_id, b"", b"", b"", "f" * 64))

    for letter in "ab":
        remember(letter, record)
    remember("c", gone)
    assert answers() == ["a", "b", "c"]
    registry.remove(gone.key)
    remember("a", record)
    assert answers() == ["b", "a"]
    monkeypatch.setattr(memos, "MAX_ANSWERS", 2)
    remember("d", record)
    assert answers() == ["a", "d"]


def test_the_queries_of_a_hit_name_the_columns_and_times_of_the_tables():
    """They go through the driver alone, and would not notice a change of the tables."""
    assert tuple(column.name for column in tables.entries.c) == reader.COLUMNS
    assert {column.name for column in tables.file_memo.primary_key} == {*memos._PLACE}
    assert [column.name for column in tables.answers.primary_key] == ["command"]
    bind = sa.DateTime().dialect_impl(sqlite.dialect()).bind_processor(sqlite.dialect())
    for time_ in (EPOCH, EPOCH.replace(microsecond=1), EPOCH.astimezone(dt.timezone(dt.timedelta(hours=2)))):
        assert time_text(time_) == bind(tables.UtcDateTime().process_bind_param(time_, None))
        assert stored_time(time_text(time_)) == time_


def test_a_reader_and_the_registry_see_the_same_rows(tmp_path):
    database = Database(tmp_path / "registry.sqlite")
    ensure_schema(database, 0o600)
    registry, light = Registry(database), reader.RegistryReader(database)
    stored = publish(registry, "a")
    assert light.find(stored.key) == registry.find(stored.key) == stored
    answer = AnswerRecord("a" * 64, stored.key, stored.build_id, b"\0w", b"s", b"p", "f" * 64, None)
    light.remember_answer(answer)
    (row,) = sqlite3.connect(database.path).execute("SELECT command, watched, siblings, at FROM answers")
    assert row[:3] == ("a" * 64, b"\0w", None)
    assert stored_time(row[3]).tzinfo is not None
