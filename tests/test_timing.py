from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import H100, TOOLCHAIN
from records import hex_of

from enginecache.errors import BuilderCrashError
from enginecache.host.targets import ComputeCapability
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.pipeline import timing_caches
from enginecache.pipeline.timing_caches import ProcessMerge, TimingCaches, TimingSlot
from enginecache.storage.folder import Root
from enginecache.storage.locks import LocalKeyLocks
from enginecache.storage.side_caches import MAX_BYTES

TENSORRT = replace(TOOLCHAIN, flavour="tensorrt", version="11.4.0.106")
OPTIONS = BuildOptions()


def union(_slot: TimingSlot, current: bytes, ours: bytes) -> bytes:
    """A merger whose result tells what went in."""
    return b"+".join(sorted({*current.split(b"+"), *ours.split(b"+")}))


def refuse(_slot: TimingSlot, _current: bytes, _ours: bytes) -> None:
    return None


def crash(_slot: TimingSlot, _current: bytes, _ours: bytes) -> bytes:
    raise BuilderCrashError("the merger crashed")


def never(_slot: TimingSlot, _current: bytes, _ours: bytes) -> bytes:
    raise AssertionError("nothing was to be merged")


@pytest.fixture
def root(tmp_path):
    return Root.open(tmp_path / "cache")


@pytest.fixture
def caches(root):
    return lambda merge=union: TimingCaches(root, LocalKeyLocks(root), merge)


@pytest.fixture
def slot(caches):
    return caches().slot(TENSORRT, H100, OPTIONS)


def kept_file(root: Root, slot: TimingSlot) -> Path:
    return root.path / "timing-caches" / slot.name


def test_tensorrt_rtx_and_builds_without_a_gpu_have_none(caches):
    assert caches().slot(TOOLCHAIN, H100, OPTIONS) is None
    assert caches().slot(TENSORRT, None, OPTIONS) is None


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
    other = caches().slot(replace(TENSORRT, **toolchain), replace(H100, **device), replace(OPTIONS, **options))
    assert other.name != slot.name


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ({"uuid": "GPU-2", "pci_bus_id": "00000000:18:00.0", "ordinal": 1, "driver_version": "590.1"}, {}),
        ({}, {"workspace_bytes": 1 << 30, "optimization_level": 5, "convert_io": True}),
        ({}, {"plugins": (PluginLibrary(Path("plugin.so"), hex_of("plugin")),)}),
    ],
)
def test_equal_gpus_and_limits_of_the_search_share_one(caches, slot, device, options):
    other = caches().slot(TENSORRT, replace(H100, **device), replace(OPTIONS, **options))
    assert other.name == slot.name


def test_a_build_begins_with_what_the_last_one_left(caches, slot):
    first = caches().begin(slot)
    assert (first.data, first.digest) == (b"", None)
    assert caches(never).keep(first, b"a") == ()
    second = caches().begin(slot)
    assert second.data == b"a"
    assert caches(never).keep(second, b"a+b") == ()
    third = caches().begin(slot)
    assert (third.data, third.digest != second.digest) == (b"a+b", True)


def test_what_others_kept_meanwhile_is_merged_and_not_lost(caches, slot):
    starts = [caches().begin(slot) for _ in range(3)]
    for start, data in zip(starts, (b"a", b"b", b"c"), strict=True):
        assert caches().keep(start, data) == ()
    assert caches().begin(slot).data == b"a+b+c"


def test_an_equal_one_is_neither_merged_nor_written_again(caches, root, slot):
    starts = [caches().begin(slot) for _ in range(2)]
    caches(never).keep(starts[0], b"a")
    inode = kept_file(root, slot).stat().st_ino
    assert caches(never).keep(starts[1], b"a") == ()
    assert kept_file(root, slot).stat().st_ino == inode
    assert caches(never).keep(caches().begin(slot), b"a") == ()
    assert kept_file(root, slot).stat().st_ino == inode


def test_a_mismatch_is_never_ignored_and_what_is_kept_stays(caches, slot):
    start = caches().begin(slot)
    caches().keep(start, b"theirs")
    (warning,) = caches(refuse).keep(start, b"ours")
    assert "not kept" in warning
    assert "refuses to merge" in warning
    assert caches().begin(slot).data == b"theirs"


def test_a_merger_that_crashes_is_a_warning_and_what_is_kept_stays(caches, slot):
    start = caches().begin(slot)
    caches().keep(start, b"theirs")
    (warning,) = caches(crash).keep(start, b"ours")
    assert "the merger crashed" in warning
    assert caches().begin(slot).data == b"theirs"


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-1] + b"?", lambda _: b""])
def test_a_damaged_one_is_never_given_to_tensorrt(caches, root, slot, damage):
    caches().keep(caches().begin(slot), b"timings")
    path = kept_file(root, slot)
    path.write_bytes(damage(path.read_bytes()))
    start = caches().begin(slot)
    assert (start.data, start.digest) == (b"", None)
    assert caches(never).keep(start, b"new") == ()
    assert caches().begin(slot).data == b"new"


def test_one_that_was_damaged_during_the_build_is_replaced(caches, root, slot):
    caches().keep(caches().begin(slot), b"timings")
    start = caches().begin(slot)
    kept_file(root, slot).write_bytes(b"?")
    assert caches(never).keep(start, b"timings+new") == ()
    assert caches().begin(slot).data == b"timings+new"


def test_a_lock_that_stays_taken_is_a_warning_after_a_bounded_time(monkeypatch, caches, root, slot):
    monkeypatch.setattr(timing_caches, "LOCK_TIMEOUT_S", 0.1)
    start = caches().begin(slot)
    with LocalKeyLocks(root).hold(f"timing-{slot.name}", None):
        (warning,) = caches().keep(start, b"a")
    assert "timed out after 0.1 s" in warning
    assert caches().begin(slot).data == b""


def test_slots_do_not_wait_for_each_other(monkeypatch, caches, root, slot):
    monkeypatch.setattr(timing_caches, "LOCK_TIMEOUT_S", 0.1)
    other = caches().slot(TENSORRT, H100, BuildOptions(precision=("fp16",)))
    with LocalKeyLocks(root).hold(f"timing-{slot.name}", None):
        assert caches().keep(caches().begin(other), b"a") == ()


def test_what_cannot_be_written_is_a_warning(caches, root, slot):
    start = caches().begin(slot)
    (warning,) = caches().keep(start, bytes(MAX_BYTES + 1))
    assert "too many to keep" in warning
    root.tmp.rmdir()
    (warning,) = caches().keep(start, b"a")
    assert "nothing can be kept" in warning


MERGERS = {
    "merges": """
        import os
        told = {name: open(asked[name], "rb").read().decode() for name in ("current", "ours")}
        told |= {"flavour": asked["flavour"], "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "here": os.getcwd()}
        open(asked["merged"], "w").write(json.dumps(told))
    """,
    "refuses": "sys.exit(3)",
    "fails": "sys.exit('TensorRT said why')",
    "crashes": "import os; os.abort()",
    "hangs": "import time; time.sleep(60)",
    "forgets": "pass",
}


@pytest.fixture
def process_merge(monkeypatch, tmp_path, root, slot):
    """Merge with a script in TensorRT's place, in a child process as TensorRT would be."""

    def merge(what: str, timeout_s: float = 30.0) -> bytes | None:
        lines = ["import json, sys", "asked = json.loads(sys.stdin.readline())"]
        lines += [line.strip() for line in MERGERS[what].strip().splitlines()]
        (tmp_path / "scripted_merger.py").write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.setattr(timing_caches, "MERGER", "scripted_merger")
        merger = ProcessMerge(root, timeout_s, search_path=[str(tmp_path), *sys.path])
        return merger(slot, b"current timings", b"our timings")

    yield merge
    assert list(root.tmp.iterdir()) == []


def test_tensorrt_merges_in_a_child_that_sees_the_one_gpu(process_merge, root):
    told = json.loads(process_merge("merges"))
    assert told.pop("here").startswith(f"{root.tmp}/merge-")
    assert told == {"current": "current timings", "ours": "our timings", "flavour": "tensorrt", "gpu": H100.uuid}


def test_a_refusal_of_the_child_is_no_result(process_merge):
    assert process_merge("refuses") is None


@pytest.mark.parametrize(
    ("what", "reason"),
    [("fails", "TensorRT said why"), ("crashes", "ended by SIGABRT"), ("hangs", "more than 0.5 s")],
)
def test_a_child_that_fails_crashes_or_hangs_is_an_error_with_its_reason(process_merge, what, reason):
    with pytest.raises(BuilderCrashError, match=reason):
        process_merge(what, 0.5 if what == "hangs" else 30.0)


def test_a_child_that_writes_nothing_is_a_warning_of_the_build(monkeypatch, process_merge, caches, slot):
    start = caches().begin(slot)
    caches().keep(start, b"theirs")
    (warning,) = caches(lambda *_: process_merge("forgets")).keep(start, b"ours")
    assert "cannot be merged" in warning
    assert caches().begin(slot).data == b"theirs"
