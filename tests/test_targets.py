import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginecache.errors import OptionError
from enginecache.host.targets import ComputeCapability, DeviceModel, Target

capabilities = st.builds(ComputeCapability, st.integers(1, 99), st.integers(0, 9))


@given(capabilities)
def test_every_spelling_reads_back_as_the_same_compute_capability(capability):
    joined = f"{capability.major}{capability.minor}"
    for text in (str(capability), capability.sm, joined, f"sm{joined}", f"compute_{joined}", f"  SM_{joined} "):
        assert ComputeCapability.parse(text) == capability


@pytest.mark.parametrize(
    ("text", "expected"),
    [("sm_89", (8, 9)), ("8.9", (8, 9)), ("89", (8, 9)), ("sm_120", (12, 0)), ("12.0", (12, 0)), ("120", (12, 0))],
)
def test_known_spellings_are_read(text, expected):
    assert ComputeCapability.parse(text) == expected


@pytest.mark.parametrize("text", ["sm_90a", "90a", "9.0a", "sm_100f", "compute_120A"])
def test_architecture_specific_suffix_is_refused_and_the_plain_spelling_is_named(text):
    with pytest.raises(OptionError, match="architecture-specific") as caught:
        ComputeCapability.parse(text)
    plain = caught.value.fix.split()[-1].rstrip(".")
    assert ComputeCapability.parse(plain).sm == plain


@pytest.mark.parametrize(
    "text",
    ["", "8", "8.", "8.90", ".9", "0.9", "089", "sm_", "sm_8", "sm-89", "1200", "-89", "8,9", "٨٩", "h100", "sm_89 x"],
)
def test_anything_else_is_refused(text):
    with pytest.raises(OptionError, match="not a compute capability"):
        ComputeCapability.parse(text)


@pytest.mark.parametrize(
    ("text", "sm"),
    [
        *(("L4", "sm_89"), ("l40s", "sm_89"), ("ada", "sm_89"), ("NVIDIA GeForce RTX 4090", "sm_89")),
        *(("RTX 6000 Ada", "sm_89"), ("A10", "sm_86"), ("a10g", "sm_86"), ("A40", "sm_86"), ("rtx3080ti", "sm_86")),
        *(("RTX A6000", "sm_86"), ("RTX A1000", "sm_86"), ("Tesla T4", "sm_75"), ("A100-SXM4-80GB", "sm_80")),
        *(("A30", "sm_80"), ("H100", "sm_90"), ("NVIDIA H200", "sm_90"), ("GH200", "sm_90"), ("hopper", "sm_90")),
        *(("B200", "sm_100"), ("RTX 5090", "sm_120"), ("Jetson AGX Orin", "sm_87"), ("V100", "sm_70")),
    ],
)
def test_name_of_a_gpu_is_refused_with_its_compute_capability(text, sm):
    with pytest.raises(OptionError, match="not a compute capability") as caught:
        ComputeCapability.parse(text)
    advised = caught.value.fix.partition("--target ")[2].rstrip(".")
    assert advised == sm == ComputeCapability.parse(advised).sm


def test_other_text_is_refused_with_the_table_of_gpus():
    with pytest.raises(OptionError) as caught:
        ComputeCapability.parse("ampere")
    assert "L4, L40, L40S, RTX 40: 8.9" in caught.value.fix


@given(st.text())
def test_any_text_is_read_or_refused_and_never_fails_otherwise(text):
    try:
        capability = ComputeCapability.parse(text)
    except OptionError:
        return
    assert ComputeCapability.parse(str(capability)) == capability


@given(st.lists(capabilities, min_size=1, max_size=5))
def test_order_and_repetition_of_targets_do_not_matter(found):
    target = Target.parse(tuple(c.sm for c in found))
    assert target == Target.parse(tuple(str(c) for c in reversed(found + found)))
    assert list(target.compute_capabilities) == sorted(set(found))
    assert Target.parse(tuple(str(target).split(", "))) == target


def test_portable_stands_alone():
    assert Target.parse(("portable",)).is_portable
    assert Target.parse((" Portable", "portable")).is_portable
    with pytest.raises(OptionError, match="cannot be combined"):
        Target.parse(("portable", "sm_89"))


def test_no_target_at_all_does_not_mean_portable():
    with pytest.raises(OptionError, match="no target"):
        Target.parse(())


def test_target_shows_what_it_is():
    assert str(Target(())) == "portable"
    assert str(Target.parse(("120", "89"))) == "sm_89, sm_120"
    assert str(Target.parse(("90",))) == "sm_90"
    tuned = Target((ComputeCapability(9, 0),), DeviceModel("NVIDIA H200", 132))
    assert str(tuned) == "sm_90 (NVIDIA H200)"
