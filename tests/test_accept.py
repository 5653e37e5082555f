"""The option ``accept``: engines that are served though they differ, and their marks. The builder counts."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from fakes import H100, SM_89, TOOLCHAIN, FakeBuilder

from enginecache.errors import OptionError
from enginecache.host.toolchain import ToolchainFinding
from enginecache.pipeline.placement import place

DIMS = {"batch": (1, 32, 64)}


@pytest.fixture
def builder():
    return FakeBuilder()


def damage(path):
    path.chmod(0o600)
    path.write_bytes(b"!" + path.read_bytes()[1:])


def h100_cache(open_cache, builder, model_name=H100.name, **changes):
    """A cache on a host with TensorRT and one GPU."""
    device = replace(H100, name=model_name, **changes)
    tensorrt = replace(TOOLCHAIN, flavour="tensorrt", version="10.16.1.11")
    findings = (ToolchainFinding("tensorrt", tensorrt), ToolchainFinding("tensorrt-rtx", None, "not installed", ""))
    found = functools.partial(place, find=lambda _: device, inspect=lambda _: findings)
    return open_cache(builder, place=found)


def test_exact_builds_where_compatible_takes_and_marks_another_device_models_engine(open_cache, builder, model):
    stored = h100_cache(open_cache, builder).get(model, dims=DIMS)
    there = h100_cache(open_cache, builder, "NVIDIA H200")
    taken = there.get(model, dims=DIMS, accept="compatible")
    assert (taken.outcome, taken.key, taken.digest) == ("compatible", stored.key, stored.digest)
    assert taken.requested_key != taken.key
    assert [reason.code for reason in taken.reasons] == ["other_device_model"]
    assert (builder.count, there.stats().misses) == (1, 1)
    assert there.get(model, dims=DIMS, accept="compatible", offline=True).outcome == "compatible"
    own = there.get(model, dims=DIMS)
    assert (own.outcome, own.key) == ("built", taken.requested_key)
    assert there.get(model, dims=DIMS, accept="compatible").outcome == "hit"


def test_compatible_prefers_what_differs_least(open_cache, builder, model):
    cache = h100_cache(open_cache, builder)
    cache.get(model, dims=DIMS, hardware_compatibility="ampere_plus")
    near = cache.get(model, dims={"batch": (1, 16, 64)})
    h100_cache(open_cache, builder, "NVIDIA H200").get(model, dims={"batch": (1, 64, 64)})
    taken = cache.get(model, dims=DIMS, accept="compatible")
    assert taken.key == near.key


def test_compatible_builds_where_nothing_stored_runs_here(open_cache, builder, model):
    h100_cache(open_cache, builder).get(model, dims=DIMS)
    ada = h100_cache(open_cache, builder, "NVIDIA L4", compute_capability=SM_89)
    assert ada.get(model, dims=DIMS, accept="compatible").outcome == "built"


def test_compatible_passes_over_a_damaged_engine(open_cache, builder, model):
    stored = h100_cache(open_cache, builder).get(model, dims=DIMS)
    damage(stored.path)
    there = h100_cache(open_cache, builder, "NVIDIA H200")
    assert there.get(model, dims=DIMS, accept="compatible").outcome == "built"
    assert list(there.root.quarantine.iterdir())


def test_rebuild_takes_no_other_engine(open_cache, builder, model):
    h100_cache(open_cache, builder).get(model, dims=DIMS)
    there = h100_cache(open_cache, builder, "NVIDIA H200")
    assert there.get(model, dims=DIMS, accept="compatible", rebuild=True).outcome == "built"


def test_one_ampere_plus_engine_serves_every_later_gpu_as_a_hit(open_cache, builder, model):
    ask = {"dims": DIMS, "hardware_compatibility": "ampere_plus"}
    built = h100_cache(open_cache, builder).get(model, **ask)
    ada = h100_cache(open_cache, builder, "NVIDIA L4", compute_capability=SM_89)
    assert (ada.get(model, **ask).outcome, ada.get(model, **ask).key) == ("hit", built.key)
    assert built.record.compute_capabilities == ("8.0+",)


def test_explain_gives_every_stored_engine_a_verdict(open_cache, builder, model):
    cache = h100_cache(open_cache, builder)
    near = cache.get(model, dims={"batch": (1, 16, 64)})
    far = cache.get(model, dims=DIMS, workspace_bytes=1 << 30)
    explained = cache.explain(model, dims=DIMS)
    assert [(c.record.key, c.verdict.level) for c in explained.candidates] == [
        (near.key, "compatible"),
        (far.key, "refused"),
    ]
    assert (explained.verdict, explained.entry) == ("miss", None)
    taken = cache.explain(model, dims=DIMS, accept="compatible")
    assert (taken.verdict, taken.entry.key) == ("compatible", near.key)
    assert [reason.code for reason in taken.reasons] == ["differs", "containing_profile"]


def test_a_driver_older_than_the_builds_is_told_and_a_newer_one_is_not(open_cache, builder, model):
    h100_cache(open_cache, builder, driver_version="580.65.06").get(model, dims=DIMS)
    older = h100_cache(open_cache, builder, driver_version="575.10").get(model, dims=DIMS)
    assert [reason.code for reason in older.reasons] == ["exact", "older_driver"]
    newer = h100_cache(open_cache, builder, driver_version="600.1").get(model, dims=DIMS)
    assert [reason.code for reason in newer.reasons] == ["exact"]


def test_plugins_count_by_content_and_a_missing_one_is_bad_input(open_cache, builder, model, tmp_path):
    cache = open_cache(builder)
    one, same, other = (tmp_path / name for name in ("one.so", "same.so", "other.so"))
    one.write_bytes(b"plugin")
    same.write_bytes(b"plugin")
    other.write_bytes(b"another")
    built = cache.get(model, dims=DIMS, plugins=[one])
    assert cache.get(model, dims=DIMS, plugins=[same]).outcome == "hit"
    assert cache.get(model, dims=DIMS, plugins=[other]).key != built.key
    assert cache.get(model, dims=DIMS).key != built.key
    assert [library.path for library in builder.requests[0].options.plugins] == [one]
    with pytest.raises(OptionError, match=r"nothing\.so cannot be read: No such file") as caught:
        cache.get(model, dims=DIMS, plugins=[tmp_path / "nothing.so"])
    assert "Check the path" in caught.value.fix
