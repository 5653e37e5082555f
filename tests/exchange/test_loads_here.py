"""Would it load here: a header refuses and explains, and never accepts."""

from dataclasses import replace
from pathlib import Path

import pytest
from foreign_files import ep_context, old_plan, rtx_plan, timing_cache, trt_plan, ultralytics

from enginecache.exchange.foreign import Note, examine
from enginecache.exchange.loads_here import Host, judge_file
from enginecache.host.devices import Device
from enginecache.host.targets import ComputeCapability
from enginecache.host.toolchain import Toolchain, ToolchainFinding

TURING, ADA, HOPPER, LATER = (ComputeCapability(*numbers) for numbers in ((7, 5), (8, 9), (9, 0), (13, 0)))
L4 = Device(0, "NVIDIA L4", ADA, 58, 24 << 30, "GPU-1", "00000000:01:00.0", "580.65.06", (13, 0))


def host(rtx="1.7.1.116", trt="8.6.0", device=L4, cuda_major=13):
    def finding(flavour, version):
        if version is None:
            return ToolchainFinding(flavour, None, f"{flavour} is not installed", "install it")
        return ToolchainFinding(flavour, Toolchain(flavour, version, cuda_major, "linux", "x86_64"))

    return Host((finding("tensorrt", trt), finding("tensorrt-rtx", rtx)), device, "" if device else "no driver")


def h200(sm_count=132):
    return replace(L4, name="NVIDIA H200", compute_capability=HOPPER, sm_count=sm_count)


def judged(data, here, loaded=()):
    verdict = judge_file(examine(data, Path("x.plan")), here, loaded)
    return verdict.verdict, [reason.code for reason in verdict.reasons]


@pytest.mark.parametrize(
    ("data", "here", "verdict"),
    [
        (rtx_plan(), host(), ("unknown", ["not_tried"])),
        (rtx_plan(), host(rtx=None), ("no", ["no_toolchain"])),
        (rtx_plan("1.6.1.120"), host(), ("no", ["version"])),
        (rtx_plan(mask=0b100), host(), ("no", ["compute_capability"])),
        (rtx_plan(mask=0x7E), host(device=replace(L4, compute_capability=LATER)), ("unknown", ["not_tried"])),
        (rtx_plan(), host(device=None), ("no", ["no_device"])),
        (rtx_plan("1.6.1.120", cuda=12090), host(rtx="1.6.1.120"), ("unknown", ["cuda", "not_tried"])),
        (rtx_plan()[:-1], host(), ("no", ["cut"])),
        (rtx_plan(layout=9), host(), ("unknown", ["layout", "compute_capability", "not_tried"])),
        (ultralytics(rtx_plan()), host(), ("no", ["wrapper"])),
        (trt_plan(), host(device=h200()), ("unknown", ["not_tried"])),
        (trt_plan(), host(device=h200(78)), ("unknown", ["device", "not_tried"])),
        (trt_plan(), host(), ("unknown", ["compute_capability", "not_tried"])),
        (trt_plan(), host(device=replace(L4, compute_capability=TURING)), ("no", ["compute_capability"])),
        (trt_plan(), host(trt="8.6.1.6", device=h200()), ("unknown", ["version", "not_tried"])),
        (trt_plan("8.6.1.6"), host(device=h200()), ("no", ["version"])),
        (trt_plan("10.3.0.26"), host(device=h200()), ("no", ["version"])),
        (old_plan(), host(), ("no", ["version"])),
        (timing_cache(), host(), ("no", ["not_a_plan"])),
        (b"text", host(), ("no", ["not_a_plan"])),
        (ep_context(rtx_plan()), host(), ("unknown", ["onnxruntime", "not_tried"])),
        (ep_context(rtx_plan(mask=1)), host(), ("no", ["compute_capability"])),
        (ep_context(b"qnn", source="QNN"), host(), ("no", ["not_a_plan"])),
    ],
)
def test_file_is_judged(data, here, verdict):
    assert judged(data, here) == verdict


def test_only_a_load_on_record_is_a_yes():
    loaded = (Note("loaded", "it was loaded here"),)
    assert judged(rtx_plan(), host(), loaded) == ("yes", ["loaded"])
    assert judged(rtx_plan(mask=1), host(), loaded) == ("no", ["compute_capability"])
    assert judged(rtx_plan(), host(), (Note("refused", "it was refused here"),)) == ("no", ["refused"])


def test_reasons_say_both_sides():
    (reason, _) = judge_file(examine(rtx_plan("1.4.0.76", mask=1), Path("x")), host()).reasons
    assert reason.text == "TensorRT-RTX 1.4.0.76 built it, and 1.7.1.116 is installed"
    found = judge_file(examine(b"\x08\x07" + b"\x3a\x00", Path("a b.onnx")), host())
    assert "enginecache get 'a b.onnx'" in found.reasons[0].text
