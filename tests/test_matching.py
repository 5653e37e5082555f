"""Differences between two keys, and the verdict on a stored engine."""

from dataclasses import replace

import pytest
from fakes import H100, TOOLCHAIN
from hypothesis import example, given
from hypothesis import strategies as st
from test_key import KEY, OTHERS, keys

from enginecache.host.targets import AMPERE, ComputeCapability, DeviceModel, Reach, Target
from enginecache.key.matching import Verdict, differences, distance, judge
from enginecache.key.options import HARDWARE_COMPATIBILITIES, BuildOptions
from enginecache.key.profiles import Profile, ShapeRange
from enginecache.pipeline.placement import required_reach


def test_equal_keys_do_not_differ():
    assert differences(KEY.fields(), KEY.fields()) == ()


def test_each_keyed_field_is_named_when_it_differs():
    for name, other in OTHERS.items():
        found = [difference.field for difference in differences(KEY.fields(), other.fields())]
        group = name.split(":")[0].split(".")[0]
        assert found, name
        assert all(field.startswith(group) for field in found), (name, found)


def test_a_difference_says_what_was_asked_and_what_is_stored():
    (difference,) = differences(KEY.fields(), replace(KEY, options=BuildOptions()).fields())
    assert str(difference) == "options.workspace_bytes: asked 1073741824, stored none"


def test_other_weights_are_said_in_words():
    (difference,) = differences(KEY.fields(), replace(KEY, model_weights="c" * 64).fields())
    assert "weights differ" in str(difference)
    assert "c" * 64 not in str(difference)


def test_a_field_of_another_release_differs():
    stored = KEY.fields()
    stored["options"]["of_the_future"] = True
    assert [difference.field for difference in differences(KEY.fields(), stored)] == ["options.of_the_future"]


@given(keys, keys)
def test_keys_differ_in_a_field_exactly_if_they_differ(one, other):
    found = differences(one.fields(), other.fields())
    assert bool(found) == (one != other)
    assert (distance(found) > 0) == bool(found)


TENSORRT = replace(TOOLCHAIN, flavour="tensorrt", version="10.16.1.11")
HOPPER = ComputeCapability(9, 0)
H200 = DeviceModel("NVIDIA H200", 132)


def tuned(device=H100.model, capability=HOPPER, **changes):
    return replace(KEY, toolchain=TENSORRT, target=Target((capability,), device), **changes)


def wide(level, capability=HOPPER, **changes):
    target = Target((AMPERE,), and_later=True) if level == "ampere_plus" else Target((capability,))
    options = BuildOptions(1 << 30, hardware_compatibility=level)
    return replace(KEY, toolchain=TENSORRT, target=target, options=options, **changes)


def verdict_on(asked, stored, reach=None) -> Verdict:
    reach = required_reach(stored.target) if reach is None else Reach.from_texts(reach)
    return judge(asked.fields(), required_reach(asked.target), stored.fields(), reach)


def codes(verdict):
    return [reason.code for reason in verdict.reasons]


def test_the_same_key_is_exact():
    verdict = verdict_on(KEY, KEY)
    assert (verdict.level, codes(verdict), verdict.differing) == ("exact", ["exact"], ())


def test_the_same_key_is_refused_where_its_plan_does_not_reach():
    verdict = verdict_on(KEY, KEY, ["8.6"])
    assert (verdict.level, codes(verdict)) == ("refused", ["reach"])
    assert "it runs on compute capability 8.6, and 8.9 is asked for" in verdict.reasons[0].text


def test_another_device_model_of_the_same_compute_capability_is_compatible():
    verdict = verdict_on(tuned(), tuned(H200))
    assert (verdict.level, codes(verdict)) == ("compatible", ["other_device_model"])
    assert "tuned for NVIDIA H200 (132 SMs), not for NVIDIA H100 80GB HBM3" in verdict.reasons[0].text


@pytest.mark.parametrize(
    "device",
    [
        DeviceModel("NVIDIA H100 NVL", 133),  # more multiprocessors than are here
        DeviceModel("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16),
    ],
)
def test_a_plan_tuned_for_a_larger_gpu_or_an_instance_is_refused(device):
    assert verdict_on(tuned(), tuned(device)).level == "refused"


def test_another_compute_capability_is_refused():
    verdict = verdict_on(tuned(), tuned(DeviceModel("NVIDIA L4", 58), ComputeCapability(8, 9)))
    assert verdict.level == "refused"
    assert "reach" in codes(verdict)


@pytest.mark.parametrize("level", ["same_compute_capability", "ampere_plus"])
def test_a_wider_hardware_compatibility_is_compatible(level):
    verdict = verdict_on(tuned(), wide(level))
    assert verdict.level == "compatible"
    assert set(codes(verdict)) == {"wider_reach"}
    assert verdict_on(wide(level), tuned()).level == "refused"


def test_ampere_plus_does_not_reach_what_is_older():
    turing = tuned(DeviceModel("Tesla T4", 40), ComputeCapability(7, 5))
    assert codes(verdict_on(turing, wide("ampere_plus"))) == ["reach"]


def for_targets(*texts, **changes):
    return replace(KEY, target=Target(tuple(map(ComputeCapability.parse, texts))), **changes)


def test_a_tensorrt_rtx_plan_for_more_targets_serves_as_a_hit_and_one_for_fewer_does_not():
    both = for_targets("8.6", "8.9")
    verdict = verdict_on(KEY, both)
    assert (verdict.level, codes(verdict)) == ("exact", ["wider_reach"])
    assert "covers compute capability 8.9: it was built for several targets (8.6, 8.9)" in verdict.reasons[0].text
    assert "not measured" in verdict.reasons[0].text
    assert verdict_on(both, KEY).level == "refused"
    assert verdict_on(for_targets("8.0", "8.9"), both).level == "refused"


def test_the_portable_plan_serves_each_of_its_targets_and_only_an_equal_reach_serves_portable():
    portable = for_targets()
    assert verdict_on(for_targets("8.0", "12.1"), portable).level == "exact"
    assert verdict_on(for_targets("7.5"), portable).level == "refused"
    assert verdict_on(portable, for_targets("8.0", "8.6", "8.9", "12.0")).level == "refused"
    assert codes(verdict_on(portable, for_targets("8.0", "8.6", "8.9", "12.0", "12.1"))) == ["wider_reach"]


@pytest.mark.parametrize("name", [name for name in OTHERS if not name.startswith("target")])
def test_a_wider_reach_is_no_hit_where_anything_else_differs(name):
    wider = replace(OTHERS[name], target=Target((ComputeCapability(8, 6), ComputeCapability(8, 9))))
    assert verdict_on(KEY, wider).level != "exact"


def test_a_wider_reach_is_no_hit_where_the_builder_or_the_key_did_not_say_so():
    both = for_targets("8.6", "8.9")
    assert verdict_on(KEY, both, ["8.6"]).level == "refused"
    assert verdict_on(KEY, for_targets("8.6"), ["8.6", "8.9"]).level != "exact"


@pytest.mark.parametrize("stored", [KEY, for_targets("8.6", "8.9")])
def test_equal_fields_of_another_key_version_are_refused(stored):
    verdict = judge(
        KEY.fields(), required_reach(KEY.target), stored.fields(), required_reach(stored.target), stored_version=1
    )
    assert (verdict.level, codes(verdict)[0]) == ("refused", "differs")


def ranges(low, opt, high, **kind):
    return (Profile((("x", ShapeRange((low, 8), (opt, 8), (high, 8), **kind)),)),)


@pytest.mark.parametrize(
    ("stored", "level"),
    [
        (ranges(1, 8, 16), "compatible"),  # another optimum
        (ranges(1, 4, 17), "compatible"),
        (ranges(0, 4, 16), "compatible"),
        (ranges(2, 4, 16), "refused"),
        (ranges(1, 4, 15), "refused"),
        (ranges(1, 4, 16) * 2, "refused"),  # the index is part of the runtime API
        (ranges(1, 4, 32, is_values=True), "refused"),
        ((), "refused"),
        ((Profile((("z", ShapeRange((1, 8), (4, 8), (32, 8))),)),), "refused"),
        ((Profile((("x", ShapeRange((1, 8, 1), (4, 8, 1), (32, 8, 1))),)),), "refused"),
    ],
)
def test_profiles_serve_if_they_contain_the_asked_ranges(stored, level):
    verdict = verdict_on(KEY, replace(KEY, profiles=stored))
    assert verdict.level == level
    assert codes(verdict)[0] == {"compatible": "containing_profile", "refused": "differs"}[level]


ALWAYS_REFUSED = ("model.", "toolchain.", "conversion", "options.")


REFUSED = [n for n in OTHERS if n.startswith(ALWAYS_REFUSED) and n != "options.hardware_compatibility"]


@pytest.mark.parametrize("name", REFUSED)
def test_whatever_else_differs_is_refused(name):
    verdict = verdict_on(KEY, OTHERS[name])
    assert verdict.level == "refused"
    assert "differs" in codes(verdict)


def test_a_key_of_another_version_is_refused():
    stored = KEY.fields()
    del stored["options"]["precision"]
    assert judge(KEY.fields(), required_reach(KEY.target), stored, Reach.from_texts(["8.9"])).level == "refused"


capabilities = st.sampled_from([ComputeCapability(*c) for c in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))])
devices = st.sampled_from([H100.model, H200, DeviceModel("NVIDIA H100 80GB HBM3", 114)])
reaches = st.builds(Reach, st.lists(capabilities, min_size=1, max_size=3).map(tuple), st.booleans())
small_profiles = st.tuples(st.integers(1, 2), st.integers(2, 3), st.integers(3, 4)).map(lambda sizes: ranges(*sizes))


@st.composite
def tensorrt_keys(draw):
    level = draw(st.sampled_from(HARDWARE_COMPATIBILITIES))
    changes = {"profiles": draw(small_profiles)}
    if level == "none":
        return tuned(draw(devices), draw(capabilities), **changes)
    return wide(level, draw(capabilities), **changes)


@given(tensorrt_keys(), tensorrt_keys(), reaches)
@example(tuned(), wide("ampere_plus"), Reach((ComputeCapability(7, 5),)))
def test_nothing_whose_reach_does_not_cover_what_is_asked_is_ever_served(asked, stored, reach):
    verdict = judge(asked.fields(), required_reach(asked.target), stored.fields(), reach)
    if verdict.level != "refused":
        assert reach.covers(required_reach(asked.target))
        assert (asked.model_weights, asked.toolchain) == (stored.model_weights, stored.toolchain)
    assert verdict.reasons
    assert (verdict.level == "exact") == (asked == stored and reach.covers(required_reach(asked.target)))


@given(st.lists(tensorrt_keys(), max_size=5), tensorrt_keys())
def test_exact_is_preferred_to_everything_else(others, asked):
    verdicts = [verdict_on(asked, key) for key in [*others, asked]]
    best = min(verdicts, key=lambda verdict: verdict.rank)
    assert best.level == "exact"
    ranked = [verdict.level for verdict in sorted(verdicts, key=lambda verdict: verdict.rank)]
    assert ranked == sorted(ranked, key=["exact", "compatible", "refused"].index)


@given(reaches, reaches, capabilities)
@example(Reach.from_texts(["8.0", "9.0+"]), Reach.from_texts(["8.0+"]), ComputeCapability(8, 6))
def test_a_reach_that_covers_another_covers_each_of_its_gpus(one, other, capability):
    if one.covers(other) and other.covers_one(capability):
        assert one.covers_one(capability)
    assert Reach.from_texts(one.to_texts()) == one
