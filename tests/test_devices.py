import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from enginecache.devices import Device, NvmlGpu, find_device, list_devices, read_cuda, read_nvml
from enginecache.errors import NoDeviceError
from enginecache.targets import ComputeCapability, DeviceModel

H100 = Device(
    ordinal=0,
    name="NVIDIA H100 80GB HBM3",
    compute_capability=ComputeCapability(9, 0),
    sm_count=132,
    memory_bytes=85_017_493_504,
    uuid="GPU-00000000-aaaa",
    pci_bus_id="00000000:17:00.0",
    driver_version="580.65.06",
    cuda_driver_version=(13, 0),
)
L4 = replace(
    H100, name="NVIDIA L4", compute_capability=ComputeCapability(8, 9), sm_count=58, memory_bytes=24_152_899_584
)


def _gpus(*devices, mig=()):
    """The devices on one PCI bus, in this order, with UUIDs GPU-a0..., GPU-b1..., GPU-c2..., ..."""
    return tuple(
        NvmlGpu(replace(d, ordinal=i, uuid=f"GPU-{'abcdef'[i]}{i}-11", pci_bus_id=f"00000000:{i:02X}:00.0"), i in mig)
        for i, d in enumerate(devices)
    )


def _no_cuda():
    raise NoDeviceError("pycuda is not installed", "pip install pycuda")


def _listed(gpus, environ, cuda=_no_cuda):
    devices = list_devices(environ, lambda: gpus, cuda)
    assert [d.ordinal for d in devices] == list(range(len(devices)))
    return [d.uuid[4:6] for d in devices]


ALIKE = _gpus(H100, H100, H100)
MIXED = _gpus(L4, H100, L4)


# What CUDA_VISIBLE_DEVICES shows of three equal GPUs.
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["a0", "b1", "c2"]),
        ("0", ["a0"]),
        ("2,1", ["c2", "b1"]),
        (" 2 , 0 ", ["c2", "a0"]),
        ("0,2,-1,1", ["a0", "c2"]),
        ("1,7,0", ["b1"]),
        ("1,x,0", ["b1"]),
        ("1,,0", ["b1"]),
        ("GPU-b1-11", ["b1"]),
        ("GPU-c,GPU-a0", ["c2", "a0"]),
        ("GPU-c2,GPU-none,GPU-a0", ["c2"]),
        ("GPU-b,0", ["b1"]),
        ("0,GPU-b", ["a0"]),
    ],
)
def test_visible_devices_chooses_and_orders(visible, expected):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert _listed(ALIKE, environ) == expected


@pytest.mark.parametrize("visible", ["9", "NoDevFiles", "0,0", "0,1,0", "GPU-b,GPU-b1", "GPU-", "GPU-x", "²"])
def test_list_that_shows_no_gpu_says_so(visible):
    with pytest.raises(NoDeviceError, match="hides every GPU") as caught:
        _listed(ALIKE, {"CUDA_VISIBLE_DEVICES": visible})
    assert "--target" in caught.value.fix


@pytest.mark.parametrize("visible", ["", " ", "-1", "-1,0"])
def test_hidden_gpus_are_not_even_looked_for(visible):
    def nvml():
        pytest.fail("NVML was asked")

    with pytest.raises(NoDeviceError, match="hides every GPU"):
        list_devices({"CUDA_VISIBLE_DEVICES": visible}, nvml, _no_cuda)


def test_equal_gpus_need_no_cuda_whatever_nvmls_order():
    assert _listed(ALIKE[::-1], {"CUDA_VISIBLE_DEVICES": "1"}) == ["b1"]


@pytest.mark.parametrize(
    "other",
    [
        replace(H100, name="NVIDIA H200"),
        replace(H100, sm_count=114),
        replace(H100, memory_bytes=1),
        replace(H100, compute_capability=ComputeCapability(8, 0)),
    ],
)
def test_gpus_that_differ_in_one_thing_are_left_to_cuda(other):
    with pytest.raises(NoDeviceError, match=r"only CUDA knows the order.*pycuda is not installed") as caught:
        _listed(_gpus(H100, other), {})
    for way_out in ("enginecache[cuda]", "CUDA_VISIBLE_DEVICES=GPU-", "CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        assert way_out in caught.value.fix


def test_mixed_host_takes_cudas_order_and_nvmls_details():
    def cuda():
        return (replace(MIXED[1].device, ordinal=0, uuid="", driver_version=""),)

    (device,) = list_devices({}, lambda: MIXED, cuda)
    assert (device.name, device.uuid, device.driver_version) == (H100.name, "GPU-b1-11", "580.65.06")


def test_mixed_host_in_pci_order_needs_no_cuda():
    environ = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,0"}
    assert _listed(MIXED[::-1], environ) == ["b1", "a0"]


def test_mixed_host_with_named_uuids_needs_no_cuda():
    assert _listed(MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-b1-11"}) == ["b1"]
    assert _listed(MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-b"}) == ["c2", "b1"]


@pytest.mark.parametrize(
    ("gpus", "visible"),
    [
        (ALIKE, "MIG-11111111-2222"),
        (ALIKE, "MIG-GPU-a0-11/1/0"),
        (_gpus(H100, H100, mig={1}), None),
        (_gpus(H100, H100, mig={1}), "0"),
        (_gpus(H100, H100, mig={1}), "GPU-b"),
    ],
)
def test_mig_instances_are_left_to_cuda(gpus, visible):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with pytest.raises(NoDeviceError, match="MIG") as caught:
        _listed(gpus, environ)
    assert "enginecache[cuda]" in caught.value.fix

    instance = replace(gpus[0].device, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", sm_count=16)
    assert list_devices(environ, lambda: gpus, lambda: (instance,)) == (instance,)


def test_whole_gpu_beside_a_split_one_is_found_by_its_uuid():
    assert _listed(_gpus(H100, H100, mig={1}), {"CUDA_VISIBLE_DEVICES": "GPU-a"}) == ["a0"]


def test_cuda_is_asked_where_nvml_is_missing():
    def nvml():
        raise NoDeviceError("nvidia-ml-py is not installed")

    assert list_devices({}, nvml, lambda: (L4,)) == (L4,)
    with pytest.raises(NoDeviceError, match="nvidia-ml-py is not installed"):
        list_devices({}, nvml, _no_cuda)


def test_driver_without_gpus_is_an_error_with_a_way_out():
    with pytest.raises(NoDeviceError, match="shows no GPU") as caught:
        _listed((), {})
    assert "--target sm_89" in caught.value.fix


def test_find_device_takes_the_first_by_default():
    devices = (H100, replace(L4, ordinal=1))
    assert find_device(devices=lambda: devices) == H100
    assert find_device(1, devices=lambda: devices).name == "NVIDIA L4"


@pytest.mark.parametrize("ordinal", [2, -1])
def test_ordinal_out_of_range_lists_the_devices(ordinal):
    with pytest.raises(NoDeviceError, match=f"no device {ordinal}") as caught:
        find_device(ordinal, devices=lambda: (H100, replace(L4, ordinal=1)))
    assert "1: NVIDIA L4 (sm_89)" in caught.value.fix


def test_device_model_is_the_name_and_the_multiprocessors():
    assert H100.model == DeviceModel("NVIDIA H100 80GB HBM3", 132)


class FakeNvmlError(Exception):
    def __init__(self, value, text="Not Supported"):
        super().__init__(text)
        self.value = value


class FakeNvml:
    """Answers like pynvml for one H100; ``broken`` maps a call to the error code it fails with."""

    NVMLError = FakeNvmlError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, broken=None, **answers):
        self.broken = broken or {}
        self.open = 0
        self.answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": object(),
            "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetNumGpuCores": 16896,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85_017_493_504),
            "nvmlDeviceGetUUID": "GPU-00000000-aaaa",
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:17:00.0"),
            "nvmlDeviceGetMigMode": [0, 1],
            "nvmlSystemGetDriverVersion": "580.65.06",
            "nvmlSystemGetCudaDriverVersion_v2": 13000,
        } | answers

    def nvmlInit(self):  # noqa: N802
        self._fail("nvmlInit")
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def __getattr__(self, name):
        if name not in self.answers:
            raise AttributeError(name)

        def call(*_):
            self._fail(name)
            return self.answers[name]

        return call

    def _fail(self, name):
        if name in self.broken:
            raise FakeNvmlError(self.broken[name], f"{name} failed")


def test_nvml_describes_a_gpu_whole():
    nvml = FakeNvml()
    assert read_nvml(nvml) == (NvmlGpu(H100),)
    assert nvml.open == 0


def test_bytes_of_older_bindings_are_read_as_text():
    nvml = FakeNvml(
        nvmlDeviceGetName=H100.name.encode(),
        nvmlDeviceGetUUID=H100.uuid.encode(),
        nvmlDeviceGetPciInfo=SimpleNamespace(busId=b"00000000:17:00.0"),
        nvmlSystemGetDriverVersion=b"580.65.06",
    )
    assert read_nvml(nvml) == (NvmlGpu(H100),)


@pytest.mark.parametrize(
    ("capability", "cores", "sm_count"),
    [
        ((9, 0), 16896, 132),
        ((8, 0), 6912, 108),
        ((7, 0), 5120, 80),
        ((7, 5), 2560, 40),
        ((6, 0), 3584, 56),
        ((6, 1), 3584, 28),
        ((8, 6), 10496, 82),
        ((8, 9), 7424, 58),
        ((10, 0), 18944, 148),
        ((12, 0), 21760, 170),
    ],
)
def test_multiprocessors_follow_from_the_cores(capability, cores, sm_count):
    nvml = FakeNvml(nvmlDeviceGetCudaComputeCapability=capability, nvmlDeviceGetNumGpuCores=cores)
    assert read_nvml(nvml)[0].device.sm_count == sm_count


@pytest.mark.parametrize(("capability", "cores"), [((99, 0), 12800), ((9, 0), 100), ((9, 0), 0)])
def test_multiprocessors_are_never_guessed(capability, cores):
    nvml = FakeNvml(nvmlDeviceGetCudaComputeCapability=capability, nvmlDeviceGetNumGpuCores=cores)
    with pytest.raises(NoDeviceError, match=r"multiprocessors .* cannot be told") as caught:
        read_nvml(nvml)
    assert "enginecache[cuda]" in caught.value.fix
    assert nvml.open == 0


@pytest.mark.parametrize("code", [FakeNvml.NVML_ERROR_NOT_SUPPORTED, FakeNvml.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_gpu_that_knows_neither_mig_nor_memory_of_its_own_is_described(code):
    nvml = FakeNvml(broken={"nvmlDeviceGetMigMode": code, "nvmlDeviceGetMemoryInfo": code})
    assert read_nvml(nvml) == (NvmlGpu(replace(H100, memory_bytes=0)),)


def test_split_gpu_is_told_by_its_current_mode():
    assert read_nvml(FakeNvml(nvmlDeviceGetMigMode=[1, 0]))[0].has_mig


@pytest.mark.parametrize(
    "call",
    ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetNumGpuCores", "nvmlSystemGetDriverVersion"],
)
def test_call_that_nvml_does_not_support_is_an_error_and_not_a_guess(call):
    nvml = FakeNvml(broken={call: FakeNvml.NVML_ERROR_NOT_SUPPORTED})
    with pytest.raises(NoDeviceError, match=f"{call} failed") as caught:
        read_nvml(nvml)
    assert "--target sm_89" in caught.value.fix
    assert nvml.open == 0


def test_open_question_about_mig_is_not_answered_no():
    with pytest.raises(NoDeviceError, match="nvmlDeviceGetMigMode failed"):
        read_nvml(FakeNvml(broken={"nvmlDeviceGetMigMode": 999}))


def test_driver_that_does_not_start_is_an_error_with_a_way_out():
    with pytest.raises(NoDeviceError, match=r"no usable NVIDIA driver.*nvmlInit failed") as caught:
        read_nvml(FakeNvml(broken={"nvmlInit": 9}))
    assert "--target sm_89" in caught.value.fix


def test_bindings_without_a_call_are_told_to_be_too_old():
    nvml = FakeNvml()
    del nvml.answers["nvmlDeviceGetNumGpuCores"]
    with pytest.raises(NoDeviceError, match="nvidia-ml-py is too old") as caught:
        read_nvml(nvml)
    assert "--upgrade nvidia-ml-py" in caught.value.fix
    assert nvml.open == 0


class FakeCuda:
    """Answers like pycuda.driver for one H100, and has no way to make a context."""

    class Error(Exception):
        pass

    device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT="multiprocessors")

    def __init__(self, *, init_fails=False):
        self.init_fails = init_fails
        self.Device = FakeCudaDevice

    def init(self):
        if self.init_fails:
            raise self.Error("cuInit failed: no CUDA-capable device is detected")

    @staticmethod
    def get_driver_version():
        return 12080


class FakeCudaDevice:
    def __init__(self, ordinal):
        self.ordinal = ordinal

    @staticmethod
    def count():
        return 1

    def name(self):
        return H100.name

    def compute_capability(self):
        return (9, 0)

    def get_attribute(self, attribute):
        return {"multiprocessors": 132}[attribute]

    def total_memory(self):
        return H100.memory_bytes

    def pci_bus_id(self):
        return "0000:17:00.0"


def test_cuda_describes_a_gpu_without_a_context():
    expected = replace(H100, uuid="", driver_version="", cuda_driver_version=(12, 8))
    assert read_cuda(FakeCuda()) == (expected,)


def test_cuda_that_does_not_start_is_an_error_with_a_way_out():
    with pytest.raises(NoDeviceError, match="no CUDA-capable device") as caught:
        read_cuda(FakeCuda(init_fails=True))
    assert "--target sm_89" in caught.value.fix


def test_both_sources_name_the_same_card_by_the_same_bus_id():
    assert read_cuda(FakeCuda())[0].pci_bus_id == read_nvml(FakeNvml())[0].device.pci_bus_id


def _probe():
    try:
        return read_nvml()
    except NoDeviceError:
        return ()


HOST_GPUS = _probe()


@pytest.mark.skipif(bool(HOST_GPUS), reason="probe: NVML finds a GPU")
def test_host_without_gpu_is_a_clean_error_with_the_real_nvml():
    with pytest.raises(NoDeviceError) as caught:
        find_device()
    assert "--target sm_89" in caught.value.fix


@pytest.mark.gpu
@pytest.mark.skipif(not HOST_GPUS, reason="probe: NVML finds no GPU")
def test_real_gpus_are_described_whole():
    for gpu in HOST_GPUS:
        device = gpu.device
        assert device.name
        assert device.uuid.startswith("GPU-")
        assert device.sm_count > 0
        assert device.driver_version[0].isdigit()
        assert device.cuda_driver_version >= (11, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not HOST_GPUS, reason="probe: NVML finds no GPU")
def test_real_gpu_is_found_by_its_uuid():
    for gpu in HOST_GPUS:
        if not gpu.has_mig:
            (device,) = list_devices({"CUDA_VISIBLE_DEVICES": gpu.device.uuid})
            assert device == replace(gpu.device, ordinal=0)


@pytest.mark.gpu
@pytest.mark.skipif(not HOST_GPUS, reason="probe: NVML finds no GPU")
def test_real_cuda_and_nvml_agree():
    pytest.importorskip("pycuda.driver", reason="probe: pycuda cannot be imported", exc_type=ImportError)
    # A process of its own: CUDA reads the environment once, and stays initialised.
    code = (
        "from enginecache.devices import *\n"
        "key = lambda d: (d.ordinal, d.compute_capability, d.model)\n"
        "assert [key(d) for d in read_cuda()] == [key(d) for d in list_devices()]\n"
    )
    environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)


def test_importing_the_module_loads_no_gpu_library():
    code = "import sys, enginecache.placement; sys.exit(bool({'pynvml', 'pycuda', 'tensorrt'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
