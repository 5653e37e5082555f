"""A root that cannot be written serves what is in it, and says of the rest that it cannot be stored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeBuilder, fake_cache
from mounts import read_only
from users import as_user

from enginecache.cli.main import main
from enginecache.errors import NotCachedError, RegistryError, StoreError
from enginecache.files import fingerprint

ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command in this process; its exit code, and what it printed on standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["enginecache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def cache(open_cache, model):
    """With one engine in it, old enough that its fingerprint is remembered."""
    cache = open_cache()
    cache.get(model, **ASK)
    return cache


def snapshot(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {p: (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in (folder, *folder.rglob("*")) for s in [p.lstat()]}


def test_a_hit_is_served_from_a_read_only_file_system_and_nothing_is_written(cache, model):
    with read_only(cache.root.path):
        before = snapshot(cache.root.path)
        reader = fake_cache(cache.root.path)
        entry = reader.get(model, **ASK)
        assert (entry.outcome, entry.path.read_bytes()[:4]) == ("hit", b"vtrt")
        assert [reader.explain(model, **ask).verdict for ask in (ASK, WIDER)] == ["hit", "miss"]
        assert reader.find_intact(entry.key[:8]).key == entry.key
        assert snapshot(cache.root.path) == before


@pytest.mark.parametrize("options", [WIDER, {**ASK, "rebuild": True}])
def test_a_miss_on_a_read_only_file_system_says_so_before_any_build(cache, model, options):
    builder = FakeBuilder()
    with read_only(cache.root.path):
        reader = fake_cache(cache.root.path, builder)
        with pytest.raises(StoreError, match="cannot be written by this user, so an engine") as caught:
            reader.get(model, **options)
    assert (caught.value.exit_code, builder.count) == (1, 0)
    assert "--dir" in caught.value.fix


def test_an_offline_miss_is_no_more_than_a_miss_there(cache, model):
    with read_only(cache.root.path), pytest.raises(NotCachedError):
        cache.get(model, **WIDER, offline=True)


@pytest.mark.parametrize("command", ["ls", "show", "verify", "path", "stats"])
def test_reading_commands_work_on_a_read_only_file_system(cache, cli, command):
    key = cache.entries()[0].record.key
    with read_only(cache.root.path):
        code, out, err = cli(command, *([key] if command in {"show", "path"} else []), "--dir", cache.root.path)
    assert code == 0, err
    assert command == "verify" or out


@pytest.mark.parametrize(("command", "code"), [("pin", 6), ("unpin", 6), ("rm", 1)])
def test_writing_commands_say_on_a_read_only_file_system_what_to_do(cache, cli, command, code):
    key = cache.entries()[0].record.key
    with read_only(cache.root.path):
        found, out, err = cli(command, key, *(["--yes"] if command == "rm" else []), "--dir", cache.root.path)
    assert (found, out) == (code, "")
    assert re.search("writable|for writing", err)
    assert "--dir" in err


def test_doctor_says_that_the_folder_is_read_only(cache, cli):
    with read_only(cache.root.path):
        _, out, _ = cli("doctor", "--dir", cache.root.path)
    assert "read-only: hits are served, nothing can be built" in out


def test_a_registry_that_a_crash_left_in_a_read_only_folder_is_told_as_that(cache, cli, model):
    """A rollback journal must be played back, which needs a folder that can be written."""
    path = cache.root.registry_path
    crash = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA cache_size=1')\n"
        "connection.execute('BEGIN IMMEDIATE')\n"
        "connection.execute('CREATE TABLE junk (a)')\n"
        "connection.executemany('INSERT INTO junk VALUES (?)', [('x' * 2000,)] * 500)\n"
        "os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", crash, path], check=False)
    assert Path(f"{path}-journal").stat().st_size > 0
    with read_only(cache.root.path):
        with pytest.raises(RegistryError) as caught:
            cache.entries()
        code, out, err = cli("get", model, "--dim", "batch=4", "--target", "sm_89", "--dir", cache.root.path)
    assert "registry.sqlite-journal" in caught.value.fix
    assert "must be able to write" in caught.value.fix
    assert (code, out) == (6, "")
    assert "registry.sqlite is unavailable" in err
    assert cli("ls", "--dir", cache.root.path)[0] == 0  # once it can be written, it is repaired
    with read_only(cache.root.path):
        assert len(cache.entries()) == 1


def memos_of_user(folder: Path) -> Path:
    return folder / "enginecache/files.sqlite"


def test_what_a_read_only_cache_finds_in_files_is_kept_in_the_users_runtime_folder(cache, model, tmp_path, monkeypatch):
    runtime = tmp_path / "runtime"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 0)
    with read_only(cache.root.path):
        before = snapshot(cache.root.path)
        assert fake_cache(cache.root.path).get(model, **ASK).outcome == "hit"
        assert memos_of_user(runtime).is_file()
        assert (runtime / "enginecache").stat().st_mode & 0o777 == 0o700
        with pytest.MonkeyPatch.context() as patch:  # neither the model nor the plan is read again
            patch.setattr("enginecache.pipeline.model_memo.identify", None)
            patch.setattr("enginecache.storage.blobs.Blobs.read", None)
            assert fake_cache(cache.root.path).get(model, **ASK).outcome == "hit"
        assert snapshot(cache.root.path) == before
    assert fake_cache(cache.root.path).get(model, **ASK).outcome == "hit"


@pytest.mark.parametrize("harm", ["open to others", "a link", "another user's", "no database", "cannot be made"])
def test_a_runtime_folder_that_is_not_the_users_alone_is_not_used(cache, model, tmp_path, monkeypatch, harm):
    folder = tmp_path / "runtime/enginecache"
    folder.mkdir(mode=0o700, parents=True)
    (tmp_path / "runtime").chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 0)
    if harm == "open to others":
        folder.chmod(0o777)
    elif harm == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif harm == "another user's":
        if os.geteuid():
            pytest.skip("probe: not root, so nothing can be given to another user")
        os.chown(folder, 65534, 65534)
    elif harm == "no database":
        memos_of_user(tmp_path / "runtime").write_bytes(b"not a database" * 1000)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "no/such/folder"))
    with read_only(cache.root.path):
        for _ in range(2):
            assert fake_cache(cache.root.path).get(model, **ASK).outcome == "hit"
    if harm != "no database":
        assert not list(tmp_path.rglob("files.sqlite"))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users reach: pytest's own are closed to them."""
    if os.geteuid():
        pytest.skip("probe: not root, so no other user can be")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def open_model(open_folder, model):
    path = open_folder / "model.onnx"
    path.write_bytes(model.read_bytes())
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
def test_a_user_who_may_read_and_not_write_gets_hits_and_is_told_on_a_miss(umask, open_folder, open_model):
    """An image that root filled, and a server that is nobody."""
    folder = open_folder / "cache"
    fake_cache(folder).get(open_model, **ASK)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o444)

    def read() -> list[object]:
        builder = FakeBuilder()
        cache = fake_cache(folder, builder)
        found: list[object] = [cache.get(open_model, **ASK).outcome, len(cache.entries())]
        with pytest.raises(StoreError, match="cannot be written by this user") as caught:
            cache.get(open_model, **WIDER)
        return [*found, caught.value.exit_code, builder.count]

    before = snapshot(folder)
    assert as_user(65534, 65534, read) == ["hit", 1, 1, 0]
    assert snapshot(folder) == before


@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
def test_users_of_one_group_build_for_each_other_whatever_their_umask(umask, open_folder, open_model):
    folder = open_folder / "cache"
    fake_cache(folder, shared="group").get(open_model, **ASK)

    def outcomes(*asked: int) -> list[object]:
        cache = fake_cache(folder)  # ENGINECACHE_SHARED is not set: the folder itself says that it is shared
        return [cache.root.is_shared, *(cache.get(open_model, dims={"batch": (1, 2, n)}).outcome for n in asked)]

    # Users of root's group who are not root.
    assert as_user(65534, 0, lambda: outcomes(4, 8)) == [True, "hit", "built"]
    assert as_user(65533, 0, lambda: outcomes(8, 16)) == [True, "hit", "built"]
    closed = {path: oct(path.stat().st_mode) for path in folder.rglob("*") if path.stat().st_mode & 0o040 == 0}
    assert closed == {}
    assert {path.stat().st_gid for path in folder.rglob("*")} == {0}
    assert fake_cache(folder).verify(deep=True).is_clean


@pytest.mark.parametrize("order", [(0, 65533), (65533, 0)])
def test_on_a_volume_with_fsgroup_containers_of_different_users_share_the_cache_whoever_comes_first(
    order, open_folder, open_model
):
    """Kubernetes makes the volume root's, setgid and writable by the group, and puts every container into the group."""
    volume = open_folder / "volume"
    volume.mkdir()
    (volume / "lost+found").mkdir(mode=0o700)
    os.chown(volume, 0, 2000)
    volume.chmod(0o2775)
    fake_cache(open_folder / "loads").get(open_model, **ASK)  # what another user may not be able to import

    def outcomes(*asked: int) -> list[object]:
        cache = fake_cache(volume)
        return [*(cache.get(open_model, dims={"batch": (1, 2, n)}).outcome for n in asked), cache.root.is_shared]

    assert as_user(order[0], 2000, lambda: outcomes(4)) == ["built", True]
    assert as_user(order[1], 2000, lambda: outcomes(4, 8)) == ["hit", "built", True]
    assert as_user(order[0], 2000, lambda: outcomes(8, 16)) == ["hit", "built", True]
    assert as_user(order[1], 2000, lambda: fake_cache(volume).verify(deep=True).is_clean) is True


def test_no_root_is_made_on_a_read_only_file_system(tmp_path):
    (tmp_path / "disk").mkdir()
    with read_only(tmp_path / "disk"), pytest.raises(StoreError, match="Read-only file system") as caught:
        fake_cache(tmp_path / "disk/cache").make()
    assert "--dir" in caught.value.fix
