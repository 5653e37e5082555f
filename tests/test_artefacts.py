from __future__ import annotations

import errno
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from records import hex_of

from enginecache.errors import StoreError
from enginecache.files.digest import digest_of
from enginecache.maintenance.orphans import ARTEFACTS_KEPT_FOR_S, find_orphans
from enginecache.storage import side_caches
from enginecache.storage.folder import Root
from enginecache.storage.side_caches import Artefacts

SLOT, OTHER = hex_of("slot"), hex_of("other slot")


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def kept(root):
    return Artefacts(root, "timing-caches")


def file_of(root: Root, slot: str = SLOT, kind: str = "timing-caches") -> Path:
    return root.path / kind / slot


def data_of(kept: Artefacts, slot: str = SLOT) -> bytes | None:
    found = kept.read(slot)
    return None if found is None else found.data


@pytest.mark.parametrize("data", [b"", b"timings", b"two\nlines\n", bytes(range(256)) * 5000])
def test_what_is_put_in_a_slot_is_read_with_its_digest(kept, data):
    digest = kept.replace(SLOT, data)
    found = kept.read(SLOT)
    assert (found.data, found.digest) == (data, digest)
    assert digest == digest_of(data)


def test_an_empty_slot_holds_nothing(kept):
    assert kept.read(SLOT) is None
    assert list(kept.check()) == []


def test_the_last_bytes_count_and_leave_one_file_and_nothing_under_way(root, kept):
    for data in (b"a long first one", b"second"):
        kept.replace(SLOT, data)
    kept.replace(OTHER, b"other")
    assert (data_of(kept), data_of(kept, OTHER)) == (b"second", b"other")
    assert sorted(path.name for path in file_of(root).parent.iterdir()) == sorted([SLOT, OTHER])
    assert list(root.tmp.iterdir()) == []


def test_kinds_do_not_mix(root, kept):
    kept.replace(SLOT, b"timings")
    assert Artefacts(root, "runtime-caches").read(SLOT) is None


def test_a_slot_is_named_by_kind_and_fields_whatever_their_order(root, kept):
    names = [
        kept.slot({"a": 1, "b": [2]}),
        kept.slot({"a": 1, "b": [3]}),
        kept.slot({"a": 1}),
        Artefacts(root, "runtime-caches").slot({"a": 1, "b": [2]}),
    ]
    assert len(set(names)) == len(names)
    assert kept.slot({"b": [2], "a": 1}) == names[0]
    assert {len(name) for name in names} == {64}


@pytest.mark.parametrize("slot", ["", "../registry.sqlite", SLOT.upper(), SLOT[:-1], SLOT + "/x", SLOT + "\n"])
def test_no_other_name_becomes_a_path(kept, slot):
    with pytest.raises(StoreError, match="not the name of a slot"):
        kept.read(slot)
    with pytest.raises(StoreError, match="not the name of a slot"):
        kept.replace(slot, b"")


def test_one_flipped_bit_anywhere_makes_it_absent(root, kept):
    kept.replace(SLOT, b"timings")
    whole = file_of(root).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        file_of(root).write_bytes(damaged)
        assert kept.read(SLOT) is None, position
    file_of(root).write_bytes(whole)
    assert data_of(kept) == b"timings"


def test_cut_or_grown_anywhere_it_is_absent(root, kept):
    kept.replace(SLOT, b"timings")
    whole = file_of(root).read_bytes()
    for length in range(len(whole)):
        file_of(root).write_bytes(whole[:length])
        assert kept.read(SLOT) is None, length
    file_of(root).write_bytes(whole + b"\0")
    assert kept.read(SLOT) is None


def copy_of_another_slot(root: Root, path: Path) -> None:
    Artefacts(root, "timing-caches").replace(OTHER, b"another device's timings")
    file_of(root, OTHER).rename(path)


def copy_of_another_kind(root: Root, path: Path) -> None:
    Artefacts(root, "runtime-caches").replace(SLOT, b"kernels")
    file_of(root, SLOT, "runtime-caches").rename(path)


def link_to_a_good_one(root: Root, path: Path) -> None:
    Artefacts(root, "timing-caches").replace(SLOT, b"timings")
    path.rename(root.path / "elsewhere")
    path.symlink_to(root.path / "elsewhere")


DAMAGES = {
    "another slot's": (copy_of_another_slot, "first line"),
    "another kind's": (copy_of_another_kind, "first line"),
    "zeros of a crash": (lambda _, path: path.write_bytes(bytes(4096)), "first line"),
    "a link": (link_to_a_good_one, "cannot be read"),
    "a pipe": (lambda _, path: os.mkfifo(path), "not a file"),
    "a folder": (lambda _, path: path.mkdir(), "not a file"),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_whole_is_absent_and_found_by_a_check_and_replaced(root, kept, damage, problem):
    damage(root, file_of(root))
    assert kept.read(SLOT) is None
    ((path, text),) = kept.check()
    assert path == file_of(root)
    assert problem in text
    if path.is_dir():
        with pytest.raises(StoreError, match="nothing can be kept"):
            kept.replace(SLOT, b"new")
        assert list(root.tmp.iterdir()) == []
        return
    kept.replace(SLOT, b"new")
    assert data_of(kept) == b"new"
    assert list(kept.check()) == []


def test_a_check_passes_good_slots_and_what_has_not_the_name_of_one(root, kept):
    kept.replace(SLOT, b"timings")
    file_of(root).with_name("README").touch()
    assert list(kept.check()) == []


def test_what_is_too_large_is_neither_kept_nor_read(monkeypatch, root, kept):
    kept.replace(SLOT, b"timings")
    with monkeypatch.context() as patched:
        patched.setattr(side_caches, "MAX_BYTES", 6)
        with pytest.raises(StoreError, match="7 bytes are too many"):
            kept.replace(SLOT, b"TIMINGS")
    assert data_of(kept) == b"timings"
    monkeypatch.setattr(side_caches, "MAX_BYTES", -1000)
    assert kept.read(SLOT) is None
    assert "larger" in next(kept.check())[1]


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_full_or_failing_disk_is_an_error_that_keeps_the_old_bytes(monkeypatch, root, kept, call):
    kept.replace(SLOT, b"old")

    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(side_caches.os, call, fail)
        with pytest.raises(StoreError, match="No space left") as caught:
            kept.replace(SLOT, b"new")
    assert "doctor" in caught.value.fix
    assert data_of(kept) == b"old"
    assert list(root.tmp.iterdir()) == []


def test_where_nothing_can_be_written_it_is_still_read(monkeypatch, root, kept):
    kept.replace(SLOT, b"timings")
    root.tmp.rmdir()

    def refuse(*_args, **_how):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(side_caches.os, "utime", refuse)
    assert data_of(kept) == b"timings"
    with pytest.raises(StoreError, match="nothing can be kept"):
        kept.replace(SLOT, b"new")
    assert data_of(kept) == b"timings"


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
@pytest.mark.parametrize(("shared", "modes"), [("", (0o600, 0o700)), ("group", (0o660, 0o2770))])
def test_modes_are_those_of_files_that_change_under_any_umask(tmp_path, umask, shared, modes):
    before = os.umask(umask)
    try:
        root = Root.open(tmp_path / "cache", shared)
        Artefacts(root, "runtime-caches").replace(SLOT, b"kernels")
    finally:
        os.umask(before)
    path = file_of(root, kind="runtime-caches")
    assert tuple(stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)) == modes


def test_readers_see_old_or_new_bytes_while_it_is_replaced(kept):
    kept.replace(SLOT, b"0" * 50_000)
    is_over = threading.Event()
    seen = []

    def read():
        while not is_over.is_set():
            seen.append(data_of(kept))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 60):
        kept.replace(SLOT, b"%d" % (number % 10) * 50_000)
    is_over.set()
    reader.join()
    assert None not in seen
    assert {(len(data), len(set(data))) for data in seen} == {(50_000, 1)}


def test_it_is_garbage_when_it_was_long_unused_and_reading_is_use(root, kept):
    kept.replace(SLOT, b"timings")
    kept.replace(OTHER, b"other")
    past = time.time() - 1000
    for slot in (SLOT, OTHER):
        os.utime(file_of(root, slot), (past, past))
    kept.read(SLOT)
    assert file_of(root).stat().st_mtime > past + 900
    assert file_of(root, OTHER).stat().st_mtime == pytest.approx(past)

    def found(age_s):
        return [item.path for item in find_orphans(root, lambda _: False, 0.0, now=time.time() + age_s)[0]]

    assert found(ARTEFACTS_KEPT_FOR_S - 60) == []
    assert found(ARTEFACTS_KEPT_FOR_S + 60) == sorted([file_of(root), file_of(root, OTHER)])
