from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from mounts import small_disk

from enginecache.errors import StoreError
from enginecache.files.fingerprint import Fingerprint
from enginecache.pipeline.copy import export_plan


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"vtrt" + os.urandom(5 << 20))
    path.chmod(0o400)
    return path


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_the_copy_has_the_bytes_and_is_no_link(plan, out):
    before = Fingerprint.of_path(plan)
    export_plan(plan, out / "plan", plan.parent / "cache")
    assert (out / "plan").read_bytes() == plan.read_bytes()
    assert (out / "plan").stat().st_ino != plan.stat().st_ino
    assert Fingerprint.of_path(plan) == before
    assert names_in(out) == ["plan"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o666)])
def test_the_copys_mode_is_the_callers_umask(plan, out, umask, mode):
    before = os.umask(umask)
    try:
        export_plan(plan, out / "plan", plan.parent / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "plan").stat().st_mode) == mode


def test_a_change_of_the_copy_does_not_reach_the_plan(plan, out):
    data = plan.read_bytes()
    export_plan(plan, out / "plan", plan.parent / "cache")
    with (out / "plan").open("r+b") as copy:
        copy.write(b"changed")
    assert plan.read_bytes() == data


def test_an_older_copy_is_replaced_and_its_readers_keep_it(plan, out):
    (out / "plan").write_bytes(b"vtrt old")
    with (out / "plan").open("rb") as reader:
        export_plan(plan, out / "plan", plan.parent / "cache")
        assert reader.read() == b"vtrt old"
    assert (out / "plan").read_bytes() == plan.read_bytes()


def test_readers_see_the_old_copy_or_the_whole_new_one(plan, out):
    sizes = set()
    done = threading.Event()
    (out / "plan").write_bytes(b"vtrt old")

    def watch():
        while not done.is_set():
            sizes.add((out / "plan").stat().st_size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        export_plan(plan, out / "plan", plan.parent / "cache")
    done.set()
    watcher.join()
    assert sizes <= {8, plan.stat().st_size}


def test_a_symbolic_link_is_replaced_and_not_followed(plan, out):
    (out / "file").write_bytes(b"untouched")
    (out / "plan").symlink_to("file")
    export_plan(plan, out / "plan", plan.parent / "cache")
    assert (out / "file").read_bytes() == b"untouched"
    assert not (out / "plan").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_file_is_not_replaced(plan, out, kind):
    target = out / "plan"
    if kind == "folder":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.symlink_to("/dev/null")
    with pytest.raises(StoreError, match="not a regular file") as caught:
        export_plan(plan, target, plan.parent / "cache")
    assert "-o" in caught.value.fix
    assert names_in(out) == ["plan"]
    assert not target.is_file()


def test_a_file_that_was_written_there_during_the_build_stays(plan, out):
    (out / "plan").write_bytes(b"somebody's notes")
    with pytest.raises(StoreError, match="not a TensorRT plan"):
        export_plan(plan, out / "plan", plan.parent / "cache")
    assert (out / "plan").read_bytes() == b"somebody's notes"
    assert names_in(out) == ["plan"]


def test_a_missing_folder_or_plan_is_an_error_and_leaves_nothing(plan, out):
    with pytest.raises(StoreError, match="No such file"):
        export_plan(plan, out / "absent/plan", plan.parent / "cache")
    with pytest.raises(StoreError, match="No such file"):
        export_plan(out / "absent", out / "plan", plan.parent / "cache")
    assert names_in(out) == []


def test_nothing_is_put_into_the_cache_folder_or_over_a_device(plan, out):
    kept = plan.read_bytes()
    with pytest.raises(StoreError, match="it lies in the cache folder"):
        export_plan(plan, plan, plan.parent)
    with pytest.raises(StoreError, match="it lies in /dev"):
        export_plan(plan, Path("/dev/stdout"), out)
    assert plan.read_bytes() == kept
    assert not Path("/dev/stdout").is_file() or Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize("length", [241, 255])
def test_the_longest_name_that_the_file_system_takes_is_a_target(tmp_path, length):
    (tmp_path / "plan").write_bytes(b"plan")
    export_plan(tmp_path / "plan", tmp_path / ("d" * length), tmp_path / "cache")
    assert (tmp_path / ("d" * length)).read_bytes() == b"plan"
    assert len(list(tmp_path.iterdir())) == 2


def test_full_file_system_is_named_with_what_is_free(plan):
    with small_disk(1 << 20) as disk:
        with pytest.raises(StoreError, match="No space left on device") as caught:
            export_plan(plan, disk / "m.plan", plan.parent / "cache")
        assert names_in(disk) == []
        assert f"the file system of {disk} is full" in caught.value.what
        assert f"`df {disk}`" in caught.value.fix
