"""Builder options and sizes."""

from dataclasses import fields
from pathlib import Path

import pytest

from enginecache.errors import OptionError
from enginecache.files.units import format_size, parse_limit, parse_size, parse_workspace
from enginecache.key.options import MIB, BuildOptions, PluginLibrary


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 1 << 30),
        ("1g", 1 << 30),
        ("512M", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("65536", 65536),
        ("10 KB", 10240),
        ("2T", 2 << 40),
    ],
)
def test_sizes_are_read_in_powers_of_1024(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1X", "1GiBs", "1 0", "0x10", "nan"])
def test_other_sizes_are_refused(text):
    with pytest.raises(OptionError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1 << 30, "1 GiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_shown(size, text):
    assert format_size(size) == text


def test_every_option_says_whether_and_why_it_is_keyed():
    for field in fields(BuildOptions):
        assert isinstance(field.metadata["keyed"], bool)
        assert field.metadata["reason"]
    assert set(BuildOptions().keyed()) == {field.name for field in fields(BuildOptions) if field.metadata["keyed"]}


@pytest.mark.parametrize(
    "values",
    [{"workspace_bytes": 0}, {"workspace_bytes": 1 << 63}, {"optimization_level": 6}, {"optimization_level": -1}],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(OptionError) as caught:
        BuildOptions(**values)
    assert caught.value.fix


def test_a_workspace_under_16_mib_is_warned_about_with_what_is_usual():
    (warning,) = BuildOptions(workspace_bytes=1 << 20).warnings()
    assert "1 MiB is very small" in warning
    assert "1GiB is usual" in warning
    assert BuildOptions(workspace_bytes=16 << 20).warnings() == ()
    assert BuildOptions().warnings() == ()


@pytest.mark.parametrize("value", [3.0, True, "3", 1e9])
@pytest.mark.parametrize("name", ["workspace_bytes", "optimization_level"])
def test_what_only_looks_like_an_integer_is_refused(name, value):
    with pytest.raises(OptionError, match="not a whole number"):
        BuildOptions(**{name: value})


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"precision": ("fp32",)}, "is not one of fp16, bf16, int8, fp8"),
        ({"precision": "fp16"}, "a string"),
        ({"precision": 5}, "precision is 5"),
        ({"builder_flags": "REFIT"}, "a string"),
        ({"hardware_compatibility": "AMPERE_PLUS"}, "is not one of none"),
        ({"version_compatible": 1}, "version_compatible is 1"),
        ({"strip_plan": None}, "strip_plan is None"),
        ({"builder_flags": ("SPARSE WEIGHTS",)}, "is not the name of a builder flag"),
        ({"builder_flags": ("TF32=ON",)}, "is not the name of a builder flag"),
        ({"builder_flags": (3,)}, "is not the name of a builder flag"),
        ({"builder_flags": ("TF32", "tf32=off")}, "both set and cleared"),
    ],
)
def test_values_of_other_kinds_are_refused(values, what):
    with pytest.raises(OptionError, match=what) as caught:
        BuildOptions(**values)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("flag", "option"),
    [
        ("FP16", "--fp16"),
        ("int8", "--int8"),
        ("version-compatible", "--version-compatible"),
        ("STRIP_PLAN", "--strip-plan"),
        ("DISABLE_TIMING_CACHE", "--no-timing-cache"),
    ],
)
def test_a_builder_flag_with_an_option_of_its_own_is_refused_with_that_option(flag, option):
    with pytest.raises(OptionError, match="its own option") as caught:
        BuildOptions(builder_flags=(flag,))
    assert option in caught.value.fix


def test_names_that_can_be_read_only_once_count_too():
    options = BuildOptions(precision=iter(["fp16"]), builder_flags=iter(["REFIT"]))
    assert (options.precision, options.builder_flags) == (("fp16",), ("REFIT",))


def test_a_flag_that_is_set_by_default_counts_as_omitted():
    assert BuildOptions(builder_flags=("TF32",)) == BuildOptions()


def test_names_are_brought_to_one_form():
    options = BuildOptions(precision=["int8", "fp16", "int8"], builder_flags=["tf32=off", "sparse-weights"])
    assert options.precision == ("fp16", "int8")
    assert options.builder_flags == ("SPARSE_WEIGHTS", "TF32=OFF")


def test_plugins_are_sorted_by_content_each_once():
    one, two = PluginLibrary(Path("b.so"), "1" * 64), PluginLibrary(Path("a.so"), "2" * 64)
    assert BuildOptions(plugins=(two, one, two)).plugins == (one, two)
    assert BuildOptions(plugins=(two, one)).keyed()["plugins"] == ["1" * 64, "2" * 64]


def test_integers_of_other_libraries_are_integers():
    import numpy as np

    assert BuildOptions(np.int64(1 << 30), np.int32(5)) == BuildOptions(1 << 30, 5)
    assert type(BuildOptions(np.int64(1 << 30)).workspace_bytes) is int


@pytest.mark.parametrize("text", ["1Gb", "512Mb", "1Gib", "8 Kb"])
def test_a_unit_of_bits_is_refused_with_the_unit_that_is_meant(text):
    with pytest.raises(OptionError, match="a unit of bits") as caught:
        parse_size(text)
    assert "iB" in caught.value.fix


@pytest.mark.parametrize("text", ["5EiB", "9" * 19 + "T", "4194305T"])
def test_an_absurd_size_is_refused(text):
    with pytest.raises(OptionError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "size"), [("1", MIB), ("1024", 1 << 30), ("0.5", MIB // 2), ("64KiB", 65536), ("7b", 7)]
)
def test_a_workspace_without_a_unit_counts_mebibytes_as_trtexec_does(text, size):
    assert parse_workspace(text) == size


def test_a_limit_without_its_unit_is_refused_and_not_taken_for_bytes():
    with pytest.raises(OptionError, match="less than any engine has") as caught:
        parse_limit("20")
    assert "20GiB" in caught.value.fix
    assert (parse_limit("0"), parse_limit("4KiB"), parse_limit("20971520")) == (0, 4096, 20 << 20)
