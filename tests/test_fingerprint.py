from __future__ import annotations

import os
import time

import pytest

from enginecache.fingerprint import SETTLE_NS, Fingerprint, has_true_ctime


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def wait_for_a_tick():
    time.sleep(0.02)  # ext4's times move with the kernel's tick


def change_a_byte(path):
    path.write_bytes(b"Content")


def append(path):
    path.write_bytes(b"content+")


def replace_by_equal(path):
    path.with_name("new").write_bytes(b"content")
    path.with_name("new").rename(path)


def change_mode(path):
    path.chmod(0o400)


def link(path):
    path.with_name("link").hardlink_to(path)


def touch(path):
    path.touch()


@pytest.mark.parametrize("change", [change_a_byte, append, replace_by_equal, change_mode, link, touch])
def test_every_change_gives_another_fingerprint(file, change):
    before = Fingerprint.of_path(file)
    wait_for_a_tick()
    change(file)
    assert Fingerprint.of_path(file) != before


def test_reading_changes_nothing(file):
    before = Fingerprint.of_path(file)
    wait_for_a_tick()
    file.read_bytes()
    assert Fingerprint.of_path(file) == before


def test_a_change_with_its_time_set_back_is_seen_by_ctime(file):
    before = Fingerprint.of_path(file)
    wait_for_a_tick()
    change_a_byte(file)
    os.utime(file, ns=(before.mtime_ns, before.mtime_ns))
    after = Fingerprint.of_path(file)
    assert after._replace(ctime_ns=before.ctime_ns) == before
    assert after != before


def test_a_symbolic_link_is_its_file(file):
    file.with_name("link").symlink_to("file")
    assert Fingerprint.of_path(file.with_name("link")) == Fingerprint.of_path(file) == Fingerprint.of_stat(file.stat())


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Fingerprint.of_path(tmp_path / "absent")


@pytest.mark.parametrize("newest", ["mtime_ns", "ctime_ns"])
def test_a_file_is_settled_two_seconds_after_its_newest_time(newest):
    fingerprint = Fingerprint(1, 2, 3, 1000, 1000)._replace(**{newest: 5000})
    assert not fingerprint.is_settled(5000 + SETTLE_NS - 1)
    assert fingerprint.is_settled(5000 + SETTLE_NS)


def test_a_file_from_the_future_is_not_settled(file):
    later = time.time_ns() + 3600 * 10**9
    os.utime(file, ns=(later, later))
    assert not Fingerprint.of_path(file).is_settled()


MOUNTS = """\
29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
30 29 7:1 / /model ro,nosuid - squashfs /dev/loop1 ro
31 29 7:2 / /image ro - ext4 /dev/loop2 ro,norecovery
32 29 0:50 /a /bind ro,relatime master:3 - xfs /dev/vdb rw,attr2
33 29 0:51 / /net rw - fuse.sshfs user@host:/ rw
"""


@pytest.mark.parametrize(
    ("device", "is_true"),
    [((254, 0), True), ((7, 1), False), ((7, 2), False), ((0, 50), True), ((0, 51), False), ((9, 9), False)],
)
def test_ctime_is_trusted_where_the_kernel_keeps_it(device, is_true):
    assert has_true_ctime(os.makedev(*device), MOUNTS) is is_true


def test_ctime_of_an_unknown_file_system_is_not_trusted():
    assert not has_true_ctime(os.makedev(254, 0), "")
