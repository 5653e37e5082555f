from __future__ import annotations

import dataclasses
import json
import os

import pytest
from records import entry, hex_of

from enginecache.errors import StoreError
from enginecache.files.canonical import key_digest
from enginecache.storage.blobs import Blobs
from enginecache.storage.folder import Root
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.repair_files import RepairRecords

DIGEST = hex_of("blob")
ENTRIES = [{"key": "a", "seconds": 0.1}, {"key": "b", "name": "Modèle \ud800"}]


@pytest.fixture(params=["", "group"])
def root(request, tmp_path):
    return Root.open(tmp_path / "cache", request.param)


@pytest.fixture
def records(root):
    (root.engines / DIGEST[:2]).mkdir(mode=0o700)
    return RepairRecords(root)


@pytest.fixture
def stored(root, tmp_path):
    """A store with one blob, and the blob's digest."""
    source = tmp_path / "plan"
    source.write_bytes(b"plan")
    store = Blobs(root)
    staged = store.stage(source)
    store.publish(staged)
    return store, staged.digest


def test_a_record_is_read_as_it_was_written_and_replaced_whole(root, records):
    records.write(DIGEST, ENTRIES)
    assert records.read(DIGEST) == ENTRIES
    records.write(DIGEST, ENTRIES[:1])
    assert records.read(DIGEST) == ENTRIES[:1]
    assert records.path(DIGEST).stat().st_mode & 0o777 == root.file_mode
    assert list(root.tmp.iterdir()) == []


def test_a_record_is_one_line_of_plain_json_that_names_its_schema(records):
    records.write(DIGEST, ENTRIES)
    text = records.path(DIGEST).read_text(encoding="ascii")
    assert text.count("\n") == 1
    body = json.loads(text)
    assert (body["schema"], body["digest"], body["entries"], len(body["blake3"])) == (1, DIGEST, ENTRIES, 64)


def test_a_missing_record_and_what_is_no_file_are_reported(records):
    assert records.read(DIGEST) == "is missing"
    path = records.path(DIGEST)
    path.symlink_to("/etc/passwd")
    assert records.read(DIGEST).startswith("cannot be read")
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        assert records.read(DIGEST) == "is not a regular file, or too large"
        path.unlink() if path.is_fifo() else path.rmdir()


def test_a_flipped_bit_and_a_cut_are_seen_anywhere(records):
    records.write(DIGEST, ENTRIES)
    path = records.path(DIGEST)
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 3):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert records.read(DIGEST) in ("is not as it was written", ENTRIES), (place, bit)
            if records.read(DIGEST) == ENTRIES:  # a space for a comma's neighbour changes no value
                assert json.loads(path.read_bytes()) == json.loads(whole)
        path.write_bytes(whole[:place])
        assert records.read(DIGEST) in ("is not as it was written", ENTRIES), place


def test_another_blobs_record_is_not_taken(records):
    records.write(DIGEST, ENTRIES)
    other = DIGEST[:-1] + ("0" if DIGEST[-1] != "0" else "1")
    records.path(DIGEST).rename(records.path(other))
    assert records.read(other) == "is not as it was written"


def test_a_later_schema_is_not_guessed_at(records):
    records.write(DIGEST, ENTRIES)
    text = records.path(DIGEST).read_text(encoding="ascii")
    records.path(DIGEST).write_text(text.replace('"schema":1', '"schema":2'), encoding="ascii")
    assert records.read(DIGEST) == "is not as it was written"


@pytest.mark.parametrize("digest", ["", "../x", "a" * 63, DIGEST.upper()])
def test_only_a_digest_becomes_a_path(records, digest):
    assert "is not a digest" in str(records.read(digest))
    for call in (records.path, lambda digest: records.write(digest, [])):
        with pytest.raises(StoreError):
            call(digest)


def test_what_cannot_be_written_is_a_store_error_and_leaves_nothing(root):
    with pytest.raises(StoreError, match="cannot be written"):
        RepairRecords(root).write(DIGEST, ENTRIES)  # there is no folder for it
    assert list(root.tmp.iterdir()) == []


def test_digests_are_those_of_the_records_in_their_places(root, records):
    records.write(DIGEST, [])
    records.path(DIGEST).with_name("notes.json").touch()
    (root.engines / "ff").mkdir()
    (root.engines / "ff" / f"{DIGEST}.json").touch()
    assert list(records.digests()) == [DIGEST]


@pytest.mark.parametrize("method", ["delete", "quarantine"])
def test_a_record_goes_with_its_blob(root, stored, method):
    store, digest = stored
    records = RepairRecords(root)
    for _ in range(2):  # the second time, the blob is missing
        records.write(digest, ENTRIES)
        getattr(store, method)(digest)
        assert list((root.engines / digest[:2]).iterdir()) == []


def test_an_entry_comes_back_from_its_json():
    for record in (
        entry("a"),
        entry("b", device_name="H100", compute_capabilities=("8.0+",), timing_cache_digest="7" * 64, check_json="{}"),
    ):
        assert EntryRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", "A" * 64),
        ("digest", "../../etc/passwd"),
        ("digest", None),
        ("key_version", "1"),
        ("key_version", True),
        ("size_bytes", -1),
        ("backend", "tensorrt-rty"),
        ("compute_capabilities", ["8.x"]),
        ("compute_capabilities", "8.9"),
        ("compute_capabilities", None),
        ("build_id", "x"),
        ("build_seconds", float("inf")),
        ("build_seconds", "2"),
        ("created_at", "yesterday"),
        ("created_at", "2026-11-01T12:00:00"),
        ("created_at", 5),
        ("model_name", None),
        ("device_name", 1),
        ("timing_cache_digest", ""),
        ("check_json", {}),
        ("another", 1),
    ],
)
def test_an_entry_of_other_values_is_refused(field, value):
    with pytest.raises(ValueError, match=r"."):
        EntryRecord.from_json({**entry("a").to_json(), field: value})


def test_an_entry_without_a_field_is_refused():
    fields = entry("a").to_json()
    del fields["digest"]
    with pytest.raises(ValueError, match="digest"):
        EntryRecord.from_json(fields)


def test_a_key_that_is_not_its_texts_is_a_flaw():
    record = entry("a")
    assert record.flaw == "its key is not that of its text"
    right = dataclasses.replace(record, key=key_digest(1, record.key_json))
    assert right.flaw == ""
    other = dataclasses.replace(record, key_json="[]", key=key_digest(1, "[]"))
    assert other.flaw == "its key names no model"


def test_a_record_is_neither_written_nor_deleted_through_a_link(records, tmp_path):
    records.write(DIGEST, ENTRIES)
    folder = records.path(DIGEST).parent
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    before = records.path(DIGEST).read_bytes()
    records.delete(DIGEST)
    with pytest.raises(StoreError, match="is a link, and not followed"):
        records.write(DIGEST, [])
    assert records.path(DIGEST).read_bytes() == before
