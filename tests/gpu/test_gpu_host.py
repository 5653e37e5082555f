"""On a GPU host: NVML, CUDA and the command line tell the same of the GPUs. The rules are tested in test_devices.py."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import gpu_report
import pytest

from enginecache.errors import NoDeviceError
from enginecache.host.devices import list_devices, read_nvml
from enginecache.host.evidence import gpu_things, watch


def probe(ask):
    try:
        return ask()
    except NoDeviceError:
        return ()


DEVICES = probe(list_devices)
HOST_GPUS = probe(read_nvml)

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="probe: list_devices finds no GPU")]


def marked(test):
    for mark in on_gpu:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def cuda():
    """Return CUDA's answer, from a separate process."""
    answer = gpu_report.ask("cuda")
    if answer.get("error", "").startswith("pycuda"):
        pytest.skip(f"probe: {answer['error']}")
    return answer["devices"]


def enginecache(*arguments, folder, **environ):
    command = [sys.executable, "-m", "enginecache", *map(str, arguments), "--dir", str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environ}
    )


@marked
def test_doctor_lists_every_gpu_with_its_facts(tmp_path):
    ran = enginecache("doctor", "--json", folder=tmp_path / "cache")
    checks = [check for check in json.loads(ran.stdout) if check["name"] == "gpu"]
    assert len(checks) == len(DEVICES)
    for device, check in zip(DEVICES, checks, strict=True):
        assert (
            f"device {device.ordinal}: {device.name}, compute capability {device.compute_capability}" in check["text"]
        )
        facts = check["facts"] | {"l2_bytes": device.l2_bytes}
        assert facts == device.to_json()


@marked
def test_doctor_says_that_nvml_and_cuda_agree(tmp_path, cuda):
    checks = {check["name"]: check for check in json.loads(enginecache("doctor", "--json", folder=tmp_path).stdout)}
    assert checks["gpu sources"]["status"] != "problem", checks["gpu sources"]
    assert checks["gpu sources"]["facts"]["differences"] == []
    assert checks["gpu"]["facts"]["l2_bytes"] > 1 << 20


@marked
def test_doctor_shows_what_hides_every_gpu(tmp_path):
    ran = enginecache("doctor", "--json", folder=tmp_path / "cache", CUDA_VISIBLE_DEVICES="-1")
    checks = {check["name"]: check for check in json.loads(ran.stdout)}
    assert ran.returncode == 0
    assert (checks["gpu"]["status"], checks["visible"]["facts"]["shown"]) == ("warning", 0)
    assert checks["visible"]["facts"]["of"] == len(HOST_GPUS)


@marked
def test_ordinal_that_is_not_there_is_exit_8_and_lists_the_gpus(tmp_path, model):
    ran = enginecache("get", model, "--dim", "batch=1", "--device", "99", folder=tmp_path / "cache")
    assert (ran.returncode, ran.stdout) == (8, "")
    assert DEVICES[0].name in ran.stderr


@marked
def test_request_without_a_target_is_for_the_gpu_here_or_says_why_not(tmp_path, model):
    ran = enginecache("explain", model, "--dim", "batch=1", "--json", folder=tmp_path / "cache")
    if ran.returncode == 0:
        target = json.loads(ran.stdout)["fields"]["target"]
        assert target["compute_capabilities"] == [list(DEVICES[0].compute_capability)]
    else:
        assert (ran.returncode, ran.stdout) == (8, "")
        assert "cannot build for" in ran.stderr or "TensorRT" in ran.stderr


def loads_sqlalchemy(model, folder, **environ):
    """Return whether a ``get`` through the fast path went on to the full path."""
    command = [sys.executable, "-X", "importtime", "-m", "enginecache.cli.fast_path", "get", str(model)]
    command += ["--dim", "batch=1"]
    ran = subprocess.run(
        [*command, "--target", "sm_89", "--dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, **environ},
    )
    assert ran.stdout.startswith(str(folder))
    return "sqlalchemy" in ran.stderr


@marked
def test_on_a_gpu_host_the_door_answers_until_the_gpus_that_are_shown_change(tmp_path, model):
    pytest.importorskip("tensorrt_rtx", reason="probe: TensorRT-RTX is not installed")
    folder = tmp_path / "cache"
    assert loads_sqlalchemy(model, folder)
    time.sleep(2.5)  # until a change of the files would move their times
    assert loads_sqlalchemy(model, folder)
    assert not loads_sqlalchemy(model, folder)
    hidden = {"CUDA_VISIBLE_DEVICES": "GPU-00000000-0000-0000-0000-000000000000"}
    assert loads_sqlalchemy(model, folder, **hidden)
    assert not loads_sqlalchemy(model, folder)


@marked
def test_what_tells_the_gpus_of_this_host_does_not_change_by_itself():
    things = gpu_things()
    assert any(thing.endswith("/information") for _, thing in things), "the driver shows no GPU under /proc"
    before = watch(things)
    subprocess.run([sys.executable, "-c", "import enginecache.host.devices as d; d.list_devices()"], check=True)
    assert watch(things) == before


@marked
def test_gpus_are_described_whole():
    for gpu in HOST_GPUS:
        device = gpu.device
        assert device.name
        assert device.uuid.startswith("GPU-")
        assert device.sm_count > 0
        assert device.driver_version[0].isdigit()
        assert device.cuda_driver_version >= (11, 0)


@marked
def test_gpu_is_found_by_its_uuid():
    for gpu in HOST_GPUS:
        if not gpu.has_mig:
            (device,) = list_devices({"CUDA_VISIBLE_DEVICES": gpu.device.uuid})
            assert device == replace(gpu.device, ordinal=0)


@marked
def test_cuda_and_nvml_have_one_word_for_every_gpu(cuda):
    compared = ("name", "compute_capability", "sm_count", "cuda_driver_version")
    known = {gpu.device.pci_bus_id: gpu.device.to_json() for gpu in HOST_GPUS if not gpu.has_mig}
    for device in cuda:
        if device["pci_bus_id"] in known:
            nvml = known[device["pci_bus_id"]]
            assert {name: device[name] for name in compared} == {name: nvml[name] for name in compared}


VALUES = gpu_report.visible_values([gpu.device.uuid for gpu in HOST_GPUS]) if DEVICES else [None]


@marked
@pytest.mark.parametrize("order", [None, "PCI_BUS_ID"])
@pytest.mark.parametrize("visible", VALUES)
def test_cuda_shows_what_the_rules_say(visible, order, cuda):
    row = gpu_report.compare(visible, order)
    assert row["verdict"] in {"agree", "left to CUDA", "agree on the models, in another order of equal cards"}, row


@marked
@pytest.mark.parametrize("ordinal", range(len(DEVICES) or 1))
def test_child_is_shown_the_chosen_gpu_alone(ordinal, cuda):
    found = gpu_report.alone(ordinal)
    assert found["is_right"], found


@marked
def test_current_device_is_that_of_the_context(cuda):
    found = gpu_report.ask("current")
    assert found["is_right"], found
    assert found["without_context"] == found["without_cuda"] == DEVICES[0].pci_bus_id


ONE = {"devices": [{"pci_bus_id": "1", "device_class": "A"}]}
OTHER_CARD = {"devices": [{"pci_bus_id": "2", "device_class": "A"}]}
OTHER_MODEL = {"devices": [{"pci_bus_id": "2", "device_class": "B"}]}
NONE = {"error": "CUDA_VISIBLE_DEVICES=9 hides every GPU"}


# The report's own judgement needs no GPU.
@pytest.mark.parametrize(
    ("ours", "cuda", "expected"),
    [
        (ONE, ONE, "agree"),
        (NONE, {"error": "CUDA does not describe its GPUs: cuInit failed"}, "agree"),
        (ONE, OTHER_CARD, "agree on the models, in another order of equal cards"),
        (ONE, OTHER_MODEL, "DIFFER"),
        (ONE, NONE, "DIFFER"),
        (NONE, ONE, "DIFFER"),
        ({"error": "the GPUs differ, and only CUDA knows the order"}, ONE, "left to CUDA"),
        (ONE, {"error": "pycuda is not installed"}, "not compared: pycuda is not installed"),
    ],
)
def test_report_judges_two_answers(ours, cuda, expected):
    assert gpu_report.verdict(ours, cuda) == expected


def test_report_tries_every_way_to_name_a_gpu():
    values = gpu_report.visible_values(["GPU-aaaaaaaa-1", "GPU-bbbbbbbb-2"])
    for value in (
        None,
        "0",
        "1",
        "1,0",
        "GPU-aaaaaaaa-1",
        "GPU-bbbbbbbb",
        "GPU-bbbbbbbb-2,GPU-aaaaaaaa-1",
        *("", "-1", "0,0", " 0", "nope", "2"),
    ):
        assert value in values
    assert len(values) == len(set(values))
