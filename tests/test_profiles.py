"""From flags and a model's inputs to canonical profiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginecache.errors import ProfileError, printable
from enginecache.key.advice import flags_of
from enginecache.key.profiles import Profile, ProfileRequest, ShapeRange, resolve_profiles
from enginecache.model import ModelInput

IMAGES = ModelInput("images", "FLOAT", ("batch", 3, 32, 32))
TOKENS = ModelInput("tokens", "INT64", ("batch", "length"))
UNNAMED = ModelInput("x", "FLOAT", (None, 8))
STATIC = ModelInput("mask", "FLOAT", (1, 10))
SHAPE = ModelInput("size", "INT64", (4,))
ONE = ModelInput("count", "INT64", (1,))
SCALAR = ModelInput("k", "INT32", ())


def resolve(inputs, **flags):
    return resolve_profiles(inputs, ProfileRequest.from_flags(**flags))


def test_a_named_dimension_fills_every_input_that_has_it():
    (profile,) = resolve([IMAGES, TOKENS], dims=["batch=1:32:64", "length=1:64:128"])
    assert dict(profile.ranges) == {
        "images": ShapeRange((1, 3, 32, 32), (32, 3, 32, 32), (64, 3, 32, 32)),
        "tokens": ShapeRange((1, 1), (32, 64), (64, 128)),
    }


def test_three_flags_make_a_profile_and_six_make_two():
    flags = {
        "min_shapes": ["x:1x8", "x:16x8"],
        "opt_shapes": ["x:4x8", "x:32x8"],
        "max_shapes": ["x:8x8", "x:64x8"],
    }
    first, second = resolve([UNNAMED], **flags)
    assert first == Profile((("x", ShapeRange((1, 8), (4, 8), (8, 8))),))
    assert second == Profile((("x", ShapeRange((16, 8), (32, 8), (64, 8))),))


def test_opt_shapes_alone_fix_the_shape():
    (profile,) = resolve([UNNAMED], opt_shapes=["x:4x8"])
    assert profile == Profile((("x", ShapeRange((4, 8), (4, 8), (4, 8))),))


def test_dims_fill_the_inputs_that_shapes_leave_out():
    (profile,) = resolve([IMAGES, TOKENS], opt_shapes=["tokens:2x9"], dims=["batch=2"])
    assert dict(profile.ranges)["images"].optimum == (2, 3, 32, 32)
    assert dict(profile.ranges)["tokens"].optimum == (2, 9)


def test_shapes_and_dims_that_contradict_each_other_are_refused():
    with pytest.raises(ProfileError, match="dims batch says 2 where the shapes of input 'tokens' say 7"):
        resolve([IMAGES, TOKENS], opt_shapes=["tokens:7x9"], dims=["batch=2"])


def test_a_static_model_normalises_to_no_profile():
    assert resolve([STATIC]) == ()
    assert resolve([STATIC], opt_shapes=["mask:1x10"]) == ()


def test_a_static_input_beside_a_dynamic_one_needs_no_shapes():
    (profile,) = resolve([IMAGES, STATIC], dims=["batch=1"])
    assert [name for name, _ in profile.ranges] == ["images"]


def test_ranges_are_sorted_by_name_whatever_the_order_of_inputs():
    forth = resolve([IMAGES, TOKENS], dims=["batch=1", "length=2"])
    assert forth == resolve([TOKENS, IMAGES], dims=["length=2", "batch=1"])


@pytest.mark.parametrize(
    ("entry", "text", "values"), [(SHAPE, "size:1x3x8x8", (1, 3, 8, 8)), (SCALAR, "k:5", (5,)), (ONE, "count:1", (1,))]
)
def test_numbers_for_an_integer_input_of_static_rank_0_or_1_are_values(entry, text, values):
    (profile,) = resolve([entry], opt_shapes=[text])
    assert profile.ranges == ((entry.name, ShapeRange(values, values, values, is_values=True)),)


def test_the_static_shape_of_an_integer_input_may_be_spelled_out():
    assert resolve([SHAPE], opt_shapes=["size:4"]) == ()


def test_negative_values_are_good_for_a_shape_tensor_only():
    (profile,) = resolve([SHAPE], opt_shapes=["size:-1x0x0x0"])
    assert profile.ranges[0][1].optimum == (-1, 0, 0, 0)
    with pytest.raises(ProfileError, match="out of range"):
        resolve([UNNAMED], opt_shapes=["x:-1x8"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "input 'images' has dynamic dimensions and no shapes"),
        ({"dims": ["length=1"]}, "no dynamic dimension 'length'; its named dimensions: batch"),
        ({"opt_shapes": ["nope:1"]}, "no input 'nope'"),
        ({"dims": ["batch=4:2:8"]}, "dimension 'batch': minimum 4, optimum 2, maximum 8 are not in order"),
        ({"opt_shapes": ["images:1x3x32"]}, "has rank 4 (images: [batch, 3, 32, 32]), and the shape given has 3"),
        ({"opt_shapes": ["images:1x4x32x32"]}, "has a static size of 3 where the shape given has 4"),
        ({"min_shapes": ["images:1x3x32x32"]}, "1 --min-shapes, 0 --opt-shapes and 0 --max-shapes"),
        ({"opt_shapes": ["images:3000000000x3x32x32"]}, "out of range"),
        ({"dims": ["batch=1", "batch=2"]}, "--dim batch is given twice"),
    ],
)
def test_what_does_not_fit_is_refused_and_says_what_to_do(flags, says):
    with pytest.raises(ProfileError) as caught:
        resolve([IMAGES], **flags)
    assert says in caught.value.what
    assert caught.value.fix


def test_the_three_flags_must_be_in_order():
    with pytest.raises(ProfileError, match="not in order"):
        resolve([UNNAMED], min_shapes=["x:8x8"], opt_shapes=["x:4x8"], max_shapes=["x:16x8"])


def test_a_flag_that_lacks_an_input_is_named():
    with pytest.raises(ProfileError, match="input 'y' has no shape in maximum shapes"):
        ProfileRequest.from_flags(["x:1,y:1"], ["x:1,y:1"], ["x:1"])


DETECTOR = ModelInput("images", "FLOAT", ("batch", 3, "height", "width"))


def flag_lines(error):
    return [line.strip() for line in error.fix.splitlines() if line.strip().startswith("--")]


def follow(inputs, line):
    """Give the flags of a line of advice, with numbers in place of placeholders."""
    filled = line.replace("MIN:OPT:MAX", "16:32:64").replace("MIN", "16").replace("OPT", "32").replace("MAX", "64")
    return resolve(inputs, **flags_of(filled))


def test_dynamic_model_without_shapes_gets_the_flags_to_add():
    with pytest.raises(ProfileError) as caught:
        resolve([IMAGES, TOKENS])
    by_dims, by_shapes = flag_lines(caught.value)
    assert by_dims == "--dim batch=1:8:32 --dim length=MIN:OPT:MAX"
    assert by_shapes.startswith("--min-shapes images:1x3x32x32,tokens:1xMIN --opt-shapes images:8x3x32x32,tokens:8xOPT")
    assert "images: [batch, 3, 32, 32] FLOAT  (dynamic)" in caught.value.fix


def test_sizes_that_nobody_can_guess_are_placeholders():
    with pytest.raises(ProfileError) as caught:
        resolve([DETECTOR])
    assert flag_lines(caught.value)[0] == "--dim batch=1:8:32 --dim height=MIN:OPT:MAX --dim width=MIN:OPT:MAX"
    assert "MIN, OPT and MAX stand for sizes of your own" in caught.value.fix


def test_placeholder_that_was_copied_is_refused_with_what_it_stands_for():
    for flags in ({"dims": ["height=MIN:OPT:MAX"]}, {"opt_shapes": ["images:8x3xOPTxOPT"]}):
        with pytest.raises(ProfileError) as caught:
            resolve([DETECTOR], **flags)
        assert caught.value.fix == "MIN, OPT and MAX stand for sizes: put numbers in their place."


def test_partial_dims_are_kept_and_the_missing_ones_named():
    with pytest.raises(ProfileError) as caught:
        resolve([DETECTOR, TOKENS], dims=["batch=8", "height=320"])
    assert caught.value.what == "dimensions 'width' (of 'images') and 'length' (of 'tokens') have no size"
    assert flag_lines(caught.value)[0] == (
        "--dim batch=8 --dim height=320 --dim width=MIN:OPT:MAX --dim length=MIN:OPT:MAX"
    )
    assert "images:8x3x320xMIN" in flag_lines(caught.value)[1]


def test_partial_shapes_are_kept_and_tell_the_sizes_of_their_names():
    with pytest.raises(ProfileError) as caught:
        resolve([DETECTOR, TOKENS], opt_shapes=["images:2x3x64x64"])
    kept = "--min-shapes images:2x3x64x64 --opt-shapes images:2x3x64x64 --max-shapes images:2x3x64x64"
    assert flag_lines(caught.value)[0] == f"{kept} --dim batch=2 --dim length=MIN:OPT:MAX"


def test_mistyped_dimension_is_dropped_from_the_advice_and_the_others_stay():
    with pytest.raises(ProfileError) as caught:
        resolve([DETECTOR], dims=["batch=4", "heigth=320"])
    assert "no dynamic dimension 'heigth'" in caught.value.what
    assert flag_lines(caught.value)[0] == "--dim batch=4 --dim height=MIN:OPT:MAX --dim width=MIN:OPT:MAX"


def test_unnamed_dimensions_get_shape_flags_alone():
    with pytest.raises(ProfileError) as caught:
        resolve([UNNAMED])
    assert flag_lines(caught.value) == ["--min-shapes x:1x8 --opt-shapes x:8x8 --max-shapes x:32x8"]
    assert "x: [?, 8]" in caught.value.fix


def test_dimension_without_a_name_is_said_to_be_out_of_reach_of_dim():
    with pytest.raises(ProfileError, match=r"'x' \(x: \[\?, 8\]\) has a dynamic dimension without a name"):
        resolve([UNNAMED, TOKENS], dims=["batch=1", "length=2"])


def test_one_name_with_two_sizes_is_refused_before_tensorrt_does():
    once, twice = ModelInput("x", "FLOAT", ("?", 4)), ModelInput("y", "FLOAT", ("?", "?"))
    with pytest.raises(ProfileError, match=r"'\?' is 2:2:2 in input 'x' and 3:3:3 in input 'y'") as caught:
        resolve([once, twice], opt_shapes=["x:2x4,y:3x3"])
    assert "its own name" in caught.value.fix
    with pytest.raises(ProfileError, match="has one size in TensorRT"):
        resolve([twice], opt_shapes=["y:2x3"])


def test_ranges_of_one_name_may_differ_where_the_optimum_is_one():
    other = ModelInput("y", "FLOAT", ("batch",))
    flags = {"min_shapes": ["images:1x3x32x32,y:2"], "opt_shapes": ["images:2x3x32x32,y:2"]}
    assert resolve([IMAGES, other], **flags, max_shapes=["images:4x3x32x32,y:9"])


def test_name_shared_by_places_of_several_sizes_is_advised_to_be_renamed():
    with pytest.raises(ProfileError) as caught:
        resolve([ModelInput("x", "FLOAT", ("?", 3, "?", "?"))])
    assert flag_lines(caught.value)[0] == "--dim '?=MIN:OPT:MAX'"
    assert "set dim_param in the ONNX file" in caught.value.fix


def test_static_size_of_0_needs_no_shapes_and_is_explained_where_some_are_given():
    empty = ModelInput("x", "FLOAT", (0, 4))
    assert resolve([empty]) == ()
    with pytest.raises(ProfileError, match="static size of 0") as caught:
        resolve([empty], opt_shapes=["x:2x4"])
    assert "If it was meant to be dynamic" in caught.value.fix


def test_names_that_cannot_be_copied_from_a_terminal_are_left_to_python():
    with pytest.raises(ProfileError) as caught:
        resolve([ModelInput("a\x1b", "FLOAT", ("b\n", 4))])
    assert flag_lines(caught.value) == []
    assert "profiles=[...]" in caught.value.fix
    assert "\x1b" not in str(caught.value)


def test_names_for_which_a_shell_has_other_plans_are_quoted():
    entry = ModelInput("it's $x", "FLOAT", ("a b=$c", "'\"é", 4))
    with pytest.raises(ProfileError) as caught:
        resolve([entry])
    lines = flag_lines(caught.value)
    assert len(lines) == 2
    assert all(follow([entry], line) for line in lines)


def test_flag_that_lacks_an_input_gets_a_shape_that_can_be_added():
    with pytest.raises(ProfileError) as caught:
        ProfileRequest.from_flags(["x:1"], ["x:1"], ["x:1,y:3"])
    assert caught.value.what == "input 'y' has no shape in --min-shapes and --opt-shapes"
    assert caught.value.fix.startswith("Add y:3, ")


dimensions = st.one_of(
    st.integers(0, 9), st.none(), st.sampled_from(["batch", "n", "?", "height", "a b", "x=1", "$é'\"", "b\n", "seq"])
)
model_inputs = st.lists(
    st.builds(
        ModelInput,
        st.text("ab,:'\" $\n", min_size=1, max_size=4),
        st.sampled_from(["FLOAT", "INT64"]),
        st.lists(dimensions, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda entry: entry.name,
)


@given(model_inputs, st.data())
def test_advice_that_is_followed_is_taken(inputs, data):
    names = sorted({dim for entry in inputs for dim in entry.dims if isinstance(dim, str)} | {"other"})
    sizes = st.tuples(st.integers(0, 3), st.integers(2, 5), st.integers(4, 6))
    dims = data.draw(st.dictionaries(st.sampled_from(names), sizes))
    shape = st.tuples(*[st.lists(st.integers(0, 9), max_size=4).map(tuple)] * 3)
    shapes = data.draw(st.lists(st.dictionaries(st.sampled_from([entry.name for entry in inputs]), shape), max_size=2))
    shapes = [{n: c for n, c in profile.items() if len(set(map(len, c))) == 1} for profile in shapes]
    request = ProfileRequest(tuple(shapes), dims)
    fix = fix_of(inputs, request)
    lines = [line.strip() for line in fix.splitlines() if line.strip().startswith("--")]
    can_be_written = all(printable(n) == n and not ("'" in n and '"' in n) for n in (e.name for e in inputs))
    wants_flags = "The model's inputs" in fix and "All are static" not in fix
    assert lines or not (can_be_written and wants_flags)
    for line in lines:
        follow(inputs, line)


def fix_of(inputs, request):
    try:
        resolve_profiles(inputs, request)
    except ProfileError as error:
        return error.fix
    return ""


def test_a_wrong_number_of_values_is_refused():
    with pytest.raises(ProfileError, match="shape tensor of 4 values"):
        resolve([SHAPE], opt_shapes=["size:1x2"])
