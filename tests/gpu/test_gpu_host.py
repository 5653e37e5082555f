"""On a GPU host: what the command line says of the GPUs. Discovery itself is tested in test_devices.py."""

import json
import subprocess
import sys

import pytest

from enginecache.devices import list_devices
from enginecache.errors import NoDeviceError


def probe():
    try:
        return list_devices()
    except NoDeviceError:
        return ()


DEVICES = probe()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="probe: list_devices finds no GPU")]


def enginecache(*arguments, folder):
    command = [sys.executable, "-m", "enginecache", *map(str, arguments), "--dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_doctor_lists_every_gpu(tmp_path):
    ran = enginecache("doctor", "--json", folder=tmp_path / "cache")
    assert ran.returncode == 0, ran.stderr
    texts = [check["text"] for check in json.loads(ran.stdout) if check["name"] == "gpu"]
    assert len(texts) == len(DEVICES)
    for device, text in zip(DEVICES, texts, strict=True):
        assert f"device {device.ordinal}: {device.name}, compute capability {device.compute_capability}" in text


def test_ordinal_that_is_not_there_is_exit_8_and_lists_the_gpus(tmp_path, model):
    ran = enginecache("get", model, "--dim", "batch=1", "--device", "99", folder=tmp_path / "cache")
    assert (ran.returncode, ran.stdout) == (8, "")
    assert DEVICES[0].name in ran.stderr


def test_request_without_a_target_is_for_the_gpu_here_or_says_why_not(tmp_path, model):
    ran = enginecache("explain", model, "--dim", "batch=1", "--json", folder=tmp_path / "cache")
    if ran.returncode == 0:
        target = json.loads(ran.stdout)["fields"]["target"]
        assert target["compute_capabilities"] == [list(DEVICES[0].compute_capability)]
    else:
        assert (ran.returncode, ran.stdout) == (8, "")
        assert "cannot build for" in ran.stderr or "TensorRT" in ran.stderr
