import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pynvml
import pytest

from enginecache.errors import NoDeviceError
from enginecache.host.devices import (
    CORES_PER_SM,
    Device,
    NvmlGpu,
    current_device,
    driver_problem,
    find_device,
    list_devices,
    read_cuda,
    read_nvml,
)
from enginecache.host.targets import ComputeCapability, DeviceModel
from enginecache.host.toolchain import NAMEABLE_COMPUTE_CAPABILITIES

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
    visible_as="GPU-00000000-aaaa",
)
H200 = replace(H100, name="NVIDIA H200", memory_bytes=150_754_820_096)
L4 = replace(
    H100, name="NVIDIA L4", compute_capability=ComputeCapability(8, 9), sm_count=58, memory_bytes=24_152_899_584
)


def _gpus(*devices, mig=()):
    """The devices on one PCI bus, in this order, with UUIDs GPU-a0..., GPU-b1..., GPU-c2..., ..."""
    named = [(i, f"GPU-{'abcdef'[i]}{i}-11", d) for i, d in enumerate(devices)]
    return tuple(
        NvmlGpu(replace(d, ordinal=i, uuid=uuid, visible_as=uuid, pci_bus_id=f"00000000:{i:02X}:00.0"), i in mig)
        for i, uuid, d in named
    )


def _by_cuda(*devices):
    """The devices as CUDA alone describes them, in this order."""
    return tuple(replace(d, ordinal=i, uuid="", driver_version="", visible_as="") for i, d in enumerate(devices))


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
    for way_out in ("pycuda", "CUDA_VISIBLE_DEVICES=GPU-", "CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        assert way_out in caught.value.fix


def test_mixed_host_takes_cudas_order_and_nvmls_details():
    shown = _by_cuda(MIXED[1].device, MIXED[0].device)
    first, second = list_devices({}, lambda: MIXED, lambda: shown)
    assert (first.ordinal, first.name, first.uuid, first.driver_version) == (0, H100.name, "GPU-b1-11", "580.65.06")
    assert (second.ordinal, second.name, second.uuid) == (1, L4.name, "GPU-a0-11")


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
    assert "pycuda" in caught.value.fix


def _instance(gpu):
    """A MIG instance of the GPU, as CUDA describes it."""
    return _by_cuda(replace(gpu.device, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", sm_count=16))[0]


@pytest.mark.parametrize(
    ("visible", "name_for_a_child"), [("MIG-11111111-2222", "MIG-11111111-2222"), ("1,0", "1"), (None, "")]
)
def test_mig_instance_is_what_cuda_says_and_has_not_its_cards_uuid(visible, name_for_a_child):
    gpus = _gpus(H100, H100, mig={1})
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    (device,) = list_devices(environ, lambda: gpus, lambda: (_instance(gpus[1]),))
    assert (device.name, device.sm_count) == ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16)
    assert (device.uuid, device.driver_version) == ("", "580.65.06")
    assert device.visible_as == name_for_a_child


def test_every_whole_gpu_is_named_for_a_child_by_its_uuid():
    devices = list_devices({"CUDA_VISIBLE_DEVICES": "2,GPU-a"}, lambda: ALIKE, _no_cuda)
    assert [d.visible_as for d in devices] == ["GPU-c2-11"]
    found = list_devices({}, lambda: MIXED, lambda: _by_cuda(MIXED[1].device))
    assert [d.visible_as for d in found] == ["GPU-b1-11"]


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        (None, 1, [""]),
        (" 3 , 1 ,nope", 2, ["3", "1"]),
        ("GPU-b,GPU-a", 2, ["GPU-b", "GPU-a"]),
    ],
)
def test_without_nvml_a_gpu_is_named_for_a_child_as_the_environment_names_it(visible, count, names):
    def nvml():
        raise NoDeviceError("nvidia-ml-py is not installed")

    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    devices = list_devices(environ, nvml, lambda: _by_cuda(*[L4] * count))
    assert [d.visible_as for d in devices] == names


def test_whole_gpu_beside_a_split_one_is_found_by_its_uuid():
    assert _listed(_gpus(H100, H100, mig={1}), {"CUDA_VISIBLE_DEVICES": "GPU-a"}) == ["a0"]


def test_cuda_is_asked_where_nvml_is_missing():
    def nvml():
        raise NoDeviceError("nvidia-ml-py is not installed")

    assert list_devices({}, nvml, lambda: _by_cuda(L4)) == _by_cuda(L4)
    with pytest.raises(NoDeviceError, match="nvidia-ml-py is not installed"):
        list_devices({}, nvml, _no_cuda)


def test_variable_that_was_changed_after_cuda_started_is_an_error():
    with pytest.raises(NoDeviceError, match="CUDA shows 2 GPUs, and CUDA_VISIBLE_DEVICES=1 can name 1") as caught:
        list_devices({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "x"}, lambda: MIXED, lambda: _by_cuda(L4, H100))
    assert "before the program starts" in caught.value.fix


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


def test_h100_and_h200_are_two_device_classes_and_two_equal_cards_are_one():
    assert H100.compute_capability == H200.compute_capability
    assert (H100.device_class, H200.device_class) == ("NVIDIA H100 80GB HBM3, 132 SMs", "NVIDIA H200, 132 SMs")
    assert H100.model != H200.model
    other_card = replace(
        H100, ordinal=3, uuid="GPU-1", pci_bus_id="x", driver_version="1", cuda_driver_version=(12, 0), memory_bytes=1
    )
    assert (other_card.device_class, other_card.model) == (H100.device_class, H100.model)
    assert replace(H100, sm_count=114).device_class != H100.device_class


def test_device_as_json_has_every_field_and_texts_for_versions():
    record = json.loads(json.dumps(replace(H200, l2_bytes=62_914_560).to_json()))
    assert record == {
        "ordinal": 0,
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "sm_count": 132,
        "memory_bytes": 150_754_820_096,
        "uuid": "GPU-00000000-aaaa",
        "pci_bus_id": "00000000:17:00.0",
        "driver_version": "580.65.06",
        "cuda_driver_version": "13.0",
        "l2_bytes": 62_914_560,
        "visible_as": "GPU-00000000-aaaa",
        "device_class": "NVIDIA H200, 132 SMs",
    }


@pytest.mark.parametrize(
    ("level", "cuda_major", "is_old"),
    [((13, 0), 13, False), ((13, 2), 12, False), ((12, 0), 12, False), ((12, 9), 13, True), ((11, 8), 12, True)],
)
def test_driver_is_too_old_when_its_cuda_is_of_an_earlier_major_version(level, cuda_major, is_old):
    problem = driver_problem(replace(H100, cuda_driver_version=level), cuda_major)
    assert bool(problem) == is_old
    if is_old:
        assert f"driver 580.65.06 is for CUDA {level[0]}.{level[1]}, and CUDA {cuda_major} is needed" in problem


def test_driver_of_unknown_version_is_still_told_to_be_too_old():
    problem = driver_problem(replace(H100, driver_version="", cuda_driver_version=(12, 8)), 13)
    assert problem == "the NVIDIA driver is for CUDA 12.8, and CUDA 13 is needed"


LIBCUDA = """
static int context = -1;
static const char *bus[] = {"0000:00:00.0", "0000:01:00.0", "0000:0a:00.0"};
int cuCtxGetDevice(int *device) { *device = context; return context < 0 ? 201 : 0; }
int cuDeviceGetPCIBusId(char *text, int size, int device) {
    int i = 0;
    if (device < 0 || device > 2) return 101;
    for (; i < size - 1 && bus[device][i]; i++) text[i] = bus[device][i];
    text[i] = 0;
    return 0;
}
void use(int device) { context = device; }
int cuInit(unsigned flags) { __builtin_trap(); }
"""

CHILD = """
import ctypes, json, os, sys
from dataclasses import replace
from enginecache.host.devices import Device, current_device
from enginecache.errors import NoDeviceError
from enginecache.host.targets import ComputeCapability

def listed():
    one = Device(0, "NVIDIA L4", ComputeCapability(8, 9), 58, 0, "", "", "", (13, 0))
    return tuple(replace(one, ordinal=i, pci_bus_id=f"00000000:{i:02X}:00.0") for i in range(2))

def answer():
    try:
        return current_device(listed).ordinal
    except NoDeviceError as error:
        return error.what

found = [answer()]
try:
    ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    sys.exit("libcuda was loaded")
except OSError:
    pass
cuda = ctypes.CDLL(sys.argv[1])
found.append(answer())
for device in (1, 0, 2, 7):
    cuda.use(device)
    found.append(answer())
print(json.dumps(found))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="probe: there is no gcc")
def test_current_device_is_that_of_the_cuda_context_and_asking_starts_no_cuda(tmp_path):
    library = tmp_path / "libcuda.so.1"
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    build = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, tmp_path / "cuda.c"]
    subprocess.run(build, check=True)
    # A process of its own: a library stays loaded.
    ran = subprocess.run([sys.executable, "-c", CHILD, library], capture_output=True, text=True, check=True)
    not_shown = "the GPU that this process uses, 00000000:0A:00.0, is not one that CUDA_VISIBLE_DEVICES shows"
    no_library, no_context, *with_context = json.loads(ran.stdout)
    assert (no_library, no_context) == (0, 0)
    assert with_context == [1, 0, not_shown, 0]


def test_current_device_without_cuda_is_the_one_that_cuda_would_use():
    def none():
        raise NoDeviceError("no driver")

    assert current_device(lambda: (H200, H100)) == H200
    with pytest.raises(NoDeviceError, match="no driver"):
        current_device(none)


class FakeNvmlError(Exception):
    def __init__(self, value, text="Not Supported"):
        super().__init__(text)
        self.value = value


class FakeNvml:
    """Answers like pynvml for one H100; ``broken`` maps a call to the error code it fails with."""

    NVMLError = FakeNvmlError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
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
    with pytest.raises(NoDeviceError, match=r"multiprocessors .* cannot be derived") as caught:
        read_nvml(nvml)
    assert "pycuda" in caught.value.fix
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


def test_driver_without_its_cuda_library_is_told_so():
    broken = {"nvmlSystemGetCudaDriverVersion_v2": FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND}
    nvml = FakeNvml(broken=broken)
    with pytest.raises(NoDeviceError, match=r"libcuda\.so\.1 is not found") as caught:
        read_nvml(nvml)
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in caught.value.fix
    assert nvml.open == 0


def test_constants_that_the_fake_has_are_those_of_the_real_nvml():
    for name in ("NOT_SUPPORTED", "LIBRARY_NOT_FOUND", "FUNCTION_NOT_FOUND"):
        assert getattr(FakeNvml, f"NVML_ERROR_{name}") == getattr(pynvml, f"NVML_ERROR_{name}")
    assert FakeNvml.NVML_DEVICE_MIG_ENABLE == pynvml.NVML_DEVICE_MIG_ENABLE
    assert all(hasattr(pynvml, name) for name in FakeNvml().answers)


def test_every_architecture_that_tensorrt_still_names_has_its_cores():
    assert {tuple(capability) for capability in NAMEABLE_COMPUTE_CAPABILITIES} <= CORES_PER_SM.keys()


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

    device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT="multiprocessors", L2_CACHE_SIZE="l2")

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
        return {"multiprocessors": 132, "l2": 52_428_800}[attribute]

    def total_memory(self):
        return H100.memory_bytes

    def pci_bus_id(self):
        return "0000:17:00.0"


def test_cuda_describes_a_gpu_without_a_context():
    (by_cuda,) = _by_cuda(H100)
    expected = replace(by_cuda, cuda_driver_version=(12, 8), l2_bytes=52_428_800)
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


def test_importing_the_module_loads_no_gpu_library():
    libraries = "{'pynvml', 'pycuda', 'tensorrt'}"
    code = f"import sys, enginecache.pipeline.placement; sys.exit(bool({libraries} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_uuid_may_be_of_either_case_and_a_bare_prefix_names_no_gpu():
    """As CUDA 13.0 on an H100, 2026-11-24."""
    assert _listed(ALIKE, {"CUDA_VISIBLE_DEVICES": "GPU-B1"}) == ["b1"]
    with pytest.raises(NoDeviceError, match="hides every GPU"):
        _listed(_gpus(H100), {"CUDA_VISIBLE_DEVICES": "GPU-"})
