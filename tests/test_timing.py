from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import H100, TOOLCHAIN
from records import hex_of

from enginecache.host.targets import ComputeCapability
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.pipeline.timing_caches import TimingCaches
from enginecache.storage.folder import Root
from enginecache.storage.side_caches import MAX_BYTES

TENSORRT = replace(TOOLCHAIN, flavour="tensorrt", version="11.4.0.106")
OPTIONS = BuildOptions()


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def caches(root):
    return TimingCaches(root)


@pytest.fixture
def slot(caches):
    return caches.slot(TENSORRT, H100, OPTIONS)


def kept_file(root: Root, slot: str) -> Path:
    return root.path / "timing-caches" / slot


def test_tensorrt_rtx_and_builds_without_a_gpu_have_none(caches):
    assert caches.slot(TOOLCHAIN, H100, OPTIONS) is None
    assert caches.slot(TENSORRT, None, OPTIONS) is None


@pytest.mark.parametrize(
    ("toolchain", "device", "options"),
    [
        ({"version": "11.4.0.107"}, {}, {}),
        ({"cuda_major": 12}, {}, {}),
        ({"os": "windows"}, {}, {}),
        ({"cpu": "aarch64"}, {}, {}),
        ({}, {"name": "NVIDIA H200"}, {}),
        ({}, {"sm_count": 114}, {}),
        ({}, {"compute_capability": ComputeCapability(10, 0)}, {}),
        ({}, {}, {"precision": ("fp16",)}),
        ({}, {}, {"hardware_compatibility": "ampere_plus"}),
        ({}, {}, {"version_compatible": True}),
        ({}, {}, {"strip_plan": True}),
        ({}, {}, {"builder_flags": ("TF32=OFF",)}),
    ],
)
def test_each_thing_that_nvidia_binds_it_to_is_another_slot(caches, slot, toolchain, device, options):
    other = caches.slot(replace(TENSORRT, **toolchain), replace(H100, **device), replace(OPTIONS, **options))
    assert other != slot


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ({"uuid": "GPU-2", "pci_bus_id": "00000000:18:00.0", "ordinal": 1, "driver_version": "590.1"}, {}),
        ({}, {"workspace_bytes": 1 << 30, "optimization_level": 5, "convert_io": True}),
        ({}, {"plugins": (PluginLibrary(Path("plugin.so"), hex_of("plugin")),)}),
    ],
)
def test_equal_gpus_and_limits_of_the_search_share_one(caches, slot, device, options):
    other = caches.slot(TENSORRT, replace(H100, **device), replace(OPTIONS, **options))
    assert other == slot


def test_a_build_begins_with_what_the_last_one_left(caches, slot):
    first = caches.begin(slot)
    assert (first.data, first.digest) == (b"", None)
    assert caches.keep(first, b"a") == ()
    second = caches.begin(slot)
    assert second.data == b"a"
    assert caches.keep(second, b"a+b") == ()
    third = caches.begin(slot)
    assert (third.data, third.digest != second.digest) == (b"a+b", True)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-1] + b"?", lambda _: b""])
def test_a_damaged_one_is_never_given_to_tensorrt(caches, root, slot, damage):
    caches.keep(caches.begin(slot), b"timings")
    path = kept_file(root, slot)
    path.write_bytes(damage(path.read_bytes()))
    start = caches.begin(slot)
    assert (start.data, start.digest) == (b"", None)
    assert caches.keep(start, b"new") == ()
    assert caches.begin(slot).data == b"new"


def test_the_one_that_is_kept_last_stays_whole(caches, root, slot):
    starts = [caches.begin(slot) for _ in range(2)]
    for start, data in zip(starts, (b"a", b"b"), strict=True):
        assert caches.keep(start, data) == ()
    assert caches.begin(slot).data == b"b"
    assert list(root.tmp.iterdir()) == []


def test_a_build_that_measured_nothing_new_writes_nothing(caches, root, slot):
    caches.keep(caches.begin(slot), b"a")
    start = caches.begin(slot)
    caches.keep(caches.begin(slot), b"a+b")
    assert caches.keep(start, b"a") == ()
    assert caches.begin(slot).data == b"a+b"


def test_slots_are_kept_apart(caches, slot):
    other = caches.slot(TENSORRT, H100, BuildOptions(precision=("fp16",)))
    caches.keep(caches.begin(slot), b"a")
    assert caches.begin(other).data == b""


def test_what_cannot_be_written_is_a_warning(caches, root, slot):
    start = caches.begin(slot)
    (warning,) = caches.keep(start, bytes(MAX_BYTES + 1))
    assert "too many to keep" in warning
    root.tmp.rmdir()
    (warning,) = caches.keep(start, b"a")
    assert "nothing can be kept" in warning
