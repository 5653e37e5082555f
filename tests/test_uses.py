from __future__ import annotations

import datetime as dt
import os
import stat

import pytest
from records import hex_of

from enginecache.storage.folder import Root
from enginecache.storage.last_used import UseLog

KEY = hex_of("key")


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def uses(root):
    return UseLog(root)


def test_no_use_was_noted_at_first(uses):
    assert uses.last_used(KEY) is None


def test_a_touch_is_a_use_now(uses, root):
    before = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=0.1)
    uses.touch(KEY)
    assert before <= uses.last_used(KEY) <= dt.datetime.now(dt.timezone.utc)
    assert UseLog(root).last_used(KEY) == uses.last_used(KEY)


def test_a_later_touch_is_a_later_use(uses, root):
    uses.touch(KEY)
    os.utime(root.uses / KEY, (1000, 1000))
    assert uses.last_used(KEY) == dt.datetime(1970, 1, 1, 0, 16, 40, tzinfo=dt.timezone.utc)
    uses.touch(KEY)
    assert uses.last_used(KEY).year > 2000


def test_a_forgotten_entry_has_no_use_and_forgetting_again_is_no_error(uses):
    uses.touch(KEY)
    uses.forget(KEY)
    uses.forget(KEY)
    assert uses.last_used(KEY) is None


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize(("shared", "mode"), [("", 0o600), ("group", 0o660)])
def test_notes_have_the_roots_file_mode(tmp_path, umask, shared, mode):
    root = Root.open(tmp_path / "another", shared)
    before = os.umask(umask)
    try:
        UseLog(root).touch(KEY)
    finally:
        os.umask(before)
    assert stat.S_IMODE((root.uses / KEY).stat().st_mode) == mode


def test_a_folder_that_cannot_be_written_keeps_serving(uses, root):
    root.uses.rmdir()
    root.uses.touch()
    uses.touch(KEY)
    uses.forget(KEY)
    assert uses.last_used(KEY) is None


@pytest.mark.parametrize("key", ["../victim", "", ".", "a" * 63, KEY.upper()])
def test_what_is_no_key_never_becomes_a_path(uses, root, key):
    victim = root.path / "victim"
    victim.touch()
    before = sorted(root.path.rglob("*"))
    uses.touch(key)
    uses.forget(key)
    assert uses.last_used(key) is None
    assert sorted(root.path.rglob("*")) == before


@pytest.mark.parametrize("shared", ["", "group"])
@pytest.mark.parametrize("link", ["note", "dangling note", "folder"])
def test_a_link_leads_no_use_out_of_the_folder(tmp_path, shared, link):
    root = Root.open(tmp_path / "another", shared)
    outside = tmp_path / "outside"
    outside.mkdir()
    target = outside / KEY
    if link != "dangling note":
        target.touch(mode=0o600)
        os.utime(target, (1000, 1000))
    if link == "folder":
        root.uses.rmdir()
        root.uses.symlink_to(outside)
    else:
        (root.uses / KEY).symlink_to(target)
    before = [(path.name, path.stat().st_mtime, path.stat().st_mode) for path in outside.iterdir()]
    UseLog(root).touch(KEY)
    UseLog(root).age_those_ahead()
    assert [(path.name, path.stat().st_mtime, path.stat().st_mode) for path in outside.iterdir()] == before
