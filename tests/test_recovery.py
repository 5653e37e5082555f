"""A registry that is lost or damaged, and what comes back from the records next to the engines."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sqlite3
import threading

import pytest
from fakes import ConstantBuilder, FakeBuilder, fake_cache
from models import linear, save
from records import attempt, entry, hex_of, publish

from enginecache.errors import RegistryError, StoreError
from enginecache.files.canonical import key_digest
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.units import DAY_S
from enginecache.maintenance.inspect import StoredEngines
from enginecache.storage import rebuild as recovery
from enginecache.storage.registry import integrity, schema
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import MissRecord
from enginecache.storage.repair_files import RepairRecords

ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


def no_database(path):
    path.write_bytes(b"not a database, but long enough to be one" * 100)


def empty(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:8192])


def zeros_inside(path):
    content = path.read_bytes()
    path.write_bytes(content[:16384] + bytes(len(content) - 16384))


def without_its_revision(path):
    execute(path, "DROP TABLE alembic_version")


def later_reader(path):
    execute(path, "UPDATE schema_info SET oldest_reader = 5")


def without_a_column(path):
    execute(path, "ALTER TABLE entries RENAME COLUMN device_name TO device_nane")


def without_a_table(path):
    execute(path, "DROP TABLE loads")


def bad_time(path):
    execute(path, "UPDATE entries SET created_at = 'then'")


def bad_text(path):
    execute(path, "UPDATE models SET name = CAST(X'fffe' AS TEXT)")


def bad_state(path):
    execute(path, "UPDATE builds SET state = 'succeedee'")


def later_file_format(path):
    content = bytearray(path.read_bytes())
    content[18] = 9
    path.write_bytes(content)


REFUSED = [no_database, empty, missing, cut, without_its_revision, later_reader]
"""Damage that no cache opens on."""

DAMAGE = [*REFUSED, zeros_inside, without_a_column, without_a_table, bad_time, bad_text, bad_state, later_file_format]


def execute(path, statement):
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def contents(cache):
    return sorted((used.record for used in cache.entries()), key=lambda record: record.key)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_registry_is_kept_and_made_anew_with_all_its_engines(open_cache, model, damage):
    cache = open_cache()
    cache.get(model, **ASK)
    cache.get(model, **WIDER)
    before = contents(cache)
    damage(cache.root.registry_path)
    damaged = None if damage is missing else cache.root.registry_path.read_bytes()

    found = StoredEngines.verify_folder(cache.config)
    assert [finding.kind for finding in found.findings] == ["registry"]
    assert not found.is_clean
    assert "from the records next to the engines" in found.findings[0].repair
    if damage in REFUSED:
        assert damage is missing or cache.root.registry_path.read_bytes() == damaged
        with pytest.raises(RegistryError) as caught:
            open_cache()
        assert caught.value.fix

    repaired = StoredEngines.verify_folder(cache.config, deep=True, repair=True)
    assert repaired.is_clean
    assert "back are 2 entries" in repaired.findings[0].text
    assert contents(open_cache()) == before
    assert cache.get(model, **ASK).outcome == "hit"
    kept = sorted(cache.root.quarantine.iterdir())
    assert len(kept) == (damage is not missing)
    assert repaired.kept.registries == len(kept)
    assert all(str(path) in repaired.findings[0].text for path in kept)
    assert cache.root.registry_path.stat().st_mode & 0o777 == 0o600
    schema.check(Database(cache.root.registry_path))


def test_a_whole_registry_is_left_alone(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    before = cache.root.registry_path.stat().st_ino
    assert cache.verify(repair=True).findings == ()
    assert cache.root.registry_path.stat().st_ino == before


def test_a_new_folder_has_no_registry_and_nothing_is_wrong(tmp_path):
    config = fake_cache(tmp_path / "other").config
    found = StoredEngines.verify_folder(dataclasses.replace(config, dir=tmp_path / "cache"))
    assert (found.findings, found.entries) == ((), 0)


def test_what_a_newer_release_wrote_is_refused_and_not_repaired(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    path = cache.root.registry_path
    execute(path, "UPDATE schema_info SET oldest_reader = 99")
    execute(path, "UPDATE alembic_version SET version_num = '0099'")
    before = path.read_bytes()
    for repair in (False, True):
        with pytest.raises(RegistryError, match="newer enginecache") as caught:
            StoredEngines.verify_folder(cache.config, repair=repair)
        assert caught.value.exit_code == 6
    assert path.read_bytes() == before
    execute(path, f"UPDATE schema_info SET oldest_reader = {schema.READER}")
    execute(path, f"UPDATE alembic_version SET version_num = '{schema.HEAD}'")


def test_a_locked_registry_is_not_called_damaged(open_cache):
    cache = open_cache()
    holder = sqlite3.connect(cache.root.registry_path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RegistryError, match="locked"):
        integrity.find_damage(Database(cache.root.registry_path, busy_timeout_s=0.01), 0o600)
    holder.close()
    assert integrity.find_damage(Database(cache.root.registry_path), 0o600) == ""


def test_an_index_that_leads_to_another_row_is_not_served_and_is_found(open_cache, model):
    """One bit of an index: SQLite does not compare what it finds there with the row."""
    cache = open_cache()
    keys = [cache.get(model, **ask).key for ask in (ASK, WIDER)]
    path = cache.root.registry_path
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute("CREATE TABLE twin (key VARCHAR(64), PRIMARY KEY (key))")
    connection.executemany("INSERT INTO twin VALUES (?)", [(key,) for key in keys[::-1]])
    page = "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = ?"
    (swapped,) = connection.execute(page, ("twin",)).fetchone()
    connection.execute(
        "UPDATE sqlite_master SET rootpage = ? WHERE type = 'index' AND name LIKE 'sqlite_autoindex_entries%'",
        (swapped,),
    )
    connection.commit()
    connection.close()
    with pytest.raises(RegistryError, match=f"the row of {keys[0][:12]} is that of {keys[1][:12]}") as caught:
        cache.get(model, **ASK)
    assert "verify --repair" in caught.value.fix
    with pytest.raises(RegistryError, match="is that of"):
        cache.find(keys[0][:8])
    assert cache.verify(repair=True).findings[0].kind == "registry"
    assert {cache.get(model, **ask).outcome for ask in (ASK, WIDER)} == {"hit"}


def test_pins_come_back_as_far_as_they_can_be_read_and_history_does_not(open_cache, model):
    cache = open_cache()
    cache.pin(cache.get(model, **ASK).record)
    cache.get(model, **WIDER)
    assert isinstance(cache.misses()[0], MissRecord)
    bad_state(cache.root.registry_path)
    text = cache.verify(repair=True).findings[0].text
    assert "back are 2 entries and 1 pins" in text
    assert {used.record.key: used.record.is_pinned for used in cache.entries()} == {
        record.key: record.is_pinned for record in contents(cache)
    }
    assert sum(used.record.is_pinned for used in cache.entries()) == 1
    assert cache.misses() == []
    assert {(build.state, build.host) for build in cache.builds()} == {("succeeded", "")}
    no_database(cache.root.registry_path)
    assert "back are 2 entries and 0 pins" in cache.verify(repair=True).findings[0].text


def test_an_engine_without_a_whole_record_or_not_whole_itself_does_not_come_back(open_cache, model, tmp_path):
    cache = open_cache()
    kept, unrecorded, damaged = (cache.get(model, dims={"batch": (1, 2, high)}) for high in (4, 5, 6))
    RepairRecords(cache.root).path(unrecorded.digest).write_text("{}")
    damaged.path.chmod(0o600)
    damaged.path.write_bytes(b"x" * damaged.record.size_bytes)
    damaged.path.chmod(0o400)
    missing(cache.root.registry_path)
    repaired = StoredEngines.verify_folder(cache.config, repair=True)
    assert "back are 1 entries" in repaired.findings[0].text
    assert "2 stored engines have no whole record" in repaired.findings[0].text
    assert [used.record.key for used in open_cache().entries()] == [kept.key]
    # Not deleted at once: somebody may have a copy of the registry.
    assert {item.path for item in repaired.young_orphans} == {unrecorded.path, damaged.path}
    assert cache.get(model, dims={"batch": (1, 2, 5)}).outcome == "built"
    assert cache.get(model, dims={"batch": (1, 2, 6)}).outcome == "built"


def test_old_engines_without_records_are_young_garbage_after_a_repair(open_cache, model, monkeypatch):
    """A repair must not delete engines without records, which it cannot name."""
    cache = open_cache()
    first = cache.get(model, **ASK)
    other = cache.get(model, **WIDER)
    RepairRecords(cache.root).delete(first.digest)
    bad_state(cache.root.registry_path)
    old = first.path.stat().st_ctime
    monkeypatch.setattr("enginecache.maintenance.orphans.time.time", lambda: old + DAY_S + 0.05)
    repaired = cache.verify(repair=True)
    assert first.path.stat().st_ctime > old
    assert [used.record.key for used in cache.entries()] == [other.key]
    assert repaired.is_clean
    monkeypatch.undo()
    assert first.path.exists() or first.path.stat().st_ctime - old < 0.05


def test_a_shared_blob_brings_back_all_its_entries(open_cache, model):
    cache = open_cache(ConstantBuilder())
    keys = {cache.get(model, **ask).key for ask in (ASK, WIDER)}
    empty(cache.root.registry_path)
    StoredEngines.verify_folder(cache.config, repair=True)
    assert {used.record.key for used in cache.entries()} == keys


def test_the_newest_engine_of_a_key_comes_back(open_cache, model):
    cache = open_cache(ConstantBuilder())
    old = cache.get(model, **ASK)
    record = RepairRecords(cache.root).path(old.digest)
    text = record.read_bytes()
    new = open_cache().get(model, **ASK, rebuild=True)
    assert new.digest != old.digest
    assert not record.exists()
    record.write_bytes(text)  # as if its deletion had been lost in a power failure
    missing(cache.root.registry_path)
    StoredEngines.verify_folder(cache.config, repair=True)
    assert [used.record.digest for used in cache.entries()] == [new.digest]


def test_what_was_deleted_does_not_come_back(open_cache, model):
    cache = open_cache()
    kept = cache.get(model, **ASK)
    cache.remove(cache.get(model, **WIDER).record)
    empty(cache.root.registry_path)
    StoredEngines.verify_folder(cache.config, repair=True)
    assert [used.record.key for used in cache.entries()] == [kept.key]


def test_a_build_that_runs_during_a_repair_is_published_in_the_new_registry(open_cache, model):
    def repair(_):
        cut(cache.root.registry_path)
        assert StoredEngines.verify_folder(cache.config, repair=True).is_clean

    cache = open_cache()
    first = cache.get(model, **ASK)
    cache = open_cache(FakeBuilder(before=repair))
    second = cache.get(model, **WIDER)
    assert {used.record.key for used in cache.entries()} == {first.key, second.key}
    assert [build.state for build in cache.builds(second.key)] == ["succeeded"]


def test_a_writer_that_opened_the_old_file_is_refused_and_loses_nothing_silently(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    path = cache.root.registry_path
    if sqlite3.sqlite_version_info >= (3, 51, 3):
        pytest.skip("probe: this SQLite keeps the registry in a write-ahead log")
    late = sqlite3.connect(path, isolation_level=None)
    late.execute("SELECT 1 FROM pins").fetchall()
    bad_state(path)
    assert cache.verify(repair=True).is_clean
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        late.execute("INSERT INTO pins VALUES ('a', '2026-11-01')")
    late.close()


def test_two_repairs_at_once_do_it_once(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    no_database(cache.root.registry_path)
    start = threading.Barrier(4)
    found = []

    def repair():
        start.wait()
        found.append(StoredEngines.verify_folder(cache.config, repair=True))

    threads = [threading.Thread(target=repair) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verified.is_clean for verified in found] == [True] * 4
    assert len(list(cache.root.quarantine.glob("registry.*"))) == 1
    assert cache.get(model, **ASK).outcome == "hit"


def verify_and_repair(config):
    if not StoredEngines.verify_folder(config, repair=True).is_clean:
        raise SystemExit(1)


def test_processes_that_repair_while_others_get_lose_no_engine(open_cache, tmp_path):
    models = [save(linear(seed=seed), tmp_path / f"{seed}.onnx") for seed in range(12)]
    cache = open_cache()
    for path in models[:4]:
        cache.get(path, **ASK)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=verify_and_repair, args=(cache.config,)) for _ in range(2)]
    cut(cache.root.registry_path)
    for worker in workers:
        worker.start()
    built = []
    for path in models[4:] * 20:
        if not any(worker.is_alive() for worker in workers):
            break
        try:
            built.append(open_cache().get(path, **ASK).key)
        except RegistryError:
            continue  # until it is repaired
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert {used.record.key for used in cache.entries()} >= set(built)
    assert cache.stats().entries == 4 + len(set(built))


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_no_side_file_of_the_old_registry_is_left_next_to_the_new_one(open_cache, model, suffix):
    cache = open_cache()
    cache.get(model, **ASK)
    path = cache.root.registry_path
    side = path.with_name(path.name + suffix)
    no_database(path)
    side.write_bytes(b"old" * 1000)
    assert StoredEngines.verify_folder(cache.config, repair=True).is_clean
    assert not side.exists() or side.stat().st_size == 0
    assert cache.get(model, **ASK).outcome == "hit"


def test_a_file_system_without_hard_links_will_do(open_cache, model, monkeypatch):
    cache = open_cache()
    cache.get(model, **ASK)
    no_database(cache.root.registry_path)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    assert StoredEngines.verify_folder(cache.config, repair=True).is_clean
    assert len(list(cache.root.quarantine.iterdir())) == 1
    assert cache.get(model, **ASK).outcome == "hit"


def test_a_repair_that_cannot_move_files_leaves_the_registry_and_no_leftovers(open_cache, model, monkeypatch):
    cache = open_cache()
    cache.get(model, **ASK)
    path = cache.root.registry_path
    bad_state(path)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "_link_or_move", refuse)
        with pytest.raises(StoreError, match="No space left"):
            cache.verify(repair=True)
    assert path.read_bytes() == before
    assert list(cache.root.tmp.iterdir()) == []
    assert cache.verify(repair=True).is_clean


def test_the_set_aside_registry_is_never_garbage(open_cache, model, monkeypatch):
    cache = open_cache()
    cache.get(model, **ASK)
    bad_state(cache.root.registry_path)
    cache.verify(repair=True)
    (kept,) = cache.root.quarantine.iterdir()
    later = kept.stat().st_ctime + 400 * DAY_S
    with monkeypatch.context() as patch:
        patch.setattr("enginecache.maintenance.orphans.time.time", lambda: later)
        past, _ = cache._orphans()
    assert kept not in [item.path for item in past]


# The registry's part


@pytest.fixture
def registry(tmp_path):
    database = Database(tmp_path / "registry.sqlite")
    schema.ensure_schema(database, 0o600)
    return Registry(database)


def test_entries_are_restored_as_they_were_with_their_pins(registry):
    records = [entry("a"), entry("b", digest=entry("a").digest), entry("c", device_name="H100")]
    registry.restore(records, [records[0].key, hex_of("a key that is missing")])
    pinned = dataclasses.replace(records[0], is_pinned=True)
    assert sorted(registry.entries(), key=lambda record: record.key) == sorted(
        [pinned, *records[1:]], key=lambda record: record.key
    )
    assert registry.find(records[0].key) == pinned
    assert {build.state for build in registry.builds()} == {"succeeded"}


def test_an_entry_is_restored_in_place_of_a_damaged_one(registry):
    record = publish(registry, "a")
    execute(registry._database.path, "UPDATE entries SET tensorrt_version = 'x', backend = 'tensorrt-rty'")
    execute(registry._database.path, "UPDATE blobs SET size_bytes = 5")
    with pytest.raises(RegistryError, match="backend is 'tensorrt-rty'"):
        registry.find(record.key)
    (row,) = registry.examine()
    assert (row.record, row.problem) == (None, "backend is 'tensorrt-rty'")
    registry.restore([record])
    assert registry.find(record.key) == record
    assert registry.builds()[0].host == "here"


def test_rows_that_name_missing_rows_are_examined_too(registry):
    publish(registry, "a")
    publish(registry, "b")
    execute(registry._database.path, f"DELETE FROM blobs WHERE digest = '{entry('a').digest}'")
    execute(registry._database.path, f"DELETE FROM models WHERE digest = '{entry('b').model_digest}'")
    assert registry.entries() == []
    assert {row.problem for row in registry.examine()} == {
        "the row of its blob is missing",
        "the row of its model is missing",
    }
    registry.forget_entry(entry("a").key)
    registry.forget_entry(entry("b").key)
    assert registry.examine() == []


def test_a_forgotten_entry_keeps_its_pin(registry):
    record = publish(registry, "a")
    registry.pin(record.key)
    registry.forget_entry(record.key)
    assert registry.find(record.key) is None
    assert registry.totals().blobs == 0
    assert publish(registry, "a", 2).key == record.key
    assert registry.find(record.key).is_pinned


def test_unfinished_builds_are_listed_and_abandoned_once(registry):
    registry.start_build(attempt("a"))
    registry.start_build(attempt("b", 2))
    publish(registry, "c")
    assert [build.id for build in registry.unfinished_builds()] == [attempt("a").id, attempt("b", 2).id]
    registry.abandon_build(attempt("a").id)
    registry.abandon_build(entry("c").build_id)
    assert [build.id for build in registry.unfinished_builds()] == [attempt("b", 2).id]
    assert {build.state for build in registry.builds()} == {"running", "abandoned", "succeeded"}


def test_a_lasting_failure_counts_until_the_next_attempt(registry):
    for number, is_lasting in ((1, True), (2, True), (3, False)):
        registry.start_build(attempt("a", number))
        registry.fail_build(attempt("a", number).id, 1.0, "refused", is_lasting=is_lasting)
        assert registry.lasting_failures() == int(is_lasting)


def test_a_memo_with_a_changed_character_is_forgotten(registry):
    place = Fingerprint(1, 2, 3, 4, 5)
    registry.remember("model", place, {"identity": {"structure": "3" * 64}, "key_version": 2})
    assert registry.recall("model", place) == {"identity": {"structure": "3" * 64}, "key_version": 2}
    path = registry._database.path
    execute(path, "UPDATE file_memo SET found = replace(found, '33\"', '37\"')")
    assert registry.recall("model", place) is None
    for text in ("", "null", "[]", "{}", '{"blake3": 1}', "{"):
        execute(path, f"UPDATE file_memo SET found = '{text}'")
        assert registry.recall("model", place) is None


def test_a_memo_of_another_file_is_not_taken(registry):
    registry.remember("blob", Fingerprint(1, 2, 3, 4, 5), {"digest": "a"})
    execute(registry._database.path, "UPDATE file_memo SET ctime_ns = 6")
    assert registry.recall("blob", Fingerprint(1, 2, 3, 4, 6)) is None


def test_a_record_of_another_key_is_not_used(open_cache, model):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    records = RepairRecords(cache.root)
    fields = stored.record.to_json()
    for change in (
        {"key": hex_of("other")},
        {"digest": hex_of("other")},
        {"key_json": "{}", "key": key_digest(2, "{}")},
    ):
        records.write(stored.digest, [{**fields, **change}])
        assert records.entries(stored.digest) == "cannot be used: it is not about this engine"
    records.write(stored.digest, [fields])
    assert records.entries(stored.digest) == [stored.record]
