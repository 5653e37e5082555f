from dataclasses import replace

import pytest

from enginecache.errors import BackendError, NoDeviceError, TargetError, ToolchainError, UnsupportedOptionError
from enginecache.host.devices import Device
from enginecache.host.targets import ComputeCapability, DeviceModel, Reach, Target
from enginecache.host.toolchain import Toolchain, ToolchainFinding
from enginecache.key.options import BuildOptions
from enginecache.pipeline.placement import place, required_reach

TENSORRT = Toolchain("tensorrt", "10.16.1.11", 12, "linux", "x86_64")
RTX = Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64")
L4 = Device(
    0, "NVIDIA L4", ComputeCapability(8, 9), 58, 24_152_899_584, "GPU-1", "00000000:17:00.0", "580.65.06", (13, 0)
)
H100 = replace(L4, name="NVIDIA H100 80GB HBM3", compute_capability=ComputeCapability(9, 0), sm_count=132)
PORTABLE = Target.parse(("portable",))
SAME = BuildOptions(hardware_compatibility="same_compute_capability")
AMPERE_PLUS = BuildOptions(hardware_compatibility="ampere_plus")


class Host:
    """Installed TensorRT and GPUs of a host; counts the look-ups."""

    def __init__(self, *devices, tensorrt=True, rtx=True, rtx_version=RTX.version):
        self.devices = devices
        self.lookups = 0
        self.findings = (
            ToolchainFinding("tensorrt", TENSORRT)
            if tensorrt
            else ToolchainFinding("tensorrt", None, "tensorrt is not installed", "pip install tensorrt nvidia-ml-py"),
            ToolchainFinding("tensorrt-rtx", replace(RTX, version=rtx_version))
            if rtx
            else ToolchainFinding(
                "tensorrt-rtx",
                None,
                "tensorrt-rtx is not installed",
                "pip install tensorrt-rtx-cu13 nvidia-ml-py",
            ),
        )

    def find(self, ordinal):
        self.lookups += 1
        if not self.devices:
            raise NoDeviceError("no usable NVIDIA driver", "Name what to build for, such as --target sm_89.")
        try:
            return replace(self.devices[ordinal or 0], ordinal=ordinal or 0)
        except IndexError:
            raise NoDeviceError(f"there is no device {ordinal}", "Choose another.") from None

    def inspect(self, cuda_major):
        self.cuda_major = cuda_major
        return self.findings

    def place(self, backend, target=None, ordinal=None, **options):
        return place(
            backend,
            Target.parse((target,)) if isinstance(target, str) else target,
            ordinal,
            find=self.find,
            inspect=self.inspect,
            **options,
        )


def test_auto_takes_tensorrt_where_it_is_installed_and_a_gpu_is_here():
    host = Host(L4)
    placement = host.place("auto")
    assert (placement.toolchain, placement.device) == (TENSORRT, L4)
    assert placement.target == Target(((8, 9),), DeviceModel("NVIDIA L4", 58))
    assert placement.reasons == ("TensorRT 10.16.1.11 is installed, and builds on device 0 (NVIDIA L4, sm_89).",)
    assert host.lookups == 1


def test_auto_takes_tensorrt_where_the_gpu_is_the_target_and_the_key_is_the_same():
    assert Host(L4).place("auto", "sm_89") == Host(L4).place("auto")


def test_auto_takes_rtx_where_the_gpu_is_not_the_target():
    host = Host(H100)
    placement = host.place("auto", "sm_89")
    assert (placement.toolchain, placement.device) == (RTX, None)
    assert placement.target == Target.parse(("sm_89",))
    assert "device 0 (NVIDIA H100 80GB HBM3, sm_90) is not sm_89" in placement.reasons[0]
    assert placement.reasons[1] == "TensorRT-RTX 1.7.1.116 builds for sm_89, as asked."
    assert host.lookups == 1


def test_auto_takes_rtx_for_a_target_where_no_gpu_is_here():
    placement = Host().place("auto", "sm_89")
    assert placement.toolchain == RTX
    assert "no usable NVIDIA driver" in placement.reasons[0]


def test_auto_takes_rtx_where_tensorrt_is_not_installed():
    placement = Host(L4, tensorrt=False).place("auto")
    assert (placement.toolchain, placement.device) == (RTX, L4)
    assert "tensorrt is not installed" in placement.reasons[0]


@pytest.mark.parametrize("target", [PORTABLE, Target.parse(("sm_89", "sm_120"))])
def test_auto_takes_rtx_for_portable_and_for_several_targets_without_looking_for_a_gpu(target):
    host = Host(L4)
    placement = host.place("auto", target)
    assert (placement.toolchain, placement.target, placement.device) == (RTX, target, None)
    assert host.lookups == 0


def test_auto_without_target_and_gpu_says_to_name_a_target():
    host = Host()
    with pytest.raises(NoDeviceError, match="no usable NVIDIA driver") as caught:
        host.place("auto")
    assert "--target sm_89" in caught.value.fix
    assert host.lookups == 1


def test_auto_with_rtx_alone_and_no_gpu_puts_the_way_out_first():
    with pytest.raises(NoDeviceError) as caught:
        Host(tensorrt=False).place("auto")
    assert caught.value.fix.splitlines()[0].startswith("Name what to build for")


def test_auto_with_nothing_installed_names_both_extras():
    with pytest.raises(ToolchainError, match=r"tensorrt is not installed; tensorrt-rtx is not installed") as caught:
        Host(L4, tensorrt=False, rtx=False).place("auto")
    assert "pip install tensorrt nvidia-ml-py" in caught.value.fix
    assert "pip install tensorrt-rtx-cu13" in caught.value.fix


def test_auto_that_fits_neither_says_why_for_both():
    with pytest.raises(TargetError, match=r"is not sm_90; .* cannot build for sm_90") as caught:
        Host(L4).place("auto", "sm_90")
    assert caught.value.exit_code == 8
    with pytest.raises(TargetError, match=r"is not sm_89; tensorrt-rtx is not installed") as caught:
        Host(H100, rtx=False).place("auto", "sm_89")
    assert "pip install tensorrt-rtx-cu13" in caught.value.fix


def test_auto_with_an_ordinal_that_does_not_exist_is_an_error_and_not_another_flavour():
    with pytest.raises(NoDeviceError, match="no device 3"):
        Host(L4).place("auto", "sm_89", 3)


def test_auto_with_an_ordinal_that_is_not_the_target_is_an_error():
    host = Host(L4, H100)
    assert host.place("auto", "sm_90", 1).device.ordinal == 1
    with pytest.raises(TargetError, match="not among the targets"):
        host.place("auto", "sm_89", 1)


def test_tensorrt_refuses_a_target_that_is_not_the_gpu_here():
    with pytest.raises(TargetError, match="is not sm_89") as caught:
        Host(H100).place("tensorrt", "sm_89")
    for way_out in ("--device", "--target sm_90", "--backend tensorrt-rtx"):
        assert way_out in caught.value.fix


def test_tensorrt_builds_on_the_gpu_of_the_ordinal():
    placement = Host(L4, H100).place("tensorrt", None, 1)
    assert placement.target == Target(((9, 0),), H100.model)
    assert placement.device.ordinal == 1


def test_tensorrt_refuses_several_targets_and_portable():
    with pytest.raises(TargetError, match="one GPU, not for sm_89, sm_120"):
        Host(L4).place("tensorrt", Target.parse(("sm_89", "sm_120")))
    with pytest.raises(TargetError, match="no portable target"):
        Host(L4).place("tensorrt", PORTABLE)


def test_tensorrt_needs_a_gpu():
    with pytest.raises(NoDeviceError):
        Host().place("tensorrt", "sm_89")


def test_tensorrt_plan_that_is_not_tuned_has_no_device_model():
    assert Host(L4).place("tensorrt", options=SAME).target == Target(((8, 9),))


def test_ampere_plus_has_one_target_on_whichever_gpu_it_is_built():
    targets = {Host(device).place("tensorrt", options=AMPERE_PLUS).target for device in (L4, H100)}
    assert targets == {Target((ComputeCapability(8, 0),), and_later=True)}
    assert str(targets.pop()) == "sm_80 and later"


def test_ampere_plus_on_an_older_gpu_is_refused():
    turing = replace(L4, name="Tesla T4", compute_capability=ComputeCapability(7, 5))
    with pytest.raises(TargetError, match=r"8\.0 or later, and device 0") as caught:
        Host(turing).place("tensorrt", options=AMPERE_PLUS)
    assert "--hardware-compatibility" in caught.value.fix


@pytest.mark.parametrize("options", [SAME, AMPERE_PLUS, BuildOptions(version_compatible=True)])
def test_what_rtx_cannot_do_is_refused_with_what_can(options):
    with pytest.raises(UnsupportedOptionError, match="TensorRT-RTX has no") as caught:
        Host(L4).place("tensorrt-rtx", options=options)
    assert caught.value.fix
    with pytest.raises(UnsupportedOptionError, match="no TensorRT here can do this"):
        Host(L4, tensorrt=False).place("auto", "sm_89", options=options)
    assert Host(L4).place("auto", options=options).toolchain == TENSORRT


def test_driver_that_is_too_old_for_tensorrts_cuda_is_refused():
    old = replace(L4, driver_version="470.1", cuda_driver_version=(11, 4))
    with pytest.raises(ToolchainError, match=r"cannot run here: driver 470\.1") as caught:
        Host(old).place("tensorrt")
    assert "Update the NVIDIA driver" in caught.value.fix
    assert Host(old).place("auto").toolchain == RTX  # builds without the driver


def test_required_reach_is_what_the_target_stands_for():
    assert required_reach(Target.parse(("8.9", "8.6"))).to_texts() == ("8.6", "8.9")
    assert required_reach(Target((ComputeCapability(8, 0),), and_later=True)).to_texts() == ("8.0+",)
    assert required_reach(PORTABLE) == Reach.from_texts(["8.0", "8.6", "8.9", "12.0", "12.1"])


@pytest.mark.parametrize(("backend", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx-cu13")])
def test_named_flavour_that_is_missing_names_its_package(backend, package):
    host = Host(L4, tensorrt=False, rtx=False)
    with pytest.raises(ToolchainError) as caught:
        host.place(backend)
    assert f"pip install {package} " in caught.value.fix
    assert host.lookups == 0


def test_rtx_without_target_builds_for_the_gpu_here_under_the_key_of_its_target():
    here = Host(L4).place("tensorrt-rtx")
    assert here.device == L4
    assert here.target == Host().place("tensorrt-rtx", "8.9").target
    assert "device 0 (NVIDIA L4, sm_89)" in here.reasons[0]


def test_rtx_with_targets_looks_for_no_gpu():
    host = Host(L4)
    for target in ("sm_89", "portable", "sm_120"):
        assert host.place("tensorrt-rtx", target).device is None
    assert host.lookups == 0


def test_rtx_without_target_and_gpu_says_to_name_one():
    with pytest.raises(NoDeviceError) as caught:
        Host().place("tensorrt-rtx")
    assert "--target sm_89" in caught.value.fix


@pytest.mark.parametrize("target", [None, "sm_90"])
def test_rtx_refuses_hopper_before_any_build_and_names_what_it_supports(target):
    with pytest.raises(TargetError, match=r"cannot build for sm_90.*sm_75, sm_80, .*sm_121") as caught:
        Host(H100).place("tensorrt-rtx", target)
    assert "--backend tensorrt" in caught.value.fix


def test_way_to_install_tensorrt_is_given_once():
    with pytest.raises(BackendError) as caught:
        Host(tensorrt=False).place("auto", "sm_90")
    assert caught.value.fix.count("pip install") == 1


def test_ordinal_without_a_gpu_is_advised_to_be_left_out_where_a_target_was_named():
    for backend in ("auto", "tensorrt-rtx"):
        with pytest.raises(NoDeviceError) as caught:
            Host(tensorrt=False).place(backend, "sm_89", 0)
        assert "Leave --device out" in caught.value.fix
        assert "--target" not in caught.value.fix
    assert Host(tensorrt=False).place("auto", "sm_89").target == Target.parse(("sm_89",))


def test_rtx_refuses_several_targets_for_the_one_that_it_lacks():
    with pytest.raises(TargetError, match=r"cannot build for sm_90;"):
        Host().place("tensorrt-rtx", Target.parse(("sm_89", "sm_90")))


def test_newer_rtx_leaves_targets_to_the_builder():
    assert Host(rtx_version="1.8.0.5").place("tensorrt-rtx", "sm_90").target == Target(((9, 0),))
    assert Host(H100, rtx_version="1.8.0.5").place("tensorrt-rtx", "portable", 0).device == H100


def test_rtx_with_target_and_ordinal_checks_the_gpu():
    host = Host(L4, H100)
    assert host.place("tensorrt-rtx", Target.parse(("sm_89", "sm_120")), 0).device == L4
    assert host.place("tensorrt-rtx", "portable", 0).device == L4
    for target in ("sm_89", "portable"):
        with pytest.raises(TargetError, match=r"device 1 \(NVIDIA H100 80GB HBM3, sm_90\) is not among"):
            host.place("tensorrt-rtx", target, 1)


def test_portable_does_not_reach_turing():
    turing = replace(L4, compute_capability=ComputeCapability(7, 5))
    with pytest.raises(TargetError, match="not among the targets: portable"):
        Host(turing).place("tensorrt-rtx", "portable", 0)


def test_setting_for_the_cuda_version_reaches_the_search_for_toolchains():
    host = Host(L4)
    host.place("auto", cuda_major=12)
    assert host.cuda_major == 12
