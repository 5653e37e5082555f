from __future__ import annotations

import mmap
import os
import stat
import threading
from pathlib import Path

import blake3
import pytest
from mounts import read_only

from enginecache.errors import StoreError
from enginecache.storage.blobs import CHUNK_BYTES, Blobs
from enginecache.storage.folder import Root

BAD_DIGESTS = [
    "",
    "ab",
    "../x",
    "../../etc/passwd",
    "A" * 64,
    "g" * 64,
    "a" * 63,
    "a" * 65,
    "a" * 64 + "\n",
    "/" + "a" * 63,
    "٣" * 64,
]


@pytest.fixture
def store(tmp_path: Path) -> Blobs:
    return Blobs(Root.open(tmp_path / "cache"))


@pytest.fixture(params=[0o000, 0o077, 0o177])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(b"vtrt" + os.urandom(12345))
    return path


def put(store: Blobs, source: Path) -> str:
    staged = store.stage(source)
    store.publish(staged)
    return staged.digest


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path.name != "CACHEDIR.TAG")


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_staged_bytes_have_their_digest_and_size_and_no_name_yet(store, plan):
    staged = store.stage(plan)
    data = plan.read_bytes()
    assert (staged.digest, staged.size_bytes) == (blake3.blake3(data).hexdigest(), len(data))
    assert store.fingerprint(staged.digest) is None
    assert store.read(staged.digest) is None
    assert list(store.digests()) == []
    store.discard(staged)


def test_a_published_blob_is_the_pure_bytes_of_the_plan(store, plan):
    digest = put(store, plan)
    assert store.path(digest).read_bytes() == plan.read_bytes()
    assert store.path(digest).name == f"{digest}.engine"
    assert list(store.digests()) == [digest]


def test_a_plan_that_takes_several_reads_is_stored_whole(store, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(2 * CHUNK_BYTES + 1))
    digest = put(store, large)
    assert store.path(digest).read_bytes() == large.read_bytes()
    assert store.read(digest).digest == digest == blake3.blake3(large.read_bytes()).hexdigest()


def test_an_empty_plan_is_a_blob_too(store, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    digest = put(store, empty)
    assert store.read(digest).digest == digest == blake3.blake3().hexdigest()


def test_the_builders_own_file_is_copied_and_left_alone(store, plan):
    before, data = plan.stat(), plan.read_bytes()
    with plan.open("r+b") as still_open:
        digest = put(store, plan)
        still_open.write(b"changed after the publication")
    assert store.path(digest).read_bytes() == data
    assert store.path(digest).stat().st_ino != before.st_ino
    assert (plan.stat().st_ino, plan.stat().st_mode) == (before.st_ino, before.st_mode)


def test_an_adopted_plan_is_the_blob_itself_and_is_not_copied(store, tmp_path):
    plan = tmp_path / "cache/tmp/plan"
    plan.write_bytes(b"vtrt" + os.urandom(12345))
    inode, data = plan.stat().st_ino, plan.read_bytes()
    staged = store.adopt(plan)
    assert (staged.digest, staged.size_bytes) == (blake3.blake3(data).hexdigest(), len(data))
    store.publish(staged)
    assert store.path(staged.digest).stat().st_ino == inode
    assert not plan.exists()
    assert not os.access(store.path(staged.digest), os.X_OK)
    assert store.path(staged.digest).stat().st_mode & 0o222 == 0


def test_a_plan_with_a_second_name_is_copied(store, tmp_path):
    """Whoever has the other name could change the blob."""
    plan = tmp_path / "cache/tmp/plan"
    plan.write_bytes(b"vtrt" + os.urandom(12345))
    (tmp_path / "other").hardlink_to(plan)
    staged = store.adopt(plan)
    store.publish(staged)
    (tmp_path / "other").write_bytes(b"changed")
    assert store.read(staged.digest).digest == staged.digest


def test_a_link_in_the_place_of_a_plan_is_not_followed(store, tmp_path, plan):
    link = tmp_path / "cache/tmp/plan"
    link.symlink_to(plan)
    with pytest.raises(StoreError, match="cannot be stored"):
        store.adopt(link)


def test_discarded_bytes_leave_nothing_and_discarding_again_is_no_error(store, plan, tmp_path):
    staged = store.stage(plan)
    store.discard(staged)
    store.discard(staged)
    assert files_in(tmp_path / "cache") == []


def test_a_plan_that_is_not_there_is_a_store_error_and_leaves_nothing(store, tmp_path):
    with pytest.raises(StoreError, match="cannot be stored"):
        store.stage(tmp_path / "absent")
    assert files_in(tmp_path / "cache") == []


def test_equal_bytes_are_one_blob(store, plan, tmp_path):
    twin = tmp_path / "twin"
    twin.write_bytes(plan.read_bytes())
    assert put(store, plan) == put(store, twin)
    assert len(files_in(tmp_path / "cache")) == 1


def test_publishing_replaces_the_file_and_readers_keep_their_bytes(store, plan):
    digest = put(store, plan)
    path, data = store.path(digest), plan.read_bytes()
    first = path.stat().st_ino
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        put(store, plan)
        assert path.stat().st_ino != first
        assert mapped[:] == data
        store.delete(digest)
        assert mapped[:] == data


def test_publishing_equal_bytes_heals_a_damaged_blob(store, plan):
    digest = put(store, plan)
    damage(store.path(digest), b"damaged")
    put(store, plan)
    assert store.read(digest).digest == digest


def test_many_threads_publish_the_same_bytes_at_once(store, plan):
    failures = []

    def publish():
        try:
            put(store, plan)
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [store.read(digest).digest for digest in store.digests()] == [blake3.blake3(plan.read_bytes()).hexdigest()]


def test_private_blobs_are_read_only_and_their_folders_private_under_any_umask(umask, store, plan, tmp_path):
    path = store.path(put(store, plan))
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "cache", *folders]} == {0o700}


def test_shared_blobs_are_for_the_group_under_any_umask(umask, plan, tmp_path):
    store = Blobs(Root.open(tmp_path / "cache", "group"))
    path = store.path(put(store, plan))
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "cache", *folders]} == {0o2770}


def test_reading_returns_the_digest_of_the_bytes_and_not_the_one_in_the_name(store, plan):
    digest = put(store, plan)
    assert store.read(digest).digest == digest
    assert store.read(digest).fingerprint == store.fingerprint(digest)
    damage(store.path(digest), b"other bytes")
    assert store.read(digest).digest == blake3.blake3(b"other bytes").hexdigest()


def test_a_blob_that_was_just_written_is_not_settled(store, plan):
    assert not store.read(put(store, plan)).is_settled


def test_fingerprints_of_a_blob_stay_until_it_is_replaced(store, plan):
    digest = put(store, plan)
    first = store.fingerprint(digest)
    store.path(digest).read_bytes()
    assert store.fingerprint(digest) == first
    put(store, plan)
    assert store.fingerprint(digest) != first


@pytest.mark.parametrize("kind", ["folder", "full folder", "symlink", "dangling symlink", "fifo"])
def test_what_is_no_regular_file_is_no_blob_and_can_be_set_aside_and_replaced(store, plan, tmp_path, kind):
    digest = put(store, plan)
    path = store.path(digest)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind.endswith("symlink"):
        path.symlink_to(plan if kind == "symlink" else tmp_path / "absent")
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "file").touch()
    assert store.fingerprint(digest) is None
    assert store.read(digest) is None
    assert store.quarantine(digest) is not None
    put(store, plan)
    assert store.read(digest).digest == digest


def test_a_folder_of_engines_that_is_a_link_is_not_written_to_and_nothing_behind_it_is_deleted(store, plan, tmp_path):
    digest = put(store, plan)
    folder = store.path(digest).parent
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    assert store.fingerprint(digest) is None
    assert store.read(digest) is None
    assert store.quarantine(digest) is None
    assert store.delete(digest) == 0
    store.retire(digest)
    with pytest.raises(StoreError):
        put(store, plan)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == [f"{digest}.engine"]


def test_quarantine_keeps_the_bytes_elsewhere_each_time(store, plan):
    kept = []
    for data in (b"first damage", b"second damage"):
        digest = put(store, plan)
        damage(store.path(digest), data)
        kept.append(store.quarantine(digest))
        assert store.fingerprint(digest) is None
    assert [path.read_bytes() for path in kept] == [b"first damage", b"second damage"]
    assert list(store.digests()) == []


def test_quarantine_of_a_missing_blob_returns_none(store):
    assert store.quarantine("a" * 64) is None


def test_delete_returns_the_bytes_freed(store, plan):
    digest = put(store, plan)
    assert store.delete(digest) == plan.stat().st_size
    assert store.delete(digest) == 0
    assert store.delete("a" * 64) == 0
    assert list(store.digests()) == []


def test_files_of_other_names_are_no_blobs(store, plan):
    digest = put(store, plan)
    folder = store.path(digest).parent
    (folder / "README").touch()
    (folder / f"{digest}.engine.part").touch()
    (folder / f"{digest.upper()}.engine").touch()
    elsewhere = folder.with_name("zz")
    elsewhere.mkdir()
    (elsewhere / f"{digest}.engine").touch()
    assert list(store.digests()) == [digest]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
@pytest.mark.parametrize("method", ["path", "fingerprint", "read", "quarantine", "delete"])
def test_what_is_no_digest_never_becomes_a_path(store, tmp_path, method, digest):
    before = files_in(tmp_path)
    with pytest.raises(StoreError, match="not a digest"):
        getattr(store, method)(digest)
    assert files_in(tmp_path) == before


def test_a_missing_folder_is_an_error_that_names_it_and_says_what_to_do(store, plan, tmp_path):
    (tmp_path / "cache/tmp").rmdir()
    with pytest.raises(StoreError, match="No such file") as caught:
        store.stage(plan)
    assert "enginecache doctor" in caught.value.fix


def test_folder_in_another_mount_is_named_with_what_to_do(store, plan, tmp_path):
    digest = put(store, plan)
    staged = store.stage(plan)
    with read_only(store.path(digest).parent):
        # The kernel renames nothing from mount to mount, not even within one file system.
        with pytest.raises(StoreError) as caught:
            store.publish(staged)
        with pytest.raises(StoreError, match="different mounts"):
            store.quarantine(digest)
    store.discard(staged)
    where = f"{staged.path} to {store.path(digest)}"
    why = "Invalid cross-device link: the two places are in different mounts"
    assert caught.value.what == f"an engine cannot be stored ({where}): {why}"
    assert caught.value.fix.startswith("Mount the whole cache folder as one")
    assert store.read(digest).digest == digest


def test_engine_that_is_a_mount_point_is_named_when_it_cannot_be_replaced(store, plan):
    digest = put(store, plan)
    staged = store.stage(plan)
    with read_only(store.path(digest)), pytest.raises(StoreError, match=f"to {store.path(digest)}\\)"):
        store.publish(staged)
    store.discard(staged)
