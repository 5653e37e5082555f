"""Small and read-only file systems, for tests that run where they may be mounted."""

from __future__ import annotations

import contextlib
import os
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
