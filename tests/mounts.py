"""Small and read-only file systems and images, for tests that run where they may be mounted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: object) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0
    return False


def _unmount(folder: Path) -> None:
    # Lazily: what a failed test left open must not keep it.
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def small_disk(size_bytes: int) -> Iterator[Path]:
    """A file system of this size, in memory; skips the test where none can be mounted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "disk"
        Path(name).chmod(0o755)  # other users reach it
        folder.mkdir()
        if not _mount("-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "tmpfs", folder):
            pytest.skip("probe: this user may not mount a tmpfs")
        try:
            yield folder
        finally:
            _unmount(folder)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder mounted read-only over itself, which binds the root user as well."""
    if not _mount("--bind", folder, folder):
        pytest.skip("probe: this user may not mount")
    try:
        assert _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        _unmount(folder)


@contextlib.contextmanager
def bound(folder: Path) -> Iterator[None]:
    """The folder mounted over itself: the same files, in another mount."""
    if not _mount("--bind", folder, folder):
        pytest.skip("probe: this user may not mount")
    try:
        yield
    finally:
        _unmount(folder)


@contextlib.contextmanager
def mounted_over(folder: Path) -> Iterator[None]:
    """An empty folder of the same file system mounted over the folder, as a mistaken volume would be."""
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as empty:
        Path(empty).chmod(folder.stat().st_mode & 0o7777)
        if not _mount("--bind", empty, folder):
            pytest.skip("probe: this user may not mount")
        try:
            yield
        finally:
            _unmount(folder)


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(disk: Path, *, leave_bytes: int = 0) -> Path:
    """Take up the room of a disk but for so many bytes; deleting the file that is returned gives it back."""
    path = disk / "filling"
    with path.open("ab") as file:
        size = file.seek(0, os.SEEK_END)
        room = free_bytes(disk) - leave_bytes
        if room > 0:
            os.posix_fallocate(file.fileno(), size, room)
    return path


IMAGES = ("overlay on squashfs", "overlay on erofs", "ext4")
_MADE_AT = "1704067200"
_UUID = "6b1f8b8e-0000-4000-8000-000000000001"


class Image:
    """A folder that images are mounted at, one after another.

    As a build makes them that can be reproduced: files of one name have the same inode and times in all.

    Args:
        kind: One of :data:`IMAGES`.
        folder: An empty one of the image's own.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.path = folder / "mounted"
        self._folder = folder
        self._mounted: list[Path] = []
        for name in ("mounted", "lower", "made"):
            (folder / name).mkdir()

    def replace(self, name: str, content: bytes) -> Path:
        """Mount an image with this one file, in place of what is mounted; where the file is then."""
        self.detach()
        made, image = self._folder / "made" / name, self._folder / "image"
        made.write_bytes(content)
        for path in (made, made.parent):
            os.utime(path, (int(_MADE_AT), int(_MADE_AT)))
        image.unlink(missing_ok=True)
        if self.kind == "ext4":
            self._make_ext4(name, image)
            self._mount("-o", "loop,rw", image, self.path)
            return self.path / name
        if self.kind.endswith("squashfs"):
            command = ["mksquashfs", made.parent, image, "-quiet", "-no-progress", "-all-root", "-mkfs-time", _MADE_AT]
        else:
            command = ["mkfs.erofs", f"-T{_MADE_AT}", "-U", _UUID, image, made.parent]
        _run(command)
        lower = self._folder / "lower"
        self._mount("-o", "loop,ro", image, lower)
        for part in ("upper", "work"):
            shutil.rmtree(self._folder / part, ignore_errors=True)
            (self._folder / part).mkdir()
        layers = f"lowerdir={lower},upperdir={self._folder / 'upper'},workdir={self._folder / 'work'}"
        self._mount("-t", "overlay", "overlay", "-o", f"xino=on,{layers}", self.path)
        return self.path / name

    def _make_ext4(self, name: str, image: Path) -> None:
        environ = {**os.environ, "E2FSPROGS_FAKE_TIME": _MADE_AT}
        made = self._folder / "made"
        _run(["mkfs.ext4", "-q", "-U", _UUID, "-E", f"hash_seed={_UUID}", "-d", made, image, "8M"], env=environ)
        for setting in (f"ctime @{_MADE_AT}", "ctime_extra 0", "mtime_extra 0"):
            _run(["debugfs", "-w", "-R", f"set_inode_field {name} {setting}", image])

    def _mount(self, *arguments: object) -> None:
        if not _mount(*arguments):
            pytest.skip(f"probe: {self.kind} cannot be mounted here")
        self._mounted.append(Path(str(arguments[-1])))

    def detach(self) -> None:
        """Unmount what is mounted. Idempotent."""
        while self._mounted:
            _unmount(self._mounted.pop())


def _run(command: list[object], **options: object) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True, capture_output=True, **options)
    except FileNotFoundError:
        pytest.skip(f"probe: there is no {command[0]}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"probe: {command[0]} cannot make the image: {error.stderr.decode(errors='replace')[-200:]}")
