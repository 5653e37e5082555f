"""For every command and state of the folder: what enginecache did not write stays, and reading makes nothing."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from records import hex_of

from enginecache.config import Config
from enginecache.storage import marker
from enginecache.storage.folder import FOLDERS, Root
from enginecache.storage.names import owned

KEY = "ab"
READING = {
    "ls": 0,
    "ls -q": 0,
    "ls --json": 0,
    "stats": 0,
    "show KEY": 3,
    "path KEY": 3,
    "explain MODEL --dim batch=4": 0,
    "get MODEL --dim batch=4 --offline": 3,
    "verify": 0,
    "verify --deep": 0,
    "doctor": None,
    "db current": 0,
    "db check": 6,
    "prune --dry-run": 0,
    "prune --max-size 1KiB --dry-run": 0,
    "rm KEY --dry-run": 3,
}
"""With the exit code where there is no cache yet; that of doctor depends on the GPUs."""

WRITING = {
    "get MODEL --dim batch=4": 0,
    "get MODEL --dim batch=4 --rebuild": 0,
    "prune --max-size 1KiB --yes": 0,
    "verify --repair --yes": 0,
    "verify --deep --repair --yes": 0,
    "pin KEY": 3,
    "unpin KEY": 3,
    "rm KEY --yes": 3,
    "db upgrade": 0,
}
MAKING = {"get MODEL --dim batch=4", "get MODEL --dim batch=4 --rebuild", "db upgrade"}

ALWAYS = ("get", "explain", "db upgrade")
"""Commands that take a folder that does not exist, and is named."""

Look = dict[str, tuple[object, ...]]


def look(folder: Path) -> Look:
    """Return the state of everything in a folder, and of the folder itself."""
    return {str(path): look_at(path) for path in (folder, *folder.rglob("*"))}


def look_at(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_ino, content


def missing(_folder: Path) -> None:
    """There is nothing."""


def empty(folder: Path) -> None:
    folder.mkdir(mode=0o755)


def new_volume(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / "lost+found").mkdir(mode=0o700)
    (folder / ".snapshot").mkdir()


def left_by_a_death(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / ".enginecache-a1_b2c3d").write_text("Sig")


def only_marked(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    marker.write_marker(folder, 0o400)


def half_made(folder: Path) -> None:
    only_marked(folder)
    for name in FOLDERS[:3]:
        (folder / name).mkdir(mode=0o700)


def without_registry(folder: Path) -> None:
    Root.open(folder)


def project(folder: Path) -> None:
    """Another's folder, with the names that a cache has."""
    for name in (
        "engines/yolo.plan",
        "engines/ab/README",
        "tmp/cache/a",
        "logs/app.log",
        "locks/x.lock",
        "src/main.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    (folder / f"engines/ab/{hex_of('x')}.engine").write_text("precious")
    (folder / "link").symlink_to("src")


def others_cache(folder: Path) -> None:
    folder.mkdir()
    (folder / marker.NAME).write_text(f"{marker.SIGNATURE}\n# made by cargo\n")
    (folder / "debug").mkdir()


UNMADE = (missing, empty, new_volume, left_by_a_death, only_marked, half_made, without_registry)
FOREIGN = (project, others_cache)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the environment names, and that does not exist."""
    monkeypatch.setenv("ENGINECACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def words(model: Path) -> Callable[[str, str], list[str]]:
    return lambda line, key: [{"MODEL": str(model), "KEY": key}.get(word, word) for word in line.split()]


@pytest.mark.parametrize("line", [*READING, *WRITING])
@pytest.mark.parametrize("state", FOREIGN, ids=lambda state: state.__name__)
def test_a_folder_that_is_no_cache_is_refused_by_every_command_and_stays_as_it_is(cli, folder, words, state, line):
    state(folder)
    before = look(folder.parent)
    found = cli(*words(line, KEY))
    assert look(folder.parent) == before
    shutil.rmtree(folder)
    assert found.code != 0
    assert "is not a cache of enginecache's and is not empty" in found.err + found.out
    assert "nothing in it is touched" in found.err + found.out


@pytest.mark.parametrize("line", READING)
@pytest.mark.parametrize("state", UNMADE, ids=lambda state: state.__name__)
def test_what_only_reads_makes_nothing_wherever_no_cache_is_yet(cli, folder, words, state, line):
    state(folder)
    before = look(folder.parent)
    found = cli(*words(line, KEY))
    assert look(folder.parent) == before
    assert "Traceback" not in found.err
    if state is missing and READING[line] is not None and not line.startswith(ALWAYS):
        assert found.code == 2  # the variable that names it may be mistyped
        assert f"ENGINECACHE_DIR: there is no cache in {folder}" in found.err
    elif READING[line] is not None:
        assert found.code == READING[line], found.err


@pytest.mark.parametrize("line", WRITING)
@pytest.mark.parametrize("state", UNMADE, ids=lambda state: state.__name__)
def test_what_writes_makes_a_cache_only_where_it_stores_something(cli, folder, words, state, line):
    state(folder)
    before = look(folder.parent)
    found = cli(*words(line, KEY))
    code = 2 if state is missing and not line.startswith(ALWAYS) else WRITING[line]
    assert found.code == code, found.err
    is_made = line in MAKING and code == 0
    made = "made a new cache in " + str(folder)
    assert (made in found.err) == (is_made and state in {missing, empty, new_volume, left_by_a_death})
    if state in {missing, empty, new_volume, left_by_a_death} and not is_made:
        assert look(folder.parent) == before
    if is_made:
        assert Root.find(folder).is_made
    for name in ("lost+found", ".snapshot"):
        path = folder / name
        assert str(path) not in before or look_at(path) == before[str(path)]


@pytest.mark.parametrize("line", READING)
@pytest.mark.parametrize("named", ["flag", "variable", "settings", "default"])
def test_a_missing_folder_is_made_by_no_reading_command_however_it_was_named(
    cli, folder, words, monkeypatch, tmp_path, line, named
):
    if named != "variable":
        monkeypatch.delenv("ENGINECACHE_DIR")
    if named == "settings":
        (tmp_path / "config.toml").write_text(f'dir = "{folder}"', encoding="utf-8")
        monkeypatch.setenv("ENGINECACHE_CONFIG", str(tmp_path / "config.toml"))
    before = look(tmp_path)
    found = cli(*words(line, KEY), *(["--dir", folder] if named == "flag" else []))
    assert look(tmp_path) == before
    if READING[line] is None:
        return
    is_refused = named != "default" and not line.startswith(ALWAYS)
    assert found.code == (2 if is_refused else READING[line]), found.err
    if not is_refused:
        where = tmp_path / "xdg-cache/enginecache" if named == "default" else folder
        assert f"there is no cache in {where} yet" in found.out + found.err
    if is_refused:
        by = {"flag": "--dir", "variable": "ENGINECACHE_DIR", "settings": f"dir in {tmp_path / 'config.toml'}"}
        assert f"{by[named]}: there is no cache in {folder}" in found.err


@pytest.mark.parametrize("line", [*READING, *WRITING])
def test_a_users_file_in_a_cache_survives_every_command(cli, cache, folder, words, model, monkeypatch, line):
    key = cache.get(model, dims={"batch": 4}).key
    for name in ("engines/README", "engines/ab/notes", "tmp/notes", "quarantine/x.engine", "logs/app.log", "uses/x"):
        (folder / name).parent.mkdir(mode=0o700, exist_ok=True)
        (folder / name).write_text("precious")
        (folder / name).chmod(0o644)
    (folder / "engines/cd").symlink_to(folder.parent)
    (folder / f"tmp/blob-{'a' * 8}").symlink_to(folder / "engines/README")
    (folder / "timing-caches/mine").mkdir(mode=0o755)
    for path in folder.rglob("*"):
        os.utime(path, (10, 10), follow_symlinks=False)
    ours = {*dict(owned(cache.root.path)), str(folder)}
    before = {path: seen for path, seen in look(folder).items() if path not in ours}
    assert len(before) >= 9
    monkeypatch.setenv("ENGINECACHE_GRACE", "0")
    found = cli(*words(line, key))
    assert found.code in {0, 4} or line == "doctor", found.err
    after = look(folder)
    assert {path: after.get(path) for path in before} == before


def test_get_says_where_it_makes_a_new_cache_and_only_then(cli, folder, model):
    first = cli("get", model, "--dim", "batch=4", "--json")
    assert f"made a new cache in {folder}\n" in first.err
    assert first.err.index("made a new cache") < first.err.index("built in")  # at once, not after a long build
    assert first.err.count("made a new cache") == 1
    assert {"code": "new_cache", "text": f"made a new cache in {folder}"} in first.json["reasons"]
    again = cli("get", model, "--dim", "batch=8", "--json")
    assert "made a new cache" not in again.err + again.out


def test_a_quiet_get_makes_a_cache_without_a_word(cli, folder, model):
    assert cli("get", model, "--dim", "batch=4", "-q").err == ""
    assert Root.find(folder).is_made


def test_a_build_that_fails_has_said_that_it_made_a_cache(cli, folder, model, builder):
    def fail(_request):
        raise KeyboardInterrupt

    builder.before = fail
    found = cli("get", model, "--dim", "batch=4")
    assert found.code == 130
    assert f"made a new cache in {folder}" in found.err


def test_a_request_that_cannot_be_built_makes_no_cache(cli, folder, model):
    assert cli("get", model).code == 2  # a dynamic input without a profile
    assert not folder.exists()


def test_the_library_makes_nothing_until_something_is_stored(tmp_path, open_cache, model):
    folder = tmp_path / "lazy"
    cache = open_cache(folder=folder, is_made=False)
    assert cache.entries() == []
    assert cache.misses() == []
    assert cache.plan_prune().is_empty
    assert cache.verify(deep=True, repair=True).is_clean
    assert cache.explain(model, dims={"batch": 4}).verdict == "miss"
    assert not folder.exists()
    assert cache.get(model, dims={"batch": 4}).outcome == "built"
    assert [used.record.key for used in cache.entries()]


def test_a_cache_that_was_opened_early_sees_what_another_process_made(tmp_path, open_cache, model):
    early = open_cache(folder=tmp_path / "late", is_made=False)
    open_cache(folder=tmp_path / "late", shared="group").get(model, dims={"batch": 4})
    assert len(early.entries()) == 1
    assert early.get(model, dims={"batch": 4}).outcome == "hit"
    assert early.root.is_shared


def test_doctor_warns_of_a_named_folder_that_does_not_exist(cli, folder):
    rows = {row[1]: row for row in cli("doctor").rows}
    assert rows["folder"][0] == "warning"
    assert "named by ENGINECACHE_DIR" in rows["folder"][2]
    assert not folder.exists()
    assert Config.load().dir == folder
