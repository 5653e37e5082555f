"""A folder is a cache, or as good as empty, or it is refused and stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from enginecache.errors import StoreError
from enginecache.storage import durable, marker
from enginecache.storage.folder import FOLDERS, Root
from enginecache.storage.marker import is_marked, write_marker


def test_the_marker_is_the_standard_tag_with_a_line_of_enginecaches(tmp_path):
    assert write_marker(tmp_path, 0o400)
    lines = (tmp_path / "CACHEDIR.TAG").read_bytes().split(b"\n")
    assert lines[0] == b"Signature: 8a477f597d28d172789f06886806bc55"
    assert lines[1] == b"# enginecache cache folder, format 1"
    assert is_marked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["CACHEDIR.TAG"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="probe: no tar")
def test_backup_tools_leave_out_what_is_in_a_cache(tmp_path):
    Root.open(tmp_path / "cache")
    (tmp_path / "cache/engines/blob").touch()
    tar = ["tar", "--exclude-caches", "-cf", "-", "-C", tmp_path, "cache"]
    listed = subprocess.run(
        ["tar", "-t"],
        input=subprocess.run(tar, capture_output=True, check=True).stdout,
        capture_output=True,
        check=True,
    ).stdout
    assert listed.split() == [b"cache/", b"cache/CACHEDIR.TAG"]


@pytest.mark.parametrize(
    "names", [[], ["lost+found/"], [".snapshot/"], ["lost+found/", ".snapshot/"], [".enginecache-a1_b2c3d"]]
)
def test_an_empty_folder_and_a_new_volume_become_a_cache(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert not is_marked(tmp_path)
    assert Root.open(tmp_path).is_made
    assert {path.name for path in tmp_path.iterdir()} == {marker.NAME, *FOLDERS, *(name.strip("/") for name in names)}


FOREIGN = {
    "a file": lambda folder: (folder / "main.py").touch(),
    "a hidden file": lambda folder: (folder / ".gitignore").touch(),
    "folders of the same names": lambda folder: [(folder / name).mkdir() for name in FOLDERS],
    "a registry": lambda folder: (folder / "registry.sqlite").touch(),
    "another program's cache": lambda folder: (folder / marker.NAME).write_text(f"{marker.SIGNATURE}\n# by cargo\n"),
    "an empty tag": lambda folder: (folder / marker.NAME).touch(),
    "a cut tag": lambda folder: (folder / marker.NAME).write_text(marker.TEXT[:60]),
    "a tag without its first line": lambda folder: (folder / marker.NAME).write_text(marker.TEXT.split("\n")[1]),
    "a tag of a format that never was": lambda folder: (folder / marker.NAME).write_text(
        marker.TEXT.replace("format 1", "format 0")
    ),
    "a tag that is a folder": lambda folder: (folder / marker.NAME).mkdir(),
    "a tag that is a pipe": lambda folder: os.mkfifo(folder / marker.NAME),
    "a tag that is a link": lambda folder: (folder / marker.NAME).symlink_to("other"),
    "a name like a temporary one": lambda folder: (folder / ".enginecache-notes").touch(),
}


@pytest.mark.parametrize("fill", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("method", [Root.find, Root.open])
def test_a_folder_that_holds_something_else_is_refused_before_anything_is_made(tmp_path, fill, method):
    fill(tmp_path)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(StoreError, match="is not a cache of enginecache's and is not empty") as caught:
        method(tmp_path)
    assert f"such as {tmp_path / 'enginecache'}" in caught.value.fix
    assert sorted(os.walk(tmp_path)) == before
    assert Root.open(tmp_path / "enginecache").is_made  # the advice


def test_a_later_format_is_refused_with_the_way_out(tmp_path):
    (tmp_path / marker.NAME).write_text(marker.TEXT.replace("format 1", "format 2"))
    with pytest.raises(StoreError, match="is a cache of format 2, made by a newer enginecache") as caught:
        Root.open(tmp_path)
    assert "Upgrade enginecache" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == [marker.NAME]


def test_further_lines_in_the_marker_are_a_later_releases_and_are_let_be(tmp_path):
    (tmp_path / marker.NAME).write_text(marker.TEXT + "# more\n")
    assert is_marked(tmp_path)


def test_the_advice_for_a_lost_marker_brings_the_cache_back(tmp_path):
    folder = tmp_path / "it's mine"
    root = Root.open(folder)
    root.registry_path.touch()
    (folder / marker.NAME).unlink()
    with pytest.raises(StoreError) as caught:
        Root.open(folder)
    command = caught.value.fix.partition("printf ")[2]
    subprocess.run(["bash", "-c", f"printf {command}"], check=True)
    assert Root.open(folder).is_made


def die_in_making(path: Path, shared: str, step: int) -> bool:
    """Make a cache in a process that ends at a step; whether it came that far."""
    child = os.fork()
    if not child:
        count_down(step)
        Root.open(path, shared)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def count_down(left: int) -> None:
    """End this process in the place of the call that comes after so many of those that change a file system."""

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "fchmod", "mkdir", "open", "chmod", "rename", "write", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    durable.rename_to_new = marker.rename_to_new = counted(durable.rename_to_new)


@pytest.mark.parametrize(
    ("exists", "shared"),
    [
        (False, ""),
        (True, "group"),
        pytest.param(True, "", marks=pytest.mark.reliability),
        pytest.param(False, "group", marks=pytest.mark.reliability),
    ],
)
def test_a_death_at_any_step_of_the_making_leaves_a_folder_that_the_next_call_accepts(tmp_path, exists, shared):
    for step in range(200):
        path = tmp_path / str(step) / "cache"
        path.parent.mkdir()
        if exists:
            path.mkdir(mode=0o755)
        has_died = die_in_making(path, shared, step)
        names = {item.name for item in path.iterdir()} if path.exists() else set()
        assert marker.NAME in names or not names & set(FOLDERS)  # nothing else is made before it
        root = Root.open(path, shared)
        assert (root.is_made, root.is_shared) == (True, shared == "group")
        if not has_died:
            break
    assert step > 10


def test_the_marker_is_durable_before_anything_else_is_made(tmp_path, monkeypatch):
    steps = []
    real = {name: getattr(os, name) for name in ("fsync", "mkdir")}

    def fsync(descriptor):
        steps.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        real["fsync"](descriptor)

    def mkdir(path, *args, **kwargs):
        steps.append(("mkdir", Path(path)))
        real["mkdir"](path, *args, **kwargs)

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "mkdir", mkdir)
    Root.open(tmp_path / "cache")
    kinds = [kind for kind, _ in steps]
    assert kinds[:3] == ["fsync", "fsync", "mkdir"]
    assert steps[0][1].name.startswith(".enginecache-")
    assert steps[1][1] == tmp_path / "cache"
