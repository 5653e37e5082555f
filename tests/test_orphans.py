from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import get_args

import pytest
from records import hex_of

import enginecache
from enginecache.files.units import DAY_S
from enginecache.maintenance.orphans import KEPT_FOR_S, delete_orphan, find_orphans
from enginecache.storage.blobs import Blobs
from enginecache.storage.folder import ArtefactKind, Root, build_folder_prefix
from enginecache.storage.names import is_temporary_file, is_temporary_folder, owned

GRACE_S = DAY_S


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def blob(root, tmp_path):
    source = tmp_path / "plan"
    source.write_bytes(b"plan")
    store = Blobs(root)
    staged = store.stage(source)
    return store.publish(staged)


def found(root, age_s, named=()):
    """Paths of past and of young orphans, when everything is ``age_s`` seconds old."""
    past, young = find_orphans(root, set(named).__contains__, GRACE_S, now=time.time() + age_s)
    return [item.path for item in past], [item.path for item in young]


def test_a_fresh_root_has_no_orphans(root):
    assert found(root, 1e9) == ([], [])


def test_a_named_blob_is_none_at_any_age(root, blob):
    assert found(root, 1e9, [blob.stem]) == ([], [])


def test_an_unnamed_blob_is_an_orphan_after_its_grace_time(root, blob):
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
    (item,), _ = find_orphans(root, lambda _: False, 0.0, now=time.time() + 5)
    assert delete_orphan(item)
    assert not record.exists()


def test_a_record_without_its_blob_is_an_orphan_once_no_row_names_it(root, blob):
    record = blob.with_suffix(".json")
    record.touch()
    blob.unlink()
    assert found(root, GRACE_S + 5, [blob.stem]) == ([], [])  # the row is dangling, and its repair takes the record
    assert found(root, GRACE_S + 5) == ([record], [])


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal"])
def test_a_registry_that_was_set_aside_is_never_an_orphan(root, suffix):
    (root.quarantine / f"registry.1790000000000000000.sqlite{suffix}").touch()
    assert found(root, 1e9) == ([], [])


FOREIGN_FILES = (
    "engines/README",
    "engines/yolo.plan",
    "engines/ab/README",
    f"engines/ab/{'c' * 64}.engine",  # not of this folder
    f"engines/ab/{'ab' * 32}.engine.bak",
    f"engines/ab/{'AB' * 32}.engine",
    f"engines/abc/{'ab' * 32}.engine",
    "engines/ab/sub/deep.engine",
    "tmp/notes",
    "tmp/blob-mine",
    "tmp/blob-12345678.bak",
    "tmp/cache/a",
    "tmp/build-1/plan",
    "quarantine/mine.engine",
    f"quarantine/{'ab' * 32}.1790000000000000000.json",
    "logs/app.log",
    f"logs/{'ab' * 16}.log.1",
    "locks/mine.lock",
    "uses/notes",
    "timing-caches/trt.cache",
    "runtime-caches/sub/x",
    ".enginecache-notes",
    "src/main.py",
)


def put_foreign(root) -> dict:
    """Files, links and folders of a user's in a cache folder; how all of them look."""
    for name in FOREIGN_FILES:
        path = root.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious", encoding="utf-8")
    outside = root.path.parent / "outside"
    outside.mkdir()
    (outside / f"{'cd' * 32}.engine").write_text("precious", encoding="utf-8")
    (root.engines / "cd").symlink_to(outside)
    for name in (f"engines/ab/{'ab' * 32}.engine", "tmp/blob-1234567_", f"logs/{'ab' * 16}.log"):
        (root.path / name).symlink_to(outside / f"{'cd' * 32}.engine")
    (root.path / "tmp" / "record-12345678").mkdir()  # a folder with the name of a file
    (root.path / "tmp" / f"build-{'ab' * 6}-12345678").write_text("precious", encoding="utf-8")  # and the reverse
    return look(root.path.parent)


def look(folder) -> dict:
    return {
        path: (path.lstat().st_mode, path.lstat().st_uid, path.lstat().st_gid, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_what_enginecache_did_not_write_is_never_an_orphan_at_any_age(root, blob):
    put_foreign(root)
    assert found(root, 1e9, [blob.stem]) == ([], [])


def test_a_link_in_the_place_of_a_folder_of_engines_is_not_followed(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{'ab' * 32}.engine").touch()
    (root.engines / "ab").symlink_to(tmp_path / "elsewhere")
    assert found(root, 1e9) == ([], [])
    assert list(Blobs(root).digests()) == []


def test_sharing_changes_nothing_that_enginecache_did_not_write(root):
    before = put_foreign(root)
    root.share()
    after = look(root.path.parent)
    foreign = [path for path in before if not is_ours(root.path, path)]
    assert len(foreign) > len(FOREIGN_FILES)
    assert {path: after[path] for path in foreign} == {path: before[path] for path in foreign}


def is_ours(root, path) -> bool:
    return str(path) in dict(owned(root)) or path == root


def test_every_temporary_name_in_the_code_is_one_that_is_deleted_later():
    """A new one must be added to the patterns, or what a crash leaves of it stays forever."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in Path(enginecache.__file__).parent.rglob("*.py"))
    prefixes = set(re.findall(r'prefix=f?"([^"]+)", dir=self._root.tmp', code)) | {build_folder_prefix("ab" * 16)}
    assert {"blob-", "holder-"} < prefixes
    for prefix in prefixes:
        for name in get_args(ArtefactKind) if "{" in prefix else [""]:
            made = prefix.replace("{self._kind}", name) + "a1_b2c3d"
            assert is_temporary_file(made) or is_temporary_folder(made), made


def test_what_a_death_in_the_making_of_a_folder_left_is_an_orphan(root):
    left = [root.path / ".enginecache-a1_b2c3d", root.tmp / ".enginecache-a1_b2c3d"]
    for path in left:
        path.mkdir()
    past, _ = find_orphans(root, lambda _: False, 0.0, now=time.time() + 5)
    assert [item.path for item in past] == sorted(left)
    (left[0] / "precious").touch()
    assert [delete_orphan(item) for item in past] == [False, True]


def test_a_build_folder_is_an_orphan_with_all_that_is_in_it(root):
    folder = root.tmp / f"{build_folder_prefix('ab' * 16)}a1_b2c3d"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/plan").write_bytes(b"x" * 100)
    (folder / "log").write_bytes(b"x" * 10)
    (folder / "link").symlink_to("/etc")
    (item,), _ = find_orphans(root, lambda _: False, GRACE_S, now=time.time() + GRACE_S + 5)
    assert (item.path, item.size_bytes) == (folder, 110)


@pytest.mark.parametrize("name", [f"quarantine/{'ab' * 32}.1790000000000000000.engine", f"logs/{'ab' * 16}.log"])
def test_quarantine_and_logs_are_kept_longer_and_are_not_young_orphans(root, name):
    path = root.path / name
    path.touch()
    assert found(root, GRACE_S + 5) == ([], [])
    assert found(root, KEPT_FOR_S + 5) == ([path], [])


def test_locks_and_uses_are_never_orphans(root):
    (root.locks / "key.lock").touch()
    (root.uses / hex_of("key")).touch()
    assert found(root, 1e9) == ([], [])


def test_a_clock_that_was_set_back_makes_nothing_an_orphan(root, blob):
    assert found(root, -1e6) == ([], [blob])


def test_delete_takes_files_and_folders_but_not_what_links_in_them_lead_to(root, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (root.tmp / "blob-a1_b2c3d").touch()
    folder = root.tmp / "registry-a1_b2c3d"
    (folder / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(target)
    past, _ = find_orphans(root, lambda _: False, 0.0, now=time.time() + 5)
    assert [delete_orphan(item) for item in past] == [True] * 2
    assert list(root.tmp.iterdir()) == []
    assert target.is_dir()


def test_deleting_a_missing_file_succeeds(root, blob):
    past, _ = find_orphans(root, lambda _: False, 0.0, now=time.time() + 5)
    blob.unlink()
    assert [delete_orphan(item) for item in past] == [True]
