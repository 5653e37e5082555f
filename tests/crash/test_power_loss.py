"""The power fails after an acknowledgement, or at any moment: what was acknowledged is there and whole, or nothing is.

A kill cannot show a missing fsync, as the kernel still has what was written. Here the file system is shut down without
writing its journal or its dirty pages, as the tests of the file systems themselves do it. What a disk loses from a
cache of its own, although it received the command to write it, is not seen.

Source: Linux, ``EXT4_IOC_SHUTDOWN`` and ``XFS_IOC_GOINGDOWN`` with ``NOLOGFLUSH``; xfstests, ``src/godown.c``.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from crash_processes import environment
from fakes import fake_cache

from enginecache.errors import EngineCacheError, StoreError
from enginecache.files.digest import digest_of

SERVER = Path(__file__).with_name("power_loss_processes.py")
SUPPORT = Path(__file__).parents[1] / "support"
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = struct.pack("I", 2)
FILE_SYSTEMS = {
    "ext4": ("mkfs.ext4", 64, "loop"),
    "ext4, data=writeback": ("mkfs.ext4", 64, "loop,data=writeback"),
    "xfs": ("mkfs.xfs", 320, "loop"),
}
"""Program that makes it, MiB, options of the mount."""


class Disk:
    """A file system in a file, whose power can fail.

    Args:
        folder: Where the file and the mount point are made.
        kind: One of :data:`FILE_SYSTEMS`.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        program, size_mib, self._options = FILE_SYSTEMS[kind]
        self._image = folder / "disk.img"
        self.path = folder / "disk"
        self.path.mkdir()
        if shutil.which(program) is None:
            pytest.skip(f"probe: no {program}")
        with self._image.open("wb") as image:
            image.truncate(size_mib << 20)
        subprocess.run([program, "-q", self._image], check=True, stdin=subprocess.DEVNULL)

    def mount(self) -> None:
        command = ["mount", "-o", self._options, str(self._image), str(self.path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"probe: no image can be mounted: {done.stderr.strip()}")

    def unmount(self) -> None:
        # Not Path.is_mount, which asks the file system itself: XFS without power has no answer.
        if f" {self.path} " in Path("/proc/self/mounts").read_text(encoding="utf-8"):
            subprocess.run(["umount", self.path], check=True)

    def lose_power(self) -> None:
        """Whatever is not on the disk is lost; whoever works on it gets errors from now on."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(descriptor)


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[list[Disk]]:
    disks: list[Disk] = []

    def make(kind: str) -> Disk:
        folder = tmp_path / f"disk-{len(disks)}"
        folder.mkdir()
        disks.append(Disk(folder, kind))
        return disks[-1]

    if os.geteuid():
        pytest.skip("probe: only root mounts images")
    yield make
    for disk in disks:
        disk.unmount()


@pytest.fixture
def server() -> Iterator[subprocess.Popen]:
    path = {"PYTHONPATH": ":".join([str(SUPPORT), *sys.path])}
    command = [sys.executable, SERVER]
    with subprocess.Popen(
        command,
        env=environment(Path("/nowhere")) | path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        yield process
        process.stdin.close()


class Acknowledged:
    """Check the acknowledged operations on a disk that loses its power again and again."""

    def __init__(self, disk: Disk, server: subprocess.Popen, model: Path) -> None:
        self.published: dict[int, str] = {}
        self.pinned: set[int] = set()
        self.removed: set[int] = set()
        self.unsure: set[int] = set()
        self._disk = disk
        self._server = server
        self._model = model
        self._next = 1
        self.folder = disk.path / "cache"

    def run_until_power_loss(self, *, lines: int, delay_s: float, is_synchronized: bool = True) -> None:
        """Begin the work, and end it so many acknowledgements and seconds later."""
        self._disk.mount()
        asked = {
            "folder": str(self.folder),
            "model": str(self._model),
            "first": self._next,
            "is_synchronized": is_synchronized,
        }
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        for _ in range(lines):
            self._note(json.loads(self._server.stdout.readline()))
        time.sleep(delay_s)
        self._disk.lose_power()
        while self._note(json.loads(self._server.stdout.readline())):
            pass
        self._disk.unmount()
        self._disk.mount()
        self._next += 1000

    def _note(self, line: dict) -> bool:
        said, number = line["said"], line.get("number", 0)
        if said == "published":
            self.published[number] = line["digest"]
            self.unsure.discard(number)
        elif said in {"rebuilding", "removing"}:
            self.unsure.add(number)
        elif said == "pinned":
            self.pinned.add(number)
        elif said == "removed":
            self.removed.add(number)
            self.unsure.discard(number)
        return said != "end"

    def assert_kept(self) -> None:
        """Every acknowledgement holds, and no row has a bad blob. Unmounts the disk."""
        cache = fake_cache(self.folder)
        cache.make()
        with closing(sqlite3.connect(cache.root.registry_path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = cache.verify(deep=True)
        assert found.findings == (), found.findings
        for number in self.published:
            self._assert_number_kept(cache, number)
        self._disk.unmount()

    def _assert_number_kept(self, cache, number: int) -> None:
        if number in self.unsure:
            return
        try:
            entry = cache.get(self._model, dims={"batch": (1, 1, number)}, offline=True)
        except EngineCacheError:
            assert number in self.removed, number
            return
        assert number not in self.removed, number
        assert entry.digest == self.published[number] == digest_of(entry.path.read_bytes())
        assert entry.record.is_pinned == (number in self.pinned), number


def moments(count: int) -> Iterator[dict]:
    """Right after an acknowledgement, and at some time after one; the first ones while the folder is made."""
    dice = random.Random(7)
    for number in range(count):
        lines = 0 if number % 10 == 0 else dice.randrange(1, 12)
        yield {"lines": lines, "delay_s": 0.0 if number % 2 else dice.uniform(0.0, 0.08)}


def lose_power(make_disk, server, model: Path, kind: str, count: int) -> None:
    began = time.monotonic()
    acknowledged = 0
    for number, moment in enumerate(moments(count)):
        if number % 10 == 0:
            kept = Acknowledged(make_disk(kind), server, model)
        kept.run_until_power_loss(**moment)
        kept.assert_kept()
        acknowledged += len(kept.published)
    print(f"{kind}: {count} power losses, {acknowledged} engines looked for, {time.monotonic() - began:.0f} s")


def test_what_was_acknowledged_outlives_a_power_loss(make_disk, server, model):
    lose_power(make_disk, server, model, "ext4", 4)


@pytest.mark.reliability
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_what_was_acknowledged_outlives_fifty_power_losses(make_disk, server, model, kind):
    lose_power(make_disk, server, model, kind, 50)


def test_the_loss_of_what_was_not_synchronized_is_seen(make_disk, server, model):
    kept = Acknowledged(make_disk("ext4"), server, model)
    kept.run_until_power_loss(lines=8, delay_s=0.0, is_synchronized=False)
    assert kept.published
    assert seen_in(kept.folder) & {"size", "digest", "dangling", "marker"}


def seen_in(folder: Path) -> set[str]:
    """The kinds of what is found wrong."""
    try:
        return {finding.kind for finding in fake_cache(folder).verify(deep=True).findings}
    except StoreError as error:
        return {"marker"} if "CACHEDIR.TAG was lost or damaged" in error.fix else {str(error)}
