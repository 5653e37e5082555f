import sqlite3
from dataclasses import replace

import pytest
from fakes import H100, fake_cache

from enginecache.config import Config
from enginecache.doctor import _check_file_system, diagnose
from enginecache.errors import NoDeviceError
from enginecache.toolchain import Toolchain, ToolchainFinding

RTX = ToolchainFinding("tensorrt-rtx", Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64"))
NO_TENSORRT = ToolchainFinding("tensorrt", None, "tensorrt is not installed", "pip install tensorrt")
NO_RTX = ToolchainFinding("tensorrt-rtx", None, "tensorrt-rtx is not installed", "pip install tensorrt-rtx")


@pytest.fixture
def checks(tmp_path):
    """All checks by name; more than one of a name are a list."""

    def look(devices=(H100,), findings=(NO_TENSORRT, RTX), folder=None):
        def find():
            if isinstance(devices, Exception):
                raise devices
            return devices

        found = diagnose(Config(dir=folder or tmp_path / "cache"), find, lambda _major: findings)
        assert all(check.fix for check in found if check.status != "ok")
        assert all(check.exit_code == 0 for check in found if check.status != "problem")
        return {check.name: check for check in found}

    return look


def test_host_that_works_is_ok_throughout(checks, tmp_path):
    fake_cache(tmp_path / "cache")
    found = checks(findings=(RTX,))
    assert {check.status for check in found.values()} <= {"ok", "warning"}
    assert [name for name, check in found.items() if check.status == "warning" and name != "space"] == []
    assert str(tmp_path / "cache") in found["folder"].text
    assert "schema 0001" in found["registry"].text


def test_looking_makes_nothing(checks, tmp_path):
    assert checks()["folder"].text == f"{tmp_path / 'cache'} will be made by the first get"
    assert list(tmp_path.iterdir()) == []


def test_every_gpu_is_named_with_what_decides_its_plans(checks, tmp_path):
    text = checks()["gpu"].text
    for part in (
        "device 0",
        "NVIDIA H100 80GB HBM3",
        "compute capability 9.0",
        "132 SMs",
        "driver 580.65.06",
        "CUDA 13.0",
    ):
        assert part in text
    two = (H100, replace(H100, ordinal=1))
    found = diagnose(Config(dir=tmp_path / "cache"), lambda: two, lambda _major: (RTX,))
    assert [check.text[:8] for check in found if check.name == "gpu"] == ["device 0", "device 1"]


def test_no_gpu_is_a_warning_with_a_way_out(checks):
    check = checks(devices=NoDeviceError("no driver", "Use --target."))["gpu"]
    assert (check.status, check.text, check.fix) == ("warning", "no driver", "Use --target.")


def test_missing_flavour_is_a_warning_and_no_flavour_says_what_to_install(checks):
    found = checks()
    assert (found["tensorrt"].status, found["tensorrt-rtx"].status) == ("warning", "ok")
    assert "building" not in found
    assert "sm_89" in found["tensorrt-rtx"].text
    found = checks(findings=(NO_TENSORRT, NO_RTX))
    assert found["building"].status == "warning"
    assert "enginecache[rtx]" in found["building"].fix


def test_unsafe_folder_is_a_problem_with_its_exit_code(checks, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    check = checks()["folder"]
    assert (check.status, check.exit_code) == ("problem", 1)
    assert "Name a folder below it" in check.fix
    (tmp_path / "file").write_text("")
    assert checks(folder=tmp_path / "file")["folder"].status == "problem"
    (tmp_path / "link").symlink_to(tmp_path)
    assert "symbolic link" in checks(folder=tmp_path / "link")["folder"].text
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert checks(folder=tmp_path / "dangling")["folder"].status == "problem"


def test_damaged_registry_is_a_problem_of_exit_code_6(checks, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache/registry.sqlite").write_bytes(b"no database" * 100)
    check = checks()["registry"]
    assert (check.status, check.exit_code) == ("problem", 6)


def test_registry_that_is_not_there_yet_is_ok(checks, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    assert "not made yet" in checks()["registry"].text
    assert sqlite3.sqlite_version in checks()["registry"].text


def test_low_space_is_a_warning(checks, monkeypatch):
    monkeypatch.setattr("enginecache.doctor.LOW_SPACE_BYTES", 1 << 62)
    assert checks()["space"].status == "warning"
    assert "enginecache prune" in checks()["space"].fix


@pytest.mark.parametrize(
    ("mounts", "warned"),
    [
        ("/dev/sda / ext4 rw 0 0\n", False),
        ("server:/x {path} nfs4 rw 0 0\n", True),
        ("/dev/sda / ext4 rw 0 0\nserver:/x {parent} nfs rw 0 0\n", True),
        ("server:/x / nfs4 rw 0 0\n/dev/sda {parent} ext4 rw 0 0\n", False),
        ("sshfs#x {path} fuse.sshfs rw 0 0\n", True),
        ("", False),
    ],
)
def test_network_file_system_is_warned_of(tmp_path, mounts, warned):
    (tmp_path / "mounts").write_text(mounts.format(path=tmp_path / "a", parent=tmp_path))
    found = list(_check_file_system(tmp_path / "a", tmp_path / "mounts"))
    assert [check.status for check in found] == ["warning"] * warned
    assert list(_check_file_system(tmp_path, tmp_path / "none")) == []


def test_json_is_name_status_text_and_fix(checks):
    assert checks()["tensorrt"].to_json() == {
        "name": "tensorrt",
        "status": "warning",
        "text": "tensorrt is not installed",
        "fix": "pip install tensorrt",
    }
