"""Which fields of two keys differ, and which entry is nearest."""

from dataclasses import replace

from fakes import TOOLCHAIN
from hypothesis import given
from hypothesis import strategies as st
from test_key import KEY, OTHERS, keys

from enginecache.matching import differences, distance, nearest
from enginecache.options import BuildOptions


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
    assert str(difference) == "options.workspace_bytes: asked 1073741824, stored null"


def test_other_weights_are_said_in_words():
    (difference,) = differences(KEY.fields(), replace(KEY, model_weights="c" * 64).fields())
    assert "weights differ" in str(difference)
    assert "c" * 64 not in str(difference)


def test_a_field_of_another_release_differs():
    stored = KEY.fields()
    stored["options"]["of_the_future"] = True
    assert [difference.field for difference in differences(KEY.fields(), stored)] == ["options.of_the_future"]


def test_nearest_prefers_the_same_model_and_fewer_differences():
    other_options = replace(KEY, options=BuildOptions()).fields()
    other_weights = replace(KEY, model_weights="c" * 64).fields()
    other_build = replace(KEY, toolchain=replace(TOOLCHAIN, version="1.7.1.117")).fields()
    stranger = replace(KEY, model_weights="c" * 64, model_structure="d" * 64).fields()
    stored = [("weights", other_weights), ("stranger", stranger), ("build", other_build), ("options", other_options)]
    assert [name for name, _ in nearest(KEY.fields(), stored)] == ["options", "build", "weights"]


def test_nearest_is_limited():
    stored = [(index, replace(KEY, options=BuildOptions(index + 1)).fields()) for index in range(5)]
    assert [index for index, _ in nearest(KEY.fields(), stored, limit=2)] == [0, 1]


@given(keys, keys)
def test_keys_differ_in_a_field_exactly_if_they_differ(one, other):
    found = differences(one.fields(), other.fields())
    assert bool(found) == (one != other)
    assert (distance(found) > 0) == bool(found)


@given(st.lists(keys, max_size=4))
def test_the_key_itself_is_always_nearest(others):
    stored = [(index, key.fields()) for index, key in enumerate([*others, KEY])]
    found = nearest(KEY.fields(), stored)
    assert found[0][1] == ()
