from __future__ import annotations

import datetime as dt
import os
import sqlite3

import pytest
from fakes import ConstantBuilder, FakeBuilder, fake_cache
from models import linear, save
from mounts import bound, mounted_over
from records import entry as entry_of

from enginecache.errors import BuildError, NotCachedError, RegistryError, StoreError
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.units import utc_now
from enginecache.storage.registry.rows import BuildRecord
from enginecache.storage.repair_files import RepairRecords

ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


def rewrite(path, data):
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def flip_a_bit(path):
    rewrite(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def cut_short(path):
    rewrite(path, path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def make_a_folder(path):
    path.unlink()
    path.mkdir()


def open_to_writing(path):
    path.chmod(0o644)


DAMAGE = {remove: "dangling", make_a_folder: "dangling", cut_short: "size", flip_a_bit: "digest"}


def test_an_empty_cache_is_clean(open_cache):
    found = open_cache().verify(deep=True)
    assert (found.entries, found.findings, found.young_orphans, found.is_clean) == (0, (), (), True)


def test_whole_entries_are_clean(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    cache.get(model, **WIDER)
    found = cache.verify(deep=True)
    assert (found.entries, found.findings) == (2, ())


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_left_then_repaired_then_clean(open_cache, model, damage):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    damage(entry.path)
    for _ in range(2):
        found = cache.verify(deep=True)
        (finding,) = found.findings
        assert (finding.kind, finding.subject, finding.is_repaired) == (DAMAGE[damage], entry.key, False)
        assert entry.digest[:12] in finding.text
        assert not found.is_clean
    repaired = cache.verify(deep=True, repair=True)
    assert repaired.is_clean
    assert [finding.is_repaired for finding in repaired.findings] == [True]
    assert cache.verify(deep=True).findings == ()
    assert len(list(cache.root.quarantine.iterdir())) == (damage is not remove)
    assert cache.get(model, **ASK).outcome == "built"


def test_engines_that_a_mount_hides_are_not_forgotten(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    with mounted_over(cache.root.engines):
        for repair in (False, True):
            (finding,) = cache.verify(repair=repair).findings
            assert (finding.kind, finding.subject, finding.is_repaired) == ("dangling", entry.key, False)
            assert str(cache.root.engines) in finding.text
            assert "unmount" in finding.repair
        with pytest.raises(StoreError, match="may be hidden") as caught:
            cache.get(model, **ASK)
        assert f"enginecache rm {entry.key[:12]}" in caught.value.fix
    assert cache.verify().is_clean
    assert cache.get(model, **ASK).outcome == "hit"


def test_the_entry_of_an_engine_that_a_mount_hides_can_be_removed(open_cache, model):
    cache = open_cache(grace_s=0.0)
    entry = cache.get(model, **ASK)
    with mounted_over(cache.root.engines):
        cache.remove(entry.key)
        assert cache.verify(repair=True).is_clean
    cache.verify(repair=True)  # its blob is back, without a row


def test_a_mount_that_has_the_engines_is_no_finding(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    with bound(cache.root.engines):
        assert cache.verify().is_clean
        assert cache.get(model, **ASK).outcome == "hit"


def test_a_shared_blob_is_repaired_once_for_all_its_entries(open_cache, model):
    cache = open_cache(ConstantBuilder())
    flip_a_bit(cache.get(model, **ASK).path)
    other = cache.get(model, **WIDER)  # heals it
    flip_a_bit(other.path)
    assert [finding.kind for finding in cache.verify(deep=True).findings] == ["digest", "digest"]
    assert len(cache.verify(deep=True, repair=True).findings) == 1
    assert cache.entries() == []


def test_a_wrong_mode_is_found_and_set_right(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    entry.path.chmod(0o644)
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.subject) == ("mode", entry.key)
    assert "0644, not 0400" in finding.text
    assert cache.verify(repair=True).is_clean
    assert entry.path.stat().st_mode & 0o777 == 0o400
    assert cache.get(model, **ASK).outcome == "hit"


def test_an_orphan_within_its_grace_time_is_reported_and_is_not_a_finding(tmp_path, model):
    """Without ``open_cache``: young garbage is left, on purpose."""
    cache = fake_cache(tmp_path / "cache")
    entry = cache.get(model, **ASK)
    cache._registry.remove(entry.key)
    found = cache.verify(repair=True)
    assert (found.findings, found.is_clean) == ((), True)
    assert [item.path for item in found.young_orphans] == [entry.path]
    assert entry.path.exists()


def test_an_orphan_past_its_grace_time_is_deleted_by_a_repair(open_cache, model):
    cache = open_cache(grace_s=0.0)
    entry = cache.get(model, **ASK)
    cache._registry.remove(entry.key)
    assert [finding.kind for finding in cache.verify().findings] == ["orphan"]
    assert entry.path.exists()
    assert cache.verify(repair=True).is_clean
    assert not entry.path.exists()


def test_an_orphan_that_got_a_row_since_the_list_was_made_stays(open_cache, model):
    cache = open_cache(grace_s=0.0)
    entry = cache.get(model, **ASK)
    cache._registry.remove(entry.key)
    (item,) = cache._orphans()[0]
    cache.get(model, **ASK)
    assert not cache._removal.delete_orphan(item)
    assert entry.path.exists()


@pytest.mark.parametrize("deep", [False, True])
def test_an_entry_removed_while_it_is_checked_is_no_finding(open_cache, model, deep):
    cache, other = open_cache(), open_cache()
    record = cache.get(model, **ASK).record
    check_blob = cache._storage.check

    def check_then_remove(*args, **kwargs):
        state = check_blob(*args, **kwargs)
        other.remove(record)
        return state

    def remove_then_check(*args, **kwargs):
        other.remove(record)
        return check_blob(*args, **kwargs)

    for check in (check_then_remove, remove_then_check):
        cache._storage.check = check
        assert cache.verify(deep=deep).findings == ()
        cache._storage.check = check_blob
        record = cache.get(model, **ASK).record


def test_only_a_deep_check_reads_what_was_verified_before(open_cache, model, monkeypatch):
    monkeypatch.setattr("enginecache.files.fingerprint.SETTLE_NS", 0)
    cache = open_cache()
    cache.get(model, **ASK)
    cache.verify()
    reads = []
    read = cache._storage.blobs.read
    cache._storage.blobs.read = lambda digest: (reads.append(digest), read(digest))[1]
    cache.verify()
    assert reads == []
    cache.verify(deep=True)
    assert len(reads) == 1


def test_the_record_has_plain_values(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    entry.path.chmod(0o600)
    found = cache.verify(repair=True).to_json()
    assert found["kept"] == {"quarantined": 0, "set_asides": [], "registries": 0, "failures": 0, "unfinished_builds": 0}
    assert (found["schema"], found["entries"], found["clean"], found["garbage_in_grace"]) == (1, 1, True, [])
    assert found["findings"][0]["kind"] == "mode"
    assert found["findings"][0]["repaired"] is True


# Rows


def execute(cache, statement, *values):
    connection = sqlite3.connect(cache.root.registry_path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def kinds(found):
    return [finding.kind for finding in found.findings]


ROW_DAMAGE = {
    "key_json": "{}",
    "key_version": 9,
    "digest": "0" * 64,
    "model_digest": "0" * 64,
    "backend": "tensorrt-rty",
    "tensorrt_version": "1.7.1.117",
    "compute_capabilities": '["9.8"]',
    "device_name": "H900",
    "driver_version": "580",
    "build_id": "0" * 32,
    "build_seconds": 99.0,
    "created_at": "2026-11-01 00:00:00.000000",
    "timing_cache_digest": "7" * 64,
}


@pytest.mark.parametrize("column", ROW_DAMAGE)
def test_a_damaged_row_is_found_and_taken_from_its_record(open_cache, model, column):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    execute(cache, f"UPDATE entries SET {column} = ?", ROW_DAMAGE[column])
    for _ in range(2):
        found = cache.verify()
        assert "row" in kinds(found)
        assert found.findings[0].subject == record.key
        assert "is damaged" in found.findings[0].text
    repaired = cache.verify(repair=True)
    assert repaired.is_clean
    assert "from the record" in repaired.findings[0].repair
    assert cache.verify().findings == ()
    assert [used.record for used in cache.entries()] == [record]
    assert cache.get(model, **ASK).outcome == "hit"


SWAPPED = [
    ["digest"],
    ["digest", "build_id"],
    ["digest", "seal"],
    ["compute_capabilities"],
    ["model_digest"],
    [name for name in ROW_DAMAGE if name not in {"key_json", "key_version"}],
    [*(name for name in ROW_DAMAGE if name not in {"key_json", "key_version"}), "seal"],
]


def swap(cache, columns):
    """Give two rows each other's columns."""
    connection = sqlite3.connect(cache.root.registry_path)
    (one, *values), (other, *others) = connection.execute(f"SELECT key, {', '.join(columns)} FROM entries").fetchall()
    setting = ", ".join(f"{name} = ?" for name in columns)
    connection.execute(f"UPDATE entries SET {setting} WHERE key = ?", [*others, one])
    connection.execute(f"UPDATE entries SET {setting} WHERE key = ?", [*values, other])
    connection.commit()
    connection.close()


@pytest.mark.parametrize("columns", SWAPPED, ids=",".join)
def test_rows_that_have_each_others_columns_serve_nothing_until_they_are_repaired(open_cache, model, tmp_path, columns):
    """The engines are whole: only the rows say whose they are."""
    cache = open_cache()
    models = [model, save(linear(seed=9), tmp_path / "other.onnx")]
    asks = [{**ASK, "target": ["sm_86", "sm_89"]}, {**ASK, "target": "sm_89"}]
    stored = [cache.get(path, **ask) for path, ask in zip(models, asks, strict=True)]
    swap(cache, columns)
    for path, ask, entry in zip(models, asks, stored, strict=True):
        fresh = open_cache()
        for call in (fresh.get, fresh.explain):
            with pytest.raises(RegistryError, match="does not belong to its engine"):
                call(path, **ask)
        with pytest.raises(RegistryError):
            fresh.find_intact(entry.key)
    with pytest.raises(NotCachedError):
        open_cache().get(model, **ASK, target="sm_86", offline=True)  # nor for what it covers
    assert set(kinds(cache.verify())) >= {"row"}
    assert cache.verify(repair=True).is_clean
    for path, ask, entry in zip(models, asks, stored, strict=True):
        assert open_cache().get(path, **ask).record == entry.record


def test_a_row_that_lost_its_seal_is_damaged(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    execute(cache, "UPDATE entries SET seal = NULL")
    with pytest.raises(RegistryError, match="does not belong to its engine"):
        cache.get(model, **ASK)
    assert cache.verify(repair=True).is_clean
    assert cache.get(model, **ASK).outcome == "hit"


def test_a_row_without_seal_is_not_good_for_saying_that_it_is_of_an_older_key_version(open_cache, model, tmp_path):
    cache = open_cache()
    models = [model, save(linear(seed=9), tmp_path / "other.onnx")]
    stored = [cache.get(path, **ASK) for path in models]
    swap(cache, ["digest"])
    execute(cache, "UPDATE entries SET seal = NULL, key_version = key_version - 1")
    for path in models:
        with pytest.raises(RegistryError, match="does not belong to its engine"):
            open_cache().get(path, **ASK)
    assert cache.verify(repair=True).is_clean
    assert [open_cache().get(path, **ASK).record for path in models] == [entry.record for entry in stored]


@pytest.mark.parametrize("key", ["0" * 64, "", "../../etc/passwd", "it's % \" odd"])
def test_a_row_whose_key_is_damaged_is_forgotten(open_cache, model, key):
    cache = open_cache()
    cache.get(model, **ASK)
    other = cache.get(model, **WIDER)
    execute(cache, "UPDATE entries SET key = ? WHERE key != ?", key, other.key)
    found = cache.verify()
    assert (kinds(found), found.findings[0].subject) == (["row"], key)
    repaired = cache.verify(repair=True)
    assert repaired.is_clean
    assert "forget the entry" in repaired.findings[0].repair
    assert [used.record.key for used in cache.entries()] == [other.key]
    assert cache.get(model, **ASK).outcome == "built"


def test_a_row_whose_blob_is_damaged_too_is_forgotten(open_cache, model):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    flip_a_bit(stored.path)
    execute(cache, "UPDATE entries SET build_seconds = -1.0")
    assert cache.verify(repair=True).is_clean
    assert cache.entries() == []


def test_a_wrong_size_in_the_row_of_a_whole_engine_is_repaired(open_cache, model):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    execute(cache, "UPDATE blobs SET size_bytes = size_bytes + 64")
    assert kinds(cache.verify()) == ["row"]
    assert cache.verify(repair=True).is_clean
    assert cache.get(model, **ASK).outcome == "hit"
    assert cache.entries()[0].record == stored.record


def test_a_row_that_was_built_anew_since_it_was_read_is_not_repaired(open_cache, model):
    cache, other = open_cache(), open_cache()
    stored = cache.get(model, **ASK)
    execute(cache, "UPDATE entries SET driver_version = 'x'")
    (_, repair) = next(found for found in cache._found(deep=False) if found[0].kind == "row")
    other._registry.forget_entry(stored.key)
    rebuilt = other.get(model, **ASK).record
    assert rebuilt.build_id != stored.record.build_id
    assert repair() is False
    assert cache.entries()[0].record == rebuilt


def test_a_damaged_row_that_is_missing_when_it_is_repaired_takes_no_other_with_it(open_cache, model):
    cache, other = open_cache(), open_cache()
    stored = cache.get(model, **ASK)
    RepairRecords(cache.root).delete(stored.digest)
    execute(cache, "UPDATE entries SET backend = 'x'")
    (_, repair) = next(found for found in cache._found(deep=False) if found[0].kind == "row")
    other._registry.forget_entry(stored.key)
    other.get(model, **ASK)
    repair()
    assert [used.record.key for used in cache.entries()] == [stored.key]


# Records


def unrecorded(cache, digest):
    RepairRecords(cache.root).delete(digest)


def flipped(cache, digest):
    path = RepairRecords(cache.root).path(digest)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def emptied(cache, digest):
    RepairRecords(cache.root).write(digest, [])


def of_another_build(cache, digest):
    records = RepairRecords(cache.root)
    records.write(digest, [{**fields, "build_id": "0" * 32} for fields in records.read(digest)])


def of_another_shape(cache, digest):
    RepairRecords(cache.root).write(digest, [{"another": 1}])


@pytest.mark.parametrize("damage", [unrecorded, flipped, emptied, of_another_build, of_another_shape])
def test_a_record_that_is_missing_or_wrong_is_written_anew_from_the_row(open_cache, model, damage):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    whole = RepairRecords(cache.root).read(stored.digest)
    damage(cache, stored.digest)
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.subject) == ("record", stored.key)
    assert stored.digest[:12] in finding.text
    assert cache.get(model, **ASK).outcome == "hit"  # nothing else reads it
    assert cache.verify(repair=True).is_clean
    assert RepairRecords(cache.root).read(stored.digest) == whole


def a_folder(path):
    path.mkdir()
    (path / "notes").write_text("a user's")


def a_link(path):
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("make", [a_folder, a_link, os.mkfifo])
def test_what_is_no_file_in_a_records_place_is_moved_to_quarantine_and_the_record_written(open_cache, model, make):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    path = RepairRecords(cache.root).path(stored.digest)
    whole = path.read_bytes()
    path.unlink()
    make(path)
    mode = path.lstat().st_mode
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.subject) == ("record", stored.key)
    assert cache.verify(repair=True).is_clean
    assert path.read_bytes() == whole
    (kept,) = cache.root.quarantine.iterdir()
    assert kept.lstat().st_mode == mode
    assert make is not a_folder or (kept / "notes").read_text() == "a user's"
    assert cache.verify().findings == ()


def test_a_shared_blobs_record_has_all_its_entries_and_is_found_once(open_cache, model):
    cache = open_cache(ConstantBuilder())
    keys = {cache.get(model, **ask).key for ask in (ASK, WIDER)}
    digest = cache.entries()[0].record.digest
    records = RepairRecords(cache.root)
    assert {fields["key"] for fields in records.read(digest)} == keys
    records.delete(digest)
    assert kinds(cache.verify()) == ["record"]
    assert cache.verify(repair=True).is_clean
    assert {fields["key"] for fields in records.read(digest)} == keys
    cache.remove(cache.entries()[0].record)
    assert cache.verify().findings == ()


def test_a_record_that_cannot_be_written_fails_no_build(open_cache, model, monkeypatch):
    def refuse(*_):
        raise StoreError("no space", "free some")

    cache = open_cache()
    with monkeypatch.context() as patch:
        patch.setattr(RepairRecords, "write", refuse)
        assert cache.get(model, **ASK).outcome == "built"
        assert kinds(cache.verify()) == ["record"]
        assert not cache.verify(repair=True).is_clean
    assert cache.verify(repair=True).is_clean


def test_a_record_without_an_engine_is_garbage_after_the_grace_time(tmp_path, model):
    """Without ``open_cache``: young garbage is left, on purpose."""
    cache = fake_cache(tmp_path / "cache")
    stored = cache.get(model, **ASK)
    text = RepairRecords(cache.root).path(stored.digest).read_bytes()
    cache.remove(stored.record)
    stray = RepairRecords(cache.root).path(stored.digest)
    stray.write_bytes(text)
    assert [item.path for item in cache.verify(repair=True).young_orphans] == [stray]
    later = fake_cache(tmp_path / "cache", grace_s=0.0)
    assert kinds(later.verify(repair=True)) == ["orphan"]
    assert not stray.exists()


# Files, folders, attempts


def test_a_wrong_mode_of_a_folder_is_found_and_set_right(open_cache, model):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    folders = [cache.root.tmp, cache.root.engines, stored.path.parent]
    for folder in folders:
        folder.chmod(0o755)
    found = cache.verify()
    assert kinds(found) == ["mode"] * 3
    assert {finding.subject for finding in found.findings} == set(map(str, folders))
    assert cache.verify(repair=True).is_clean
    assert {folder.stat().st_mode & 0o7777 for folder in folders} == {0o700}


@pytest.mark.skipif(os.geteuid() != 0, reason="probe: only root gives files away")
def test_another_users_engine_is_replaced_by_an_own_copy(open_cache, model):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    content = stored.path.read_bytes()
    os.chown(stored.path, 12345, -1)
    inode = stored.path.stat().st_ino
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.subject) == ("owner", stored.key)
    assert cache.verify(repair=True).is_clean
    assert (stored.path.stat().st_uid, stored.path.stat().st_ino == inode) == (os.geteuid(), False)
    assert stored.path.read_bytes() == content
    assert cache.get(model, **ASK).outcome == "hit"


def test_an_engine_that_cannot_be_read_is_a_finding_and_stops_nothing(open_cache, model):
    cache = open_cache()
    first, second = cache.get(model, **ASK), cache.get(model, **WIDER)
    flip_a_bit(second.path)
    read = cache._storage.blobs.read

    def fail(digest):
        if digest == first.digest:
            raise StoreError(f"an engine cannot be read: Input/output error ({first.path})", "")
        return read(digest)

    cache._storage.blobs.read = fail
    found = cache.verify(deep=True)
    assert {finding.subject: finding.kind for finding in found.findings} == {
        first.key: "unreadable",
        second.key: "digest",
    }
    repaired = cache.verify(deep=True, repair=True)
    assert repaired.is_clean
    assert repaired.kept.quarantined == 2
    assert cache.entries() == []


def test_a_repair_that_fails_leaves_its_finding(open_cache, model, monkeypatch):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    flip_a_bit(stored.path)

    def refuse(*_):
        raise StoreError("read-only", "")

    with monkeypatch.context() as patch:
        patch.setattr(cache._storage.blobs, "quarantine", refuse)
        patch.setattr(cache._registry, "forget_blob", refuse)
        found = cache.verify(repair=True)
    assert (kinds(found), found.is_clean) == (["digest"], False)
    assert cache.verify(repair=True).is_clean


def test_only_a_deep_check_sees_damage_that_moved_no_fingerprint(open_cache, model):
    """The medium's own. A hit goes by the fingerprint too; ``load`` reads the bytes: test_runtime_deserialize."""
    cache = open_cache()
    stored = cache.get(model, **ASK)
    flip_a_bit(stored.path)
    cache._registry.remember("blob", Fingerprint.of_path(stored.path), {"digest": stored.digest})
    assert cache.get(model, **ASK).outcome == "hit"
    assert cache.verify().findings == ()
    assert kinds(cache.verify(deep=True)) == ["digest"]
    assert cache.verify(deep=True, repair=True).is_clean
    assert cache.get(model, **ASK).outcome == "built"


def running(cache, key, age_s):
    started = utc_now() - dt.timedelta(seconds=cache.config.grace_s * age_s)
    build = BuildRecord("a" * 32, key, "running", started, "here", 1)
    cache._registry.start_build(build)
    return build


def test_an_attempt_whose_process_ended_is_abandoned_after_the_grace_time(open_cache, model):
    cache = open_cache(grace_s=100.0)
    key = entry_of("a").key
    running(cache, key, 0.9)
    found = cache.verify(repair=True)
    assert (found.findings, found.kept.unfinished_builds) == ((), 1)
    cache._registry.abandon_build("a" * 32)
    execute(cache, "DELETE FROM builds")
    running(cache, key, 1.1)
    with cache._storage.locks.hold(key, 0.0):
        assert cache.verify(repair=True).findings == ()  # it runs
    assert kinds(cache.verify()) == ["build"]
    assert [build.state for build in cache.builds()] == ["running"]
    assert cache.verify(repair=True).is_clean
    assert [build.state for build in cache.builds()] == ["abandoned"]


def test_what_is_kept_for_a_reason_is_counted_and_is_no_finding(open_cache, model):
    def refuse(_):
        raise BuildError("TensorRT refused it", "")

    cache = open_cache(FakeBuilder(before=refuse))
    with pytest.raises(BuildError):
        cache.get(model, **WIDER)
    flip_a_bit(open_cache().get(model, **ASK).path)
    assert open_cache().get(model, **ASK).outcome == "built"
    found = cache.verify()
    assert found.findings == ()
    assert (found.kept.failures, found.kept.quarantined, found.kept.registries) == (1, 1, 0)


def test_a_check_changes_nothing(open_cache, model):
    cache = open_cache()
    stored = cache.get(model, **ASK)
    unrecorded(cache, cache.get(model, **WIDER).digest)
    flip_a_bit(stored.path)
    (cache.root.tmp / "left").touch()

    def state():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_mode)
            for path in cache.root.path.rglob("*")
            if path.is_file() and "registry" not in path.name and "locks" not in path.parts
        }

    before, rows = state(), cache._registry.examine()
    assert len(cache.verify(deep=True).findings) == 2
    assert (state(), cache._registry.examine()) == (before, rows)
    (cache.root.tmp / "left").unlink()
    cache.verify(repair=True)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_file_in_a_timing_caches_place_is_found_and_not_deleted(open_cache, model, make):
    cache = open_cache()
    cache.get(model, **ASK)
    path = cache.root.path / "timing-caches" / ("ab" * 32)
    make(path)
    before = path.lstat()
    (finding,) = cache.verify(repair=True).findings
    assert (finding.kind, finding.is_repaired) == ("artefact", False)
    assert "move it away" in finding.repair
    assert path.lstat().st_ino == before.st_ino
    path.rmdir() if path.is_dir() else path.unlink()


def test_a_prune_of_a_folder_that_is_not_a_cache_yet_makes_no_cache(open_cache):
    cache = open_cache(is_made=False, grace_s=0.0)
    cache.root.path.mkdir(mode=0o755)
    staged = cache.root.path / ".enginecache-abcdefgh"
    staged.touch()
    assert cache.execute_prune(cache.plan_prune(older_than_s=0.0)) == 0
    assert list(cache.root.path.iterdir()) == [staged]
