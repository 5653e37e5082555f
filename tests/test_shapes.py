"""The syntax of shapes on the command line."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginecache.errors import ProfileError
from enginecache.key.shape_syntax import parse_dim, parse_shapes, quote_shape, shape_flags


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("x:1x3x32x32", {"x": (1, 3, 32, 32)}),
        ("x:1x3,y:1x10", {"x": (1, 3), "y": (1, 10)}),
        ("layer/in:0:4x5", {"layer/in:0": (4, 5)}),
        ('"a,b":1x2,c:3', {"a,b": (1, 2), "c": (3,)}),
        ("'a:b':7", {"a:b": (7,)}),
        ("scalar:", {"scalar": ()}),
        ("starts:-1x0", {"starts": (-1, 0)}),
        (" x : 1x2 , y : 3 ", {"x": (1, 2), "y": (3,)}),
    ],
)
def test_shapes_are_read_as_trtexec_reads_them(text, shapes):
    assert parse_shapes(text) == shapes


@pytest.mark.parametrize(
    "text", ["", "x", "x:1x", ":1x2", "x:ax2", "x:1,,y:2", "x:1 2", "x:1.5", "x:1x2,x:3x4", "'x:1"]
)
def test_other_texts_are_refused_with_the_form_to_use(text):
    with pytest.raises(ProfileError) as caught:
        parse_shapes(text)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "dim"),
    [
        ("batch=1:32:64", ("batch", (1, 32, 64))),
        ("batch=8", ("batch", (8, 8, 8))),
        ("a=b=1:2:3", ("a=b", (1, 2, 3))),
        ("past + 1=0:1:2", ("past + 1", (0, 1, 2))),
    ],
)
def test_dims_are_read(text, dim):
    assert parse_dim(text) == dim


@pytest.mark.parametrize(
    "text", ["batch", "batch=", "=1:2:3", "batch=1:2", "batch=-1:2:3", "batch=1:2:x", "batch=1:2:3:4"]
)
def test_other_dims_are_refused(text):
    with pytest.raises(ProfileError, match="MIN:OPT:MAX"):
        parse_dim(text)


names = st.text(st.characters(blacklist_characters="\"'", blacklist_categories=["Cs"]), min_size=1).filter(
    lambda name: name == name.strip()
)
sizes = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)


@given(st.dictionaries(names, sizes, min_size=1, max_size=3))
def test_flags_that_are_printed_are_read_back(shapes):
    flags = shlex.split(shape_flags({name: (shape, shape, shape) for name, shape in shapes.items()}))
    assert flags[0] == "--min-shapes"
    assert parse_shapes(flags[1]) == shapes


@pytest.mark.parametrize(("name", "quoted"), [("x", "x:1x2"), ("a,b", '"a,b":1x2'), ("it's", '"it\'s":1x2')])
def test_names_are_quoted_where_they_must_be(name, quoted):
    assert quote_shape(name, (1, 2)) == quoted
    assert parse_shapes(quoted) == {name: (1, 2)}
