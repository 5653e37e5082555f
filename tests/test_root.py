from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from enginecache.errors import StoreError
from enginecache.store.root import FOLDERS, Root

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="probe: permissions do not bind the root user")


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o777])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(root: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (root, *root.iterdir())}


def times(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (root, *root.rglob("*"))}


def test_open_makes_every_folder_private_under_any_umask(tmp_path, umask):
    root = Root.open(tmp_path / "cache")
    assert sorted(path.name for path in root.path.iterdir()) == sorted(FOLDERS)
    assert modes(root.path) == {0o700}


def test_open_makes_a_shared_root_for_the_group_under_any_umask(tmp_path, umask):
    assert modes(Root.open(tmp_path / "cache", "group").path) == {0o2770}


def test_modes_follow_from_sharing(tmp_path):
    private, shared = Root(tmp_path), Root(tmp_path, is_shared=True)
    assert (private.folder_mode, private.file_mode, private.blob_mode) == (0o700, 0o600, 0o400)
    assert (shared.folder_mode, shared.file_mode, shared.blob_mode) == (0o2770, 0o660, 0o440)


def test_open_makes_the_parents_too(tmp_path):
    assert Root.open(tmp_path / "some/where/cache").tmp.is_dir()


def test_open_again_writes_nothing(tmp_path):
    Root.open(tmp_path / "cache")
    before = times(tmp_path / "cache")
    Root.open(tmp_path / "cache")
    assert times(tmp_path / "cache") == before


def test_open_makes_again_what_is_missing(tmp_path):
    shutil.rmtree(Root.open(tmp_path / "cache").locks)
    assert Root.open(tmp_path / "cache").locks.is_dir()


def test_many_threads_open_one_root_at_once(tmp_path):
    failures = []
    start = threading.Barrier(8)

    def open_root():
        try:
            start.wait()
            Root.open(tmp_path / "cache")
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=open_root) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("open_root", [Root.open, Root.check])
def test_a_symbolic_link_is_refused_with_the_way_out(tmp_path, open_root):
    Root.open(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(StoreError, match="link is a symbolic link") as caught:
        open_root(tmp_path / "link")
    assert "--dir" in caught.value.fix


def test_a_dangling_symbolic_link_is_refused_and_makes_nothing(tmp_path):
    (tmp_path / "link").symlink_to("absent")
    with pytest.raises(StoreError, match="symbolic link"):
        Root.open(tmp_path / "link")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("open_root", [Root.open, Root.check])
def test_a_folder_of_the_root_that_is_a_symbolic_link_is_refused(tmp_path, open_root, name):
    root = Root.open(tmp_path / "cache")
    (root.path / name).rmdir()
    (root.path / name).symlink_to(tmp_path)
    with pytest.raises(StoreError, match=f"{name} is a symbolic link"):
        open_root(root.path)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_root_that_everyone_may_write_is_refused_with_the_way_out(tmp_path, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(StoreError, match="everyone may write") as caught:
        Root.open(tmp_path / "cache")
    assert "Name a folder below it" in caught.value.fix
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "cache").chmod(mode & ~0o002)
    Root.open(tmp_path / "cache")


def test_a_folder_below_one_that_everyone_may_write_is_the_other_way_out(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    assert modes(Root.open(tmp_path / "open/mine").path) == {0o700}


def test_a_folder_of_the_root_that_everyone_may_write_is_refused(tmp_path):
    root = Root.open(tmp_path / "cache")
    root.engines.chmod(0o777)
    with pytest.raises(StoreError, match=r"everyone may write to .*engines"):
        Root.open(root.path)


@pytest.mark.parametrize("open_root", [Root.open, Root.check])
def test_a_file_in_place_of_the_root_is_refused(tmp_path, open_root):
    (tmp_path / "cache").touch()
    with pytest.raises(StoreError, match="cache is not a folder"):
        open_root(tmp_path / "cache")


def test_a_file_in_place_of_a_folder_of_the_root_is_refused(tmp_path):
    root = Root.open(tmp_path / "cache")
    root.tmp.rmdir()
    root.tmp.touch()
    with pytest.raises(StoreError, match="tmp is not a folder"):
        Root.open(root.path)


def test_a_file_in_place_of_the_parent_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used") as caught:
        Root.open(tmp_path / "file/cache")
    assert "ENGINECACHE_DIR" in caught.value.fix


@needs_permissions
def test_a_parent_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="Permission denied") as caught:
        Root.open(tmp_path / "locked/cache")
    assert "--dir" in caught.value.fix


@needs_permissions
def test_a_read_only_root_opens_where_all_is_there(tmp_path):
    root = Root.open(tmp_path / "cache")
    root.path.chmod(0o500)
    Root.open(root.path)
    root.path.chmod(0o700)


def test_check_makes_nothing(tmp_path):
    (tmp_path / "cache").mkdir()
    assert Root.check(tmp_path / "cache").path == tmp_path / "cache"
    assert list((tmp_path / "cache").iterdir()) == []


def test_check_of_nothing_is_an_error_and_makes_nothing(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        Root.check(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
