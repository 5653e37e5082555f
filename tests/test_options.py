"""Builder options and sizes."""

from dataclasses import fields

import pytest

from enginecache.errors import OptionError
from enginecache.options import BuildOptions, format_size, parse_size


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
    assert BuildOptions().keyed() == {"workspace_bytes": None, "optimization_level": 3}


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


def test_integers_of_other_libraries_are_integers():
    import numpy as np

    assert BuildOptions(np.int64(1 << 30), np.int32(5)) == BuildOptions(1 << 30, 5)
    assert type(BuildOptions(np.int64(1 << 30)).workspace_bytes) is int
