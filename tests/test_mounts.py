from __future__ import annotations

import subprocess

import pytest
from mounts import IMAGES, Image, small_disk

from enginecache.files import mounts
from enginecache.files.fingerprint import Fingerprint, has_kernel_times
from enginecache.files.mounts import boot_id, file_system_of, status_of


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def test_a_status_is_what_stat_says_and_the_mount(file):
    *numbers, mount, mode = status_of(file)
    found = file.stat()
    assert numbers == [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    assert mode == found.st_mode
    assert mount == status_of(file.parent)[5]


def test_an_open_file_and_a_link_have_the_status_of_the_file(file):
    file.with_name("link").symlink_to(file)
    with file.open() as opened:
        assert status_of(opened.fileno()) == status_of(file) == status_of(file.with_name("link"))
    assert status_of(file.with_name("link"), follow_symlinks=False) != status_of(file)


@pytest.mark.parametrize("has_statx", [True, False])
def test_what_is_not_there_is_an_error_of_stats(tmp_path, monkeypatch, has_statx):
    if not has_statx:
        monkeypatch.setattr(mounts, "_statx", None)
    with pytest.raises(FileNotFoundError, match="absent"):
        status_of(tmp_path / "absent")
    with pytest.raises(ValueError, match="null"):
        status_of("a\0b")


@pytest.mark.parametrize("why", ["no statx", "refused", "no unique number"])
def test_without_the_unique_number_the_mount_is_not_known(file, monkeypatch, why):
    known = status_of(file)
    if why == "no statx":
        monkeypatch.setattr(mounts, "_statx", None)
    elif why == "refused":
        monkeypatch.setattr(mounts, "_statx", lambda *_: -1)
    else:
        # A bit that no kernel knows, as an older one does not know the number's: it is not in the answer.
        monkeypatch.setattr(mounts, "_MNT_ID_UNIQUE", 0x0800_0000)
    assert status_of(file) == (*known[:5], 0, known[6])


def test_the_boot_has_a_name():
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36


def test_a_boot_that_is_not_told_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(mounts, "BOOT_ID", str(tmp_path / "absent"))
    assert boot_id() == ""


def require_unique_numbers(path):
    if not status_of(path)[5]:
        pytest.skip("probe: the kernel gives mounts no unique number (Linux 6.8)")


def test_a_mount_in_the_place_of_another_has_another_number(tmp_path):
    require_unique_numbers(tmp_path)
    numbers = set()
    for _ in range(3):
        with small_disk(1 << 20) as disk:
            numbers.add(status_of(disk)[5])
    assert len(numbers) == 3


def test_one_file_in_two_mounts_has_two_numbers(file):
    require_unique_numbers(file)
    (file.parent / "bound").mkdir()
    with small_disk(1 << 20) as disk:
        (disk / "file").touch()
        bound = file.parent / "bound"
        subprocess.run(["mount", "--bind", disk, bound], check=True)
        try:
            first, second = status_of(disk / "file"), status_of(bound / "file")
        finally:
            subprocess.run(["umount", bound], check=True)
    assert first[:5] == second[:5]
    assert first[5] != second[5]


@pytest.mark.parametrize("kind", IMAGES)
def test_a_file_of_an_image_in_the_place_of_another_has_another_fingerprint_by_its_mount_alone(tmp_path, kind):
    require_unique_numbers(tmp_path)
    image = Image(kind, tmp_path)
    try:
        first = Fingerprint.of_path(image.replace("file", b"content 1"))
        second = Fingerprint.of_path(image.replace("file", b"content 2"))
    finally:
        image.detach()
    assert first != second
    assert first[1:5] == second[1:5]  # the device's number too, mostly


def test_the_kernel_tells_the_kind_of_a_mounts_file_system(tmp_path):
    require_unique_numbers(tmp_path)
    if file_system_of(status_of("/proc")[5]) is None:
        pytest.skip("probe: statmount is not allowed here")
    assert file_system_of(status_of("/proc")[5]) == ("proc", True)
    with small_disk(1 << 20) as disk:
        number = status_of(disk)[5]
        assert file_system_of(number) == ("tmpfs", True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert file_system_of(number) == ("tmpfs", False)


def test_a_mount_that_is_not_there_has_no_file_system():
    assert file_system_of(2**63) is None


def test_files_whose_device_no_list_of_mounts_shows_are_believed_by_their_mount(tmp_path):
    """Those of a lower layer in another file system, without ``xino``."""
    require_unique_numbers(tmp_path)
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    with small_disk(1 << 20) as lower:
        (lower / "file").touch()
        layers = f"lowerdir={lower},upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
        merged = tmp_path / "merged"
        command = ["mount", "-t", "overlay", "overlay", "-o", f"xino=off,{layers}", merged]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("probe: no overlay can be mounted here")
        try:
            found = Fingerprint.of_path(merged / "file")
            assert found.device != Fingerprint.of_path(merged).device
            is_told = file_system_of(found.mount) is not None
            assert has_kernel_times(found) is is_told
        finally:
            subprocess.run(["umount", merged], check=True)
