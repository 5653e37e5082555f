import contextlib
import json
import os
import sqlite3
import sys
from dataclasses import replace

import pytest
from fakes import H100, fake_cache

from enginecache.config import Config
from enginecache.errors import NoDeviceError
from enginecache.host.devices import NvmlGpu
from enginecache.host.targets import ComputeCapability
from enginecache.host.toolchain import Toolchain, ToolchainFinding
from enginecache.maintenance.doctor import diagnose
from enginecache.maintenance.doctor.folder import check_file_system, check_settings, check_variables
from enginecache.maintenance.doctor.toolchains import installed_version
from enginecache.storage.folder import Root
from enginecache.storage.registry.schema import HEAD

RTX = ToolchainFinding("tensorrt-rtx", Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64"))
TENSORRT = ToolchainFinding("tensorrt", Toolchain("tensorrt", "10.16.1.11", 13, "linux", "x86_64"))
NO_TENSORRT = ToolchainFinding("tensorrt", None, "tensorrt is not installed", "pip install tensorrt")
NO_RTX = ToolchainFinding("tensorrt-rtx", None, "tensorrt-rtx is not installed", "pip install tensorrt-rtx")
L4 = replace(
    H100,
    name="NVIDIA L4",
    compute_capability=ComputeCapability(8, 9),
    sm_count=58,
    uuid="GPU-L4",
    pci_bus_id="00000000:18:00.0",
)
NO_PYCUDA = NoDeviceError("pycuda is not installed", "pip install pycuda")
NO_NVML = NoDeviceError("nvidia-ml-py, which describes GPUs, is not installed", "pip install nvidia-ml-py")


def by_cuda(*devices):
    """The devices as CUDA alone describes them, in this order."""
    return tuple(replace(d, ordinal=i, uuid="", driver_version="", l2_bytes=52_428_800) for i, d in enumerate(devices))


def answer(value):
    def ask(*_):
        if isinstance(value, Exception):
            raise value
        return value

    return ask


@pytest.fixture
def look(tmp_path):
    """All checks, in order."""

    def look(
        devices=(L4,),
        findings=(NO_TENSORRT, RTX),
        folder=None,
        *,
        nvml=None,
        cuda=NO_PYCUDA,
        environ=None,
        converters=("onnxconverter-common", "nvidia-modelopt"),
    ):
        if nvml is None:
            nvml = devices if isinstance(devices, Exception) else tuple(NvmlGpu(d) for d in devices)
        found = diagnose(
            Config(dir=folder or tmp_path / "cache"),
            answer(devices),
            answer(findings),
            nvml=answer(nvml),
            cuda=answer(cuda),
            version=lambda name: "1.2" if name in converters else None,
            environ=environ or {},
        )
        assert all(check.fix for check in found if check.status != "ok")
        assert all((check.exit_code > 0) == (check.status == "problem") for check in found)
        assert json.loads(json.dumps([check.to_json() for check in found])) == [check.to_json() for check in found]
        return found

    return look


@pytest.fixture
def checks(look):
    """All checks by name."""

    def by_name(*args, **kwargs):
        return {check.name: check for check in look(*args, **kwargs)}

    return by_name


def test_host_that_works_is_ok_throughout(checks, tmp_path):
    fake_cache(tmp_path / "cache").make()
    found = checks(findings=(RTX,), cuda=by_cuda(L4), environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert {check.status for check in found.values()} <= {"ok", "warning"}
    assert [name for name, check in found.items() if check.status == "warning" and name != "space"] == []
    assert str(tmp_path / "cache") in found["folder"].text
    assert f"schema {HEAD}" in found["registry"].text
    assert found["registry"].facts["schema"] == HEAD


def test_looking_makes_nothing(checks, tmp_path):
    assert checks()["folder"].text == f"{tmp_path / 'cache'} will be made by the first get"
    assert list(tmp_path.iterdir()) == []


def test_every_gpu_is_named_with_what_decides_its_plans(look):
    found = [check for check in look(devices=(H100, replace(L4, ordinal=1))) if check.name == "gpu"]
    assert found[0].text == (
        "device 0: NVIDIA H100 80GB HBM3, compute capability 9.0, 132 SMs, 79.2 GiB, driver 580.65.06, CUDA 13.0, "
        f"{H100.pci_bus_id}, {H100.uuid}"
    )
    assert [check.text[:20] for check in found] == ["device 0: NVIDIA H10", "device 1: NVIDIA L4,"]
    assert found[0].facts == H100.to_json()
    assert found[0].facts["device_class"] == "NVIDIA H100 80GB HBM3, 132 SMs"


def test_what_only_cuda_tells_is_shown_too(checks):
    found = checks(devices=(H100,), cuda=by_cuda(H100))["gpu"]
    assert "L2 50 MiB" in found.text
    assert found.facts["l2_bytes"] == 52_428_800


def test_no_gpu_is_a_warning_with_a_way_out(checks):
    found = checks(devices=NoDeviceError("no driver", "Use --target."))
    check = found["gpu"]
    assert (check.status, check.text, check.fix) == ("warning", "no driver", "Use --target.")
    assert "gpu sources" not in found
    assert found["tensorrt-rtx"].status == "ok"
    assert found["tensorrt-rtx"].facts["devices"] == []


@pytest.mark.parametrize(
    ("environ", "shown", "status", "text"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1, "ok", "CUDA_VISIBLE_DEVICES=0 shows 1 GPU of the 2 of this host"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            2,
            "ok",
            "CUDA_VISIBLE_DEVICES=0,1 and CUDA_DEVICE_ORDER=PCI_BUS_ID show 2 GPUs of the 2 of this host",
        ),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 2, "ok", "CUDA_DEVICE_ORDER=PCI_BUS_ID shows 2 GPUs of the 2"),
        ({"CUDA_VISIBLE_DEVICES": "0,7"}, 1, "warning", "and it has 2 entries"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0, "warning", "CUDA_VISIBLE_DEVICES=-1 shows 0 GPUs of the 2"),
    ],
)
def test_variables_that_select_gpus_are_shown_with_what_they_select(checks, environ, shown, status, text):
    host = (H100, replace(H100, ordinal=1, pci_bus_id="00000000:18:00.0"))
    devices = host[:shown] or NoDeviceError("CUDA_VISIBLE_DEVICES=-1 hides every GPU", "Unset it.")
    check = checks(devices=devices, nvml=tuple(NvmlGpu(d) for d in host), environ=environ)["visible"]
    assert (check.status, check.facts["shown"], check.facts["of"]) == (status, shown, 2)
    assert text in check.text
    assert check.facts["CUDA_VISIBLE_DEVICES"] == environ.get("CUDA_VISIBLE_DEVICES")


def test_variables_that_are_not_set_are_not_spoken_of(checks):
    assert "visible" not in checks()


def test_split_gpu_is_named(checks):
    check = checks(devices=(L4,), nvml=(NvmlGpu(L4), NvmlGpu(H100, has_mig=True)))["mig"]
    assert (check.status, check.facts) == ("ok", {"pci_bus_ids": [H100.pci_bus_id]})


def test_nvml_and_cuda_that_agree_are_ok(checks):
    devices = (H100, replace(L4, ordinal=1))
    check = checks(devices=devices, cuda=by_cuda(*devices))["gpu sources"]
    assert (check.status, check.text) == ("ok", "NVML and CUDA agree on 2 GPUs")
    assert check.facts == {"nvml": "", "cuda": "", "differences": []}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"name": "NVIDIA H200"}, "00000000:17:00.0 has name NVIDIA H100 80GB HBM3 by NVML and NVIDIA H200 by CUDA"),
        ({"sm_count": 114}, "has SM count 132 by NVML and 114 by CUDA"),
        ({"compute_capability": ComputeCapability(8, 0)}, "has compute capability 9.0 by NVML and 8.0 by CUDA"),
        ({"pci_bus_id": "00000000:99:00.0"}, "CUDA shows 00000000:99:00.0, and NVML does not"),
    ],
)
def test_nvml_and_cuda_that_disagree_are_a_problem_of_exit_code_8(checks, wrong, text):
    check = checks(devices=(H100,), cuda=by_cuda(replace(H100, **wrong)))["gpu sources"]
    assert (check.status, check.exit_code) == ("problem", 8)
    assert text in check.text
    assert text in "; ".join(check.facts["differences"])


def test_order_or_number_that_cuda_has_otherwise_is_a_problem(checks):
    devices = (H100, replace(L4, ordinal=1))
    for shown in (by_cuda(L4, H100), by_cuda(H100)):
        assert checks(devices=devices, cuda=shown)["gpu sources"].status == "problem"
    hidden = NoDeviceError("CUDA_VISIBLE_DEVICES=0x hides every GPU", "Unset it.")
    check = checks(devices=hidden, nvml=(NvmlGpu(H100),), cuda=by_cuda(H100))["gpu sources"]
    assert "CUDA shows NVIDIA H100 80GB HBM3, 132 SMs, where no GPU was expected" in check.text


def test_equal_gpus_that_cuda_numbers_otherwise_are_a_warning(checks):
    devices = (H100, replace(H100, ordinal=1, pci_bus_id="00000000:18:00.0"))
    check = checks(devices=devices, cuda=by_cuda(*devices[::-1]))["gpu sources"]
    assert check.status == "warning"
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in check.fix


def test_mig_instance_is_not_compared_with_its_card(checks):
    instance = replace(H100, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", sm_count=16, uuid="")
    check = checks(devices=(instance,), nvml=(NvmlGpu(H100, has_mig=True),), cuda=by_cuda(instance))["gpu sources"]
    assert check.status == "ok"


def test_missing_nvml_is_a_warning_where_cuda_is_there(checks):
    found = checks(devices=by_cuda(L4), nvml=NO_NVML, cuda=by_cuda(L4))
    assert found["gpu sources"].status == "warning"
    assert found["gpu sources"].fix == "pip install nvidia-ml-py"
    assert "driver not known" in found["gpu"].text


def test_missing_pycuda_is_ok_where_nvml_is_there(checks):
    assert checks()["gpu sources"].status == "ok"
    broken = NoDeviceError("pycuda cannot be imported: libcurand.so.10: cannot open", "Reinstall it.")
    broken.__cause__ = ImportError()
    check = checks(cuda=broken)["gpu sources"]
    assert (check.status, check.facts["cuda"]) == ("ok", broken.what)


def test_cuda_that_does_not_start_is_a_problem_where_nvml_shows_gpus(checks):
    failed = NoDeviceError("CUDA does not describe its GPUs: cuInit failed: unknown error", "Use a GPU host.")
    failed.__cause__ = RuntimeError()
    check = checks(cuda=failed)["gpu sources"]
    assert (check.status, check.exit_code) == ("problem", 8)
    assert "cuInit failed: unknown error" in check.text
    hidden = NoDeviceError("CUDA_VISIBLE_DEVICES=-1 hides every GPU", "Unset it.")
    assert "gpu sources" not in checks(devices=hidden, nvml=(NvmlGpu(L4),), cuda=failed)


def test_missing_flavour_is_a_warning_and_no_flavour_says_what_to_install(checks):
    found = checks()
    assert (found["tensorrt"].status, found["tensorrt-rtx"].status) == ("warning", "ok")
    assert "building" not in found
    assert "sm_89" in found["tensorrt-rtx"].text
    found = checks(findings=(NO_TENSORRT, NO_RTX))
    assert found["building"].status == "warning"
    assert "pip install tensorrt-rtx-cu13" in found["building"].fix


def test_usable_flavour_says_what_it_serves_and_has_raw_facts(checks):
    check = checks(devices=(L4, replace(L4, ordinal=1)))["tensorrt-rtx"]
    assert check.text.endswith("; serves devices 0, 1")
    assert check.facts == {
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "cuda_major": 13,
        "os": "linux",
        "cpu": "x86_64",
        "targets": ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"],
        "devices": [{"ordinal": 0, "problem": ""}, {"ordinal": 1, "problem": ""}],
    }
    check = checks(devices=(H100,), findings=(TENSORRT, NO_RTX))["tensorrt"]
    assert (check.status, check.facts["targets"]) == ("ok", None)


def test_gpu_that_tensorrt_rtx_does_not_support_is_a_warning_with_a_way_out(checks):
    found = checks(devices=(H100, replace(L4, ordinal=1)))
    check = found["tensorrt-rtx"]
    assert check.status == "warning"
    assert "serves device 1; cannot serve device 0: TensorRT-RTX 1.7.1.116 does not support compute " in check.text
    assert "capability 9.0" in check.text
    assert "pip install tensorrt nvidia-ml-py" in check.fix
    assert [device["problem"] != "" for device in check.facts["devices"]] == [True, False]
    assert "building" not in found


def test_rtx_that_is_later_than_what_is_known_of_it_is_not_refused(checks):
    later = ToolchainFinding("tensorrt-rtx", replace(RTX.toolchain, version="1.9.0.1"))
    check = checks(devices=(H100,), findings=(later,))["tensorrt-rtx"]
    assert (check.status, check.facts["targets"]) == ("ok", None)


def test_driver_that_is_too_old_is_a_problem_only_where_nothing_else_builds(checks):
    old = (replace(H100, driver_version="535.1", cuda_driver_version=(12, 2)),)
    found = checks(devices=old, findings=(TENSORRT, RTX))
    assert "driver 535.1 is for CUDA 12.2, and CUDA 13 is needed" in found["tensorrt"].text
    assert "cuda-compat" in found["tensorrt"].fix
    assert found["tensorrt"].status == "warning"
    assert "building" not in found

    found = checks(devices=old, findings=(TENSORRT, NO_RTX))
    assert (found["building"].status, found["building"].exit_code) == ("problem", 8)
    assert "driver 535.1 is for CUDA 12.2" in found["building"].text
    assert "building" not in checks(devices=(*old, replace(H100, ordinal=1)), findings=(TENSORRT, NO_RTX))


def test_old_driver_keeps_rtx_from_running_and_not_from_building(checks):
    found = checks(devices=(replace(L4, cuda_driver_version=(12, 2)),))
    assert "cannot serve device 0: driver" in found["tensorrt-rtx"].text
    assert found["tensorrt-rtx"].status == "warning"
    assert "building" not in found


def test_tensorrt_without_a_gpu_is_a_warning(checks):
    check = checks(devices=NoDeviceError("no driver", "Use --target."), findings=(TENSORRT,))["tensorrt"]
    assert check.status == "warning"
    assert "TensorRT-RTX" in check.fix


@pytest.mark.parametrize(
    ("converters", "findings", "status", "text"),
    [
        (
            ("onnxconverter-common",),
            (RTX,),
            "ok",
            "1.2; --bf16 by converting the graph needs nvidia-modelopt",
        ),
        (
            ("onnxconverter-common", "nvidia-modelopt"),
            (RTX,),
            "ok",
            "with onnxconverter-common 1.2; --bf16 by converting the graph with nvidia-modelopt 1.2",
        ),
        ((), (RTX,), "warning", "--fp16 by converting the graph needs onnxconverter-common; --bf16"),
        ((), (TENSORRT,), "ok", "TensorRT here takes both as builder flags"),
        ((), (NO_RTX,), "ok", "--bf16 by converting the graph needs nvidia-modelopt"),
    ],
)
def test_precisions_are_told_with_what_makes_them(checks, converters, findings, status, text):
    check = checks(findings=findings, converters=converters)["precision"]
    assert check.status == status
    assert text in check.text
    assert check.facts["converters"]["nvidia-modelopt"] == ("1.2" if "nvidia-modelopt" in converters else None)


def test_tensorrt_11_has_no_precision_flags(checks):
    typed = ToolchainFinding("tensorrt", replace(TENSORRT.toolchain, version="11.4.0.106"))
    check = checks(findings=(typed,), converters=())["precision"]
    assert check.status == "warning"
    assert "flags" not in check.text


def test_versions_of_installed_distributions_are_read():
    assert installed_version("pytest") == pytest.__version__
    assert installed_version("no-such-distribution") is None


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
    Root.open(tmp_path / "cache")
    (tmp_path / "cache/registry.sqlite").write_bytes(b"no database" * 100)
    check = checks()["registry"]
    assert (check.status, check.exit_code) == ("problem", 6)


def mark_schema(folder, revision, reader):
    with contextlib.closing(sqlite3.connect(folder / "registry.sqlite")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
        connection.execute("UPDATE schema_info SET oldest_reader = ?", [reader])


def test_newer_registry_is_a_warning_if_it_can_be_read_and_else_a_problem(checks, tmp_path):
    fake_cache(tmp_path / "cache").make()
    mark_schema(tmp_path / "cache", "9999", 1)
    check = checks()["registry"]
    assert check.status == "warning"
    assert "schema 9999" in check.text
    assert "a newer enginecache wrote it, which one is not recorded, and this one can read it" in check.text
    assert (check.facts["schema"], check.facts["newest_known"]) == ("9999", HEAD)
    mark_schema(tmp_path / "cache", "9999", 99)
    check = checks()["registry"]
    assert (check.status, check.exit_code, check.facts["schema"]) == ("problem", 6, "9999")
    assert "Upgrade enginecache" in check.fix


def test_registry_that_is_not_there_yet_is_ok(checks, tmp_path):
    Root.open(tmp_path / "cache")
    assert "not made yet" in checks()["registry"].text
    assert sqlite3.sqlite_version in checks()["registry"].text


def test_low_space_is_a_warning(checks, monkeypatch):
    monkeypatch.setattr("enginecache.maintenance.doctor.folder.LOW_SPACE_BYTES", 1 << 62)
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
    found = list(check_file_system(tmp_path / "a", tmp_path / "mounts"))
    assert [check.status for check in found] == ["warning"] * warned
    assert list(check_file_system(tmp_path, tmp_path / "none")) == []


def test_json_is_name_status_text_fix_and_facts(checks):
    assert checks()["tensorrt"].to_json() == {
        "name": "tensorrt",
        "status": "warning",
        "text": "tensorrt is not installed",
        "fix": "pip install tensorrt",
        "facts": {"flavour": "tensorrt", "version": None},
    }


def test_doctor_warns_of_unknown_variables_with_the_nearest_right_one():
    (found,) = check_variables({"ENGINECACHE_BACKEN": "tensorrt"})
    assert (found.status, found.exit_code) == ("warning", 0)
    assert "Did you mean ENGINECACHE_BACKEND?" in found.text
    assert list(check_variables({"ENGINECACHE_BACKEND": "tensorrt"})) == []


def test_the_builders_python_and_variables_are_shown(checks):
    plain = checks(environ={"TZ": "UTC"})["builder"]
    assert (plain.status, plain.text) == ("ok", f"runs with {sys.executable}")
    keyed = checks(environ={"NVIDIA_TF32_OVERRIDE": "0"})["builder"]
    assert (keyed.status, keyed.facts["environment"]) == ("ok", {"NVIDIA_TF32_OVERRIDE": "0"})
    assert "in the key: NVIDIA_TF32_OVERRIDE=0" in keyed.text
    removed = checks(environ={"LD_PRELOAD": "/lib/x.so"})["builder"]
    assert removed.status == "warning"
    assert "LD_PRELOAD is set and is not passed to the builder" in removed.fix


def test_no_python_for_the_builder_is_a_problem_with_advice(checks, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    found = checks()["builder"]
    assert (found.status, found.exit_code) == ("problem", 8)
    assert "ENGINECACHE_PYTHON" in found.fix


def test_doctor_says_that_the_settings_are_in_a_closed_home(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert check_settings().status == "ok"

    def closed(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", closed)
    found = check_settings()
    assert found.status == "warning"
    assert "cannot be reached by this user" in found.text


def test_few_inodes_are_a_warning_that_names_them(checks, monkeypatch):
    monkeypatch.setattr("enginecache.maintenance.doctor.folder.free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr("enginecache.maintenance.doctor.folder.free_inodes", lambda _: 7)
    found = checks()["space"]
    assert (found.status, found.facts["free_inodes"]) == ("warning", 7)
    assert "only 7 inodes" in found.text
    assert "df -i" in found.fix


def test_folder_with_a_name_that_no_file_can_have_is_a_problem_and_no_traceback(checks, tmp_path):
    found = checks(folder=tmp_path / ("a" * 300))["folder"]
    assert found.status == "problem"
    assert "a name in it has 300 bytes" in found.text
