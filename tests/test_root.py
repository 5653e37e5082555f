from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from users import as_user

from enginecache.config import Config
from enginecache.errors import StoreError
from enginecache.maintenance.doctor.folder import check_parents, check_root
from enginecache.maintenance.inspect import StoredEngines
from enginecache.storage import folder as root_module
from enginecache.storage import marker
from enginecache.storage.durable import make_folder
from enginecache.storage.folder import FOLDERS, Root

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="probe: not root, so no other user can be")
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="probe: permissions do not bind the root user")


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o777])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(root: Path) -> set[int]:
    """Of the root and its folders."""
    return {stat.S_IMODE(path.stat().st_mode) for path in (root, *root.iterdir()) if path.is_dir()}


def marker_mode(root: Path) -> int:
    return stat.S_IMODE((root / marker.NAME).stat().st_mode)


def times(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (root, *root.rglob("*"))}


def test_open_makes_every_folder_private_under_any_umask(tmp_path, umask):
    root = Root.open(tmp_path / "cache")
    assert sorted(path.name for path in root.path.iterdir()) == sorted((marker.NAME, *FOLDERS))
    assert modes(root.path) == {0o700}
    assert marker_mode(root.path) == 0o400


def test_open_makes_a_shared_root_for_the_group_under_any_umask(tmp_path, umask):
    assert modes(Root.open(tmp_path / "cache", "group").path) == {0o2770}
    assert marker_mode(tmp_path / "cache") == 0o440


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


@pytest.mark.parametrize("open_root", [Root.open, Root.find])
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
@pytest.mark.parametrize("open_root", [Root.open, Root.find])
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


@pytest.mark.parametrize("open_root", [Root.open, Root.find])
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


@pytest.mark.parametrize("exists", [True, False])
def test_find_makes_nothing_where_no_cache_is(tmp_path, exists):
    if exists:
        (tmp_path / "cache").mkdir()
    before = times(tmp_path)
    root = Root.find(tmp_path / "cache", "group")
    assert (root.path, root.is_made, root.is_shared) == (tmp_path / "cache", False, True)
    assert times(tmp_path) == before


def test_a_root_that_another_process_makes_is_seen_by_the_next_look(tmp_path):
    root = Root.find(tmp_path / "cache")
    Root.open(tmp_path / "cache", "group")
    assert not root.is_made
    root.look()
    assert (root.is_made, root.is_shared) == (True, True)
    assert root.make() is False


def test_make_says_of_one_of_many_calls_at_once_that_the_cache_is_new(tmp_path):
    for name in ("missing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        start = threading.Barrier(8)

        def make(name=name, start=start):
            root = Root.find(tmp_path / name)
            start.wait()
            return root.make()

        with ThreadPoolExecutor(8) as pool:
            assert sum(each.result() for each in [pool.submit(make) for _ in range(8)]) == 1
        assert {path.name for path in (tmp_path / name).iterdir()} == {marker.NAME, *FOLDERS}
    assert {path.name for path in tmp_path.iterdir()} == {"missing", "empty"}


@pytest.mark.parametrize("length", [241, 255])
def test_the_longest_name_that_the_file_system_takes_is_used(tmp_path, length):
    assert Root.open(tmp_path / ("d" * length)).tmp.is_dir()


def test_a_name_that_is_too_long_is_an_error(tmp_path):
    for method in (Root.find, Root.open):
        with pytest.raises(StoreError, match="cannot be used"):
            method(tmp_path / ("d" * 300))


# Owners: see the table in enginecache/storage/folder.py


@pytest.fixture
def open_folder():
    """A folder that other users reach: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def give(path: Path, user: int, group: int, mode: int) -> None:
    for each in (*path.rglob("*"), path):
        os.chown(each, user, group, follow_symlinks=False)
        each.chmod(mode)


ALICE, BOB, TEAM = 70001, 70002, 70009
DIGEST = "ab" * 32


@needs_root
@pytest.mark.parametrize(
    ("owner", "group", "mode", "user", "is_used"),
    [
        (ALICE, ALICE, 0o700, ALICE, True),
        (ALICE, ALICE, 0o755, BOB, False),
        (ALICE, TEAM, 0o2770, BOB, True),  # an init container and a server
        (ALICE, TEAM, 0o2775, BOB, True),
        (ALICE, TEAM, 0o770, BOB, False),  # not setgid: what is made there is not the group's
        (ALICE, TEAM, 0o2750, BOB, False),
        (ALICE, ALICE, 0o2775, BOB, False),  # not of its group
        (ALICE, ALICE, 0o700, 0, False),
        (ALICE, 0, 0o2770, 0, True),
        (65534, 65534, 0o755, BOB, False),
        (65534, TEAM, 0o2770, BOB, True),
        (0, 0, 0o755, BOB, True),  # an image that root filled
        (0, TEAM, 0o2770, BOB, True),  # Kubernetes with fsGroup
        (0, TEAM, 0o775, BOB, True),  # OpenShift: any user, of one group
        (0, TEAM, 0o2777, BOB, False),
    ],
)
@pytest.mark.parametrize("method", ["find", "open"])
def test_who_owns_a_root_decides_whether_it_is_used(open_folder, method, owner, group, mode, user, is_used):
    path = Root.open(open_folder / "cache").path
    give(path, owner, group, mode)
    found = as_user(user, TEAM if user else 0, lambda: bool(getattr(Root, method)(path)))
    assert found is True if is_used else str(found).startswith("StoreError: "), found


@needs_root
def test_a_root_of_another_user_is_refused_with_both_names_and_the_ways_out(open_folder):
    path = Root.open(open_folder / "cache").path
    give(path, ALICE, ALICE, 0o755)
    with pytest.raises(StoreError, match=f"cache belongs to user {ALICE}, neither to this user nor to root") as caught:
        Root.open(path)
    for way in ("chown", "--dir", "ENGINECACHE_SHARED=group", f"Run as user {ALICE}"):
        assert way in caught.value.fix


@needs_root
def test_nobody_is_advised_to_take_over_a_closed_folder_that_need_not_be_a_cache(open_folder):
    (open_folder / "home").mkdir(mode=0o700)
    refused = as_user(ALICE, ALICE, lambda: Root.find(open_folder / "home"))
    assert f"home belongs to root (0), and user {ALICE} may not look into it" in refused
    assert "chown" not in refused
    assert "--dir" in refused


@needs_root
def test_the_advice_to_share_another_users_cache_works_when_followed(open_folder):
    path = open_folder / "cache"
    StoredEngines(Config(dir=open_folder / "loads")).make()  # what another user may not be able to import
    os.chown(open_folder, ALICE, TEAM)
    assert as_user(ALICE, TEAM, lambda: Root.open(path).is_made) is True
    refused = as_user(0, TEAM, lambda: Root.open(path))
    assert f"joins the group {TEAM}" in refused
    assert f"ENGINECACHE_SHARED=group enginecache ls --dir {path}" in refused
    assert as_user(ALICE, TEAM, lambda: StoredEngines(Config(dir=path, shared="group")).root.is_shared) is True
    assert as_user(0, TEAM, lambda: Root.open(path).is_shared) is True


@needs_root
def test_the_advice_to_take_another_users_cache_over_works_when_followed(open_folder):
    path = Root.open(open_folder / "it's a cache").path
    give(path, ALICE, ALICE, 0o700)
    with pytest.raises(StoreError) as caught:
        Root.open(path)
    subprocess.run(["bash", "-c", re.search(r"`(chown .*?)`", caught.value.fix)[1]], check=True)
    assert Root.open(path).is_made


@needs_root
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_the_root_that_is_another_users_is_refused(tmp_path, name):
    root = Root.open(tmp_path / "cache")
    os.chown(root.path / name, ALICE, ALICE)
    with pytest.raises(StoreError, match=f"{name} belongs to user {ALICE}"):
        Root.open(root.path)


@needs_root
def test_a_volume_of_the_group_that_root_made_is_shared_by_its_users_where_they_ask_for_it(open_folder):
    """OpenShift: any user id, group 0, a volume that is root's and not setgid."""
    (open_folder / "cache").mkdir()
    (open_folder / "cache").chmod(0o775)
    os.chown(open_folder / "cache", 0, TEAM)
    assert as_user(ALICE, TEAM, lambda: Root.open(open_folder / "cache", "group").is_shared) is True
    assert as_user(BOB, TEAM, lambda: Root.open(open_folder / "cache").is_shared) is True


def test_a_file_system_that_keeps_no_owners_is_used(tmp_path, monkeypatch):
    """NFS with all_squash, CIFS and FUSE with ``uid=``: there is none here to mount, so the answer is given."""
    root = Root.open(tmp_path / "cache")
    real = Path.lstat

    def of_somebody(path):
        status = list(real(path))
        status[4] = ALICE
        return os.stat_result(status)

    monkeypatch.setattr(Path, "lstat", of_somebody)
    with pytest.raises(StoreError, match="belongs to"):
        Root.find(root.path)
    monkeypatch.setattr(root_module, "_owner_of_new_file", lambda _path: ALICE)
    assert Root.find(root.path).path == root.path


def test_who_owns_what_is_made_in_a_folder_is_found_and_leaves_nothing(tmp_path):
    assert root_module._owner_of_new_file(tmp_path) == os.geteuid()
    assert root_module._owner_of_new_file(tmp_path / "none") is None
    assert list(tmp_path.iterdir()) == []


# Sharing


def test_a_shared_root_stays_shared_for_who_does_not_ask_for_it(tmp_path):
    Root.open(tmp_path / "cache", "group")
    assert Root.open(tmp_path / "cache").is_shared
    assert Root.find(tmp_path / "cache").is_shared
    assert modes(tmp_path / "cache") == {0o2770}


def test_a_private_root_stays_private_for_who_does_not_ask(tmp_path):
    Root.open(tmp_path / "cache")
    assert not Root.open(tmp_path / "cache").is_shared
    assert modes(tmp_path / "cache") == {0o700}


@needs_root
def test_a_private_root_that_its_owner_shares_is_shared_with_all_that_is_in_it(tmp_path):
    root = Root.open(tmp_path / "cache")
    os.chown(root.path, 0, TEAM)
    blob = root.engines / f"ab/{DIGEST}.engine"
    blob.parent.mkdir(mode=0o700)
    for path, mode in ((blob, 0o400), (root.registry_path, 0o600), (root.uses / DIGEST, 0o600)):
        path.touch()
        path.chmod(mode)
    (root.tmp / "link").symlink_to("/etc/passwd")
    before = os.stat("/etc/passwd").st_mode
    assert Root.open(root.path, "group").is_shared
    found = {
        path.relative_to(root.path).as_posix(): stat.S_IMODE(path.lstat().st_mode) for path in root.path.rglob("*")
    }
    assert found.pop("tmp/link") == 0o777
    assert found == {
        **dict.fromkeys((*FOLDERS, "engines/ab"), 0o2770),
        f"engines/ab/{DIGEST}.engine": 0o440,
        "registry.sqlite": 0o660,
        f"uses/{DIGEST}": 0o660,
        marker.NAME: 0o440,
    }
    assert {path.lstat().st_gid for path in root.path.rglob("*") if not path.is_symlink()} == {TEAM}
    assert os.stat("/etc/passwd").st_mode == before


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal"])
@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_a_registry_that_is_no_file_of_the_cache_is_refused_and_not_opened(tmp_path, kind, suffix):
    root = Root.open(tmp_path / "cache")
    mine = tmp_path / "mine.sqlite"
    mine.touch()
    path = Path(f"{root.registry_path}{suffix}")
    if kind == "a link":
        path.symlink_to(mine)
    elif kind == "a pipe":
        os.mkfifo(path)  # which nobody writes to
    else:
        path.mkdir()
    with pytest.raises(StoreError, match="would use it as its registry") as caught:
        StoredEngines(Config(dir=root.path))
    assert f"ls -ld {path}" in caught.value.fix
    assert mine.read_bytes() == b""
    assert os.path.lexists(path)


def test_a_file_that_has_a_second_name_outside_keeps_its_mode_when_the_cache_is_shared(tmp_path):
    root = Root.open(tmp_path / "cache")
    mine = tmp_path / "mine"
    mine.touch(mode=0o604)
    mine.chmod(0o604)
    os.link(mine, root.tmp / "blob-abcdefgh")
    assert Root.open(root.path, "group").is_shared
    assert stat.S_IMODE(mine.stat().st_mode) == 0o604


def test_sharing_that_was_interrupted_is_finished_by_the_next_who_asks(tmp_path):
    root = Root.open(tmp_path / "cache")
    root.path.chmod(0o2770)
    root.locks.chmod(0o2770)  # engines/, whose mode tells, is the last
    assert not Root.find(root.path).is_shared
    assert Root.open(root.path, "group").is_shared
    assert modes(root.path) == {0o2770}


@needs_root
def test_another_users_private_root_is_not_shared_by_who_asks(open_folder):
    path = Root.open(open_folder / "cache").path
    path.chmod(0o755)
    found = as_user(ALICE, TEAM, lambda: Root.open(path, "group"))
    assert str(found).startswith("StoreError: ")
    assert "ENGINECACHE_SHARED=group" in str(found)
    assert modes(path / "engines") == {0o700}


# Making folders


def test_a_folder_appears_with_its_mode_under_any_umask(tmp_path, umask):
    for mode in (0o700, 0o2770):
        make_folder(tmp_path / f"{mode:o}", mode, tmp_path)
        assert stat.S_IMODE((tmp_path / f"{mode:o}").stat().st_mode) == mode
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_between_the_steps_leaves_no_folder_of_a_wrong_mode(tmp_path):
    """The process dies in the middle: what it was making is not there yet, and the next makes it."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom enginecache.storage import folder as root\n"
        "Path.chmod = lambda path, mode: os._exit(9)\n"
        "root.make_folder(Path(sys.argv[1]) / 'ab', 0o2770, Path(sys.argv[1]) / 'tmp')\n"
    )
    (tmp_path / "tmp").mkdir()
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    assert not (tmp_path / "ab").exists()
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "tmp").iterdir()] == [0o700]
    make_folder(tmp_path / "ab", 0o2770, tmp_path / "tmp")
    assert stat.S_IMODE((tmp_path / "ab").stat().st_mode) == 0o2770


def test_a_folder_that_another_process_filled_meanwhile_is_kept(tmp_path, monkeypatch):
    real = tempfile.mkdtemp

    def mkdtemp(**given):
        (tmp_path / "ab").mkdir()
        (tmp_path / "ab/blob").touch()
        return real(**given)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    make_folder(tmp_path / "ab", 0o700, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["ab", "blob"]


def test_a_folder_that_another_process_made_just_now_is_not_replaced_though_it_is_empty(tmp_path, monkeypatch):
    folder = tmp_path / "ab"
    folder.mkdir(0o700)
    number = folder.stat().st_ino
    monkeypatch.setattr(Path, "is_dir", lambda _: False)  # it was asked a moment before
    make_folder(folder, 0o700, tmp_path)
    assert folder.stat().st_ino == number
    assert [path.name for path in tmp_path.iterdir()] == ["ab"]


def test_folders_above_the_root_are_never_made_writable_by_everyone(tmp_path, umask):
    root = Root.open(tmp_path / "some/where/cache")
    assert [stat.S_IMODE(path.stat().st_mode) & 0o022 for path in (root.path.parent, root.path.parent.parent)] == [0, 0]


# What becomes a path


def test_a_log_has_the_name_of_its_build(tmp_path):
    assert Root(tmp_path).log_path("0123456789abcdef" * 2) == tmp_path / "logs" / f"{'0123456789abcdef' * 2}.log"


@pytest.mark.parametrize(
    "text", ["", "../../etc/passwd", "a" * 31, "a" * 33, "A" * 32, "a" * 31 + "/", "a" * 32 + "\n"]
)
def test_what_is_no_id_of_a_build_becomes_no_path(tmp_path, text):
    with pytest.raises(StoreError, match="is not the id of a build"):
        Root(tmp_path).log_path(text)


def test_no_space_for_a_root_is_reported_as_such(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StoreError, match=r"(?i)no space left on") as caught:
        Root.open(tmp_path / "cache")
    assert "Free some room" in caught.value.fix


# What the doctor says of it


def test_doctor_warns_of_a_folder_above_that_everyone_may_write(tmp_path):
    root = Root.open(tmp_path / "open/cache")
    assert list(check_parents(root.path)) == []
    root.path.parent.chmod(0o1777)
    assert list(check_parents(root.path)) == []  # sticky: nobody else can move what is ours
    root.path.parent.chmod(0o777)
    (found,) = check_parents(root.path)
    assert (found.status, found.facts["path"]) == ("warning", str(root.path.parent))
    assert "everyone may write to it" in found.text
    assert f"chmod o-w {root.path.parent}" in found.fix


@needs_root
def test_doctor_warns_of_a_folder_above_that_is_another_users(tmp_path):
    root = Root.open(tmp_path / "theirs/cache")
    os.chown(root.path.parent, ALICE, ALICE)
    (found,) = check_parents(root.path)
    assert f"user {ALICE} owns it" in found.text
    os.chown(root.path, ALICE, 0)  # who has the cache may have the folder above it
    assert list(check_parents(root.path)) == []


def folder_check(path: Path, shared: str = ""):
    return next(check for check in check_root(Config(dir=path, shared=shared)) if check.name == "folder")


def test_doctor_says_whether_a_folder_is_shared_and_who_says_so(tmp_path):
    Root.open(tmp_path / "private")
    Root.open(tmp_path / "shared", "group")
    assert folder_check(tmp_path / "private").facts["shared"] is False
    assert "private until the next get" in folder_check(tmp_path / "private", "group").text
    assert folder_check(tmp_path / "shared").facts["shared"] is True
    assert "the folder itself says so" in folder_check(tmp_path / "shared").text
    assert "the folder itself says so" not in folder_check(tmp_path / "shared", "group").text
