from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from enginecache.files.fingerprint import SETTLE_NS, Fingerprint, has_kernel_times


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
    assert Fingerprint.of_path(file.with_name("link")) == Fingerprint.of_path(file)
    assert Fingerprint.of_path(file.with_name("link"), follow_symlinks=False) != Fingerprint.of_path(file)


def test_an_open_file_has_the_fingerprint_of_its_path(file):
    with file.open() as opened:
        assert Fingerprint.of_descriptor(opened.fileno()) == Fingerprint.of_path(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Fingerprint.of_path(tmp_path / "absent")


WHOLE_S = 1_790_000_000_000_000_000


@pytest.mark.parametrize(
    ("ctime_ns", "is_settled"),
    [
        (WHOLE_S - SETTLE_NS, True),
        (WHOLE_S - SETTLE_NS + 1, False),
        (WHOLE_S, False),
        (WHOLE_S + 1, False),
        (WHOLE_S + SETTLE_NS + 1, True),  # the clock was set back: a change now would show
        (WHOLE_S + SETTLE_NS, False),  # it may be one of whole seconds, and the clock will come to that second again
    ],
)
def test_a_file_is_settled_when_a_change_now_would_move_its_ctime(ctime_ns, is_settled):
    for mtime_ns in (0, ctime_ns, 2 * WHOLE_S):  # which anybody may set
        assert Fingerprint(1, 2, 3, mtime_ns, ctime_ns).is_settled(WHOLE_S) is is_settled


def test_a_file_with_an_mtime_ahead_is_settled_two_seconds_after_that_was_set(file):
    later = time.time_ns() + 3600 * 10**9
    os.utime(file, ns=(later, later))
    fingerprint = Fingerprint.of_path(file)
    assert not fingerprint.is_settled()
    assert fingerprint.is_settled(fingerprint.ctime_ns + SETTLE_NS)


MOUNTS = """\
29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
30 29 7:1 / /model ro,nosuid - squashfs /dev/loop1 ro
31 29 7:2 / /image ro - ext4 /dev/loop2 ro,norecovery
32 29 0:50 /a /bind ro,relatime master:3 - xfs /dev/vdb rw,attr2
33 29 0:51 / /net rw - fuse.sshfs user@host:/ rw
34 29 7:3 / /loop rw - ext4 /dev/loop3 rw
35 29 0:52 / /layers rw - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c
36 29 0:53 / /below rw - overlay overlay ro,lowerdir=/a:/b
37 29 0:54 / /memory rw - tmpfs tmpfs rw
38 29 253:0 / /volume rw - xfs /dev/mapper/a rw
39 29 253:1 / /sparse rw - xfs /dev/mapper/b rw
40 29 7:4 / /partition rw - ext4 /dev/loop4p1 rw
41 29 8:0 / /unlisted rw - ext4 /dev/sda rw
"""


@pytest.fixture
def blocks(tmp_path):
    """Block devices: a disk, loop devices, one with a partition, and two volumes, of which one is made of a loop."""
    devices = tmp_path / "devices"
    below = {
        "virtio1/block/vda": ("254:0", ()),
        "virtual/block/loop3": ("7:3", ()),
        "virtual/block/loop4/loop4p1": ("7:4", ()),
        "virtual/block/dm-0": ("253:0", ("virtio1/block/vda",)),
        "virtual/block/dm-1": ("253:1", ("virtio1/block/vda", "virtual/block/loop3")),
    }
    (tmp_path / "block").mkdir()
    for name, (number, slaves) in below.items():
        (devices / name / "slaves").mkdir(parents=True)
        (devices / name / "dev").write_text(number + "\n")
        (tmp_path / "block" / number).symlink_to(devices / name)
        for slave in slaves:
            (devices / name / "slaves" / Path(slave).name).symlink_to(devices / slave)
    return tmp_path / "block"


@pytest.mark.parametrize(
    ("device", "with_mount", "without"),
    [
        ((254, 0), True, True),
        ((253, 0), True, True),
        ((253, 1), True, False),
        ((7, 3), True, False),
        ((7, 4), True, False),
        ((8, 0), True, False),  # what sysfs does not show may be anything
        ((0, 52), True, False),
        ((0, 53), True, False),
        ((0, 54), True, False),
        ((0, 50), True, False),
        ((7, 1), False, False),
        ((7, 2), False, False),
        ((0, 51), False, False),
        ((9, 9), False, False),
    ],
)
def test_times_are_believed_where_this_kernel_sets_them_and_no_other_file_system_can_be(
    blocks, device, with_mount, without
):
    for mount, expected in ((2**32, with_mount), (0, without)):
        fingerprint = Fingerprint(os.makedev(*device), 2, 3, 4, 5, mount)
        assert has_kernel_times(fingerprint, MOUNTS, blocks) is expected


def test_times_in_an_unknown_file_system_are_not_believed(blocks):
    assert not has_kernel_times(Fingerprint(os.makedev(254, 0), 2, 3, 4, 5, 6), "", blocks)


def test_a_fingerprint_is_conclusive_only_if_it_is_settled_and_its_times_are_the_kernels(file, monkeypatch):
    fingerprint = Fingerprint.of_path(file)
    later_ns = fingerprint.ctime_ns + SETTLE_NS
    assert fingerprint.is_conclusive(later_ns)
    assert not fingerprint.is_conclusive(later_ns - 1)
    monkeypatch.setattr("enginecache.files.fingerprint.KERNEL_TIMED", frozenset())
    monkeypatch.setattr("enginecache.files.fingerprint._has_kernel_times_in", lambda *_: False)  # it keeps what it saw
    assert not fingerprint.is_conclusive(later_ns)
