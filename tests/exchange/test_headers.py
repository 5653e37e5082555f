"""Headers of plans. The forms are synthetic; `test_foreign_rtx.py` reads real ones."""

import os
import random
from pathlib import Path

import pytest
from foreign_files import (
    H200,
    RTX_RELEASES,
    ep_context,
    model_connect,
    old_plan,
    rtx_plan,
    tensoracle,
    timing_cache,
    torch_tensorrt,
    trt_plan,
    ultralytics,
)
from hypothesis import given
from hypothesis import strategies as st

from enginecache.exchange.foreign import examine
from enginecache.exchange.headers import is_timing_cache, read_plan_header
from enginecache.exchange.loads_here import is_same_release

PLANS = {
    "rtx": rtx_plan(),
    "rtx 1.4": rtx_plan("1.4.0.76", mask=0x3E, cuda=12090),
    "trt": trt_plan(),
    "trt 10": trt_plan("10.3.0.26", size=5000),
}


@pytest.mark.parametrize("version", RTX_RELEASES)
def test_rtx_header_names_its_version_and_targets(version):
    cu12, cu13, default, nameable = RTX_RELEASES[version]
    for cuda in (cu12, cu13):
        header = read_plan_header(rtx_plan(version, mask=0b1100, cuda=cuda, size=500, weights=7))
        assert (header.flavour, header.tensorrt_version) == ("tensorrt-rtx", version)
        assert header.compute_capabilities == ("8.6", "8.9")
        assert header.declared_size_bytes == 500
        assert header.weights_bytes == 7
        assert header.cuda_version == (f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None)
        assert header.doubt == ""
    portable = read_plan_header(rtx_plan(version, mask=default)).compute_capabilities
    last = "12.0" if version.startswith("1.4") else "12.1"
    assert portable[0] == "8.0"
    assert portable[-1] == f"{last}+"
    everything = read_plan_header(rtx_plan(version, mask=nameable)).compute_capabilities
    assert everything[0] == "7.5"
    assert everything[-1] == last


@pytest.mark.parametrize("mask", [0, 1 << 7, 1 << 63, 0b1000001])
def test_targets_of_no_known_form_are_not_guessed(mask):
    header = read_plan_header(rtx_plan(mask=mask))
    assert header.compute_capabilities == ()
    assert "compute capabilities" in header.doubt


def test_newer_layout_is_not_called_damaged():
    header = read_plan_header(rtx_plan(layout=3))
    assert header.tensorrt_version is None
    assert "newer" in header.doubt


def test_trt_header_names_the_gpu_that_built_it():
    header = read_plan_header(trt_plan())
    assert (header.flavour, header.tensorrt_version, header.declared_size_bytes) == ("tensorrt", "8.6.0.12", 1200)
    built = header.built_on
    assert (built.compute_capability, built.sm_count) == ((9, 0), 132)
    assert (built.memory_bytes, built.l2_bytes, built.clock_khz) == (150_109_880_320, 62_914_560, 1_980_000)
    assert header.reach is None
    assert header.compute_capabilities == ("9.0",)


def test_trt_header_of_another_layout_keeps_version_and_size():
    plan = bytearray(trt_plan("10.3.0.26"))
    plan[80:84] = b"\xff\xff\xff\xff"
    header = read_plan_header(bytes(plan))
    assert (header.tensorrt_version, header.declared_size_bytes, header.built_on) == ("10.3.0.26", 1200, None)


@pytest.mark.parametrize("device", [(0, *H200[1:]), (9, 11, *H200[2:]), (*H200[:10], 0, *H200[11:])])
def test_impossible_gpu_is_not_believed(device):
    assert read_plan_header(trt_plan(device=device)).built_on is None


def test_plan_before_8_6_is_named_by_its_serialization_version():
    assert read_plan_header(old_plan(205)).tensorrt_version == "8.2"
    assert read_plan_header(old_plan(999)) is None


def test_timing_cache_is_no_plan_though_it_begins_as_an_old_one():
    data = timing_cache()
    assert is_timing_cache(data[:64], len(data))
    assert read_plan_header(data) is None
    found = examine(data, Path("x"))
    assert (found.kind, found.is_complete) == ("timing_cache", True)
    assert examine(old_plan(), Path("x")).kind == "plan"
    assert examine(data[:100], Path("x")).is_damaged


@pytest.mark.parametrize("name", PLANS)
def test_every_truncation_is_found(name):
    plan = PLANS[name]
    assert examine(plan, Path("x")).is_complete is True
    for size in range(len(plan)):
        found = examine(plan[:size], Path("x"))
        assert found.is_complete is not True
        assert found.is_damaged, size


@pytest.mark.parametrize("name", PLANS)
def test_trailing_bytes_are_found(name):
    found = examine(PLANS[name] + b"\0", Path("x"))
    assert (found.is_complete, found.is_damaged) == (False, True)


def _mutated(rng, plan):
    data = bytearray(plan[:600])
    for _ in range(rng.randint(1, 6)):
        way = rng.randrange(4)
        at = rng.randrange(min(len(data), 320)) if data else 0
        if way == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1 and data:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
        elif way == 2:
            del data[at : at + rng.randrange(64)]
        else:
            data[at:at] = rng.choice([b"vtrt", b"ftrt", b"ptrt", b"NGNE", b"\x10\x80\x01\x00", rng.randbytes(5)])
    return bytes(data)


OTHERS = [
    ultralytics(rtx_plan()),
    tensoracle(trt_plan()),
    torch_tensorrt(rtx_plan()),
    model_connect(),
    timing_cache(),
    old_plan(),
    ep_context(rtx_plan(), hardware_architecture="89"),
    ep_context("net.engine", embedded=False),
]


def _examine_mutated(count, seed):
    rng = random.Random(seed)
    plans = [*PLANS.values(), *OTHERS]
    verdicts = set()
    for _ in range(count):
        found = examine(_mutated(rng, rng.choice(plans)), Path("x"))
        verdicts.add((found.kind, found.is_complete))
        assert found.kind in {"plan", "unknown", "timing_cache", "onnx", "ep_context"}
        if found.kind == "plan" and found.is_complete:
            assert found.header.declared_size_bytes == found.plan_size_bytes
    assert {("plan", False), ("unknown", None)} <= verdicts


def test_mutated_headers_crash_nothing():
    _examine_mutated(2000, os.urandom(8))


@pytest.mark.reliability
def test_100_000_mutated_headers_crash_nothing():
    _examine_mutated(100_000, os.urandom(8))


@given(st.binary(max_size=200))
def test_no_bytes_crash_anything(data):
    for start in (b"", b"vtrt", b"ftrt\0\0\0\0", b"ptrt", b"\x08\x07", b"\x80\x04", b"BUNDLE\x01", b"TENSORACLE\x01"):
        examine(start + data, Path("x"))


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("8.6.0.12", "8.6.0", True),
        ("1.7.1.116", "1.7.1.116", True),
        ("1.7.1.116", "1.7.1.117", False),
        ("8.6.0.12", "8.6.1", False),
        ("8.2", "8.2.5", False),
    ],
)
def test_versions_are_of_one_release_as_far_as_they_go(one, other, is_same):
    assert is_same_release(one, other) is is_same
