from __future__ import annotations

import os
import time

import pytest
from records import hex_of

from enginecache.config import DAY_S
from enginecache.garbage import KEPT_FOR_S, delete_garbage, find_garbage
from enginecache.store.local import LocalBlobStore
from enginecache.store.root import Root

GRACE_S = DAY_S


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def blob(root, tmp_path):
    source = tmp_path / "plan"
    source.write_bytes(b"plan")
    store = LocalBlobStore(root)
    staged = store.stage(source)
    return store.publish(staged)


def found(root, age_s, named=()):
    """Paths of past and of young garbage, when everything is ``age_s`` seconds old."""
    past, young = find_garbage(root, set(named).__contains__, GRACE_S, now=time.time() + age_s)
    return [item.path for item in past], [item.path for item in young]


def test_a_fresh_root_has_none(root):
    assert found(root, 1e9) == ([], [])


def test_a_named_blob_is_none_at_any_age(root, blob):
    assert found(root, 1e9, [blob.stem]) == ([], [])


def test_an_orphan_is_garbage_after_its_grace_time(root, blob):
    assert found(root, GRACE_S - 5) == ([], [blob])
    assert found(root, GRACE_S + 5) == ([blob], [])


def test_age_counts_from_the_rename_and_not_from_the_bytes(root, blob):
    os.utime(blob, (1000, 1000))
    assert found(root, 0) == ([], [blob])


def test_a_record_goes_with_its_blob(root, blob):
    record = blob.with_suffix(".json")
    record.touch()
    assert found(root, 1e9, [blob.stem]) == ([], [])
    assert found(root, 0) == ([], [blob])
    (item,), _ = find_garbage(root, lambda _: False, 0.0, now=time.time() + 5)
    assert delete_garbage(item)
    assert not record.exists()


def test_a_record_without_its_blob_is_garbage_once_no_row_names_it(root, blob):
    record = blob.with_suffix(".json")
    record.touch()
    blob.unlink()
    assert found(root, GRACE_S + 5, [blob.stem]) == ([], [])  # the row is dangling, and its repair takes the record
    assert found(root, GRACE_S + 5) == ([record], [])


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal"])
def test_a_registry_that_was_set_aside_is_never_garbage(root, suffix):
    (root.quarantine / f"registry.1790000000000000000.sqlite{suffix}").touch()
    assert found(root, 1e9) == ([], [])


def test_files_of_other_names_among_the_blobs_are_garbage(root, blob):
    other = blob.with_name("README")
    other.touch()
    assert found(root, GRACE_S + 5, [blob.stem]) == ([other], [])


def test_what_a_link_among_the_blobs_leads_to_is_left_alone(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    link = root.engines / "ab"
    link.symlink_to(tmp_path / "elsewhere")
    assert found(root, GRACE_S + 5) == ([link], [])


def test_a_build_folder_is_garbage_with_all_that_is_in_it(root):
    folder = root.tmp / "build-1"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/plan").write_bytes(b"x" * 100)
    (folder / "log").write_bytes(b"x" * 10)
    (folder / "link").symlink_to("/etc")
    (item,), _ = find_garbage(root, lambda _: False, GRACE_S, now=time.time() + GRACE_S + 5)
    assert (item.path, item.size_bytes) == (folder, 110)


@pytest.mark.parametrize("name", ["quarantine", "logs"])
def test_quarantine_and_logs_are_kept_longer_and_are_not_young_garbage(root, name):
    path = root.path / name / "file"
    path.touch()
    assert found(root, GRACE_S + 5) == ([], [])
    assert found(root, KEPT_FOR_S + 5) == ([path], [])


def test_locks_and_uses_are_never_garbage(root):
    (root.locks / "key.lock").touch()
    (root.uses / hex_of("key")).touch()
    assert found(root, 1e9) == ([], [])


def test_a_clock_that_was_set_back_makes_nothing_garbage(root, blob):
    assert found(root, -1e6) == ([], [blob])


def test_delete_takes_files_folders_and_links_but_not_what_links_lead_to(root, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (root.tmp / "a-link").symlink_to(target)
    (root.tmp / "b-file").touch()
    (root.tmp / "c-folder/deep").mkdir(parents=True)
    (root.tmp / "c-folder/link").symlink_to(target)
    past, _ = find_garbage(root, lambda _: False, 0.0, now=time.time() + 5)
    assert [delete_garbage(item) for item in past] == [True] * 3
    assert list(root.tmp.iterdir()) == []
    assert target.is_dir()


def test_delete_of_what_is_gone_is_done(root, blob):
    past, _ = find_garbage(root, lambda _: False, 0.0, now=time.time() + 5)
    blob.unlink()
    assert [delete_garbage(item) for item in past] == [True]
