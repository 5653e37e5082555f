"""From flags and a model's inputs to canonical profiles."""

import pytest

from enginecache.errors import ProfileError
from enginecache.model import ModelInput
from enginecache.profiles import Profile, ProfileRequest, ShapeRange, resolve_profiles

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
    with pytest.raises(ProfileError, match="--dim batch says 2 where the shapes of input 'tokens' say 7"):
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
        ({"opt_shapes": ["images:1x3x32"]}, "has rank 4 (images: batchx3x32x32), and the shape given has 3"),
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
    with pytest.raises(ProfileError, match="input 'y' has no shape in --max-shapes"):
        ProfileRequest.from_flags(["x:1,y:1"], ["x:1,y:1"], ["x:1"])


def test_a_dynamic_model_without_shapes_is_told_the_exact_flags():
    with pytest.raises(ProfileError) as caught:
        resolve([IMAGES, TOKENS])
    assert "--dim batch=1:8:32 --dim length=1:8:32" in caught.value.fix
    assert "--min-shapes images:1x3x32x32,tokens:1x1" in caught.value.fix
    assert "images: batchx3x32x32 FLOAT  (dynamic)" in caught.value.fix


def test_the_flags_that_are_told_are_flags_that_work():
    import shlex

    with pytest.raises(ProfileError) as caught:
        resolve([IMAGES, TOKENS])
    for line in (line.strip() for line in caught.value.fix.splitlines() if line.strip().startswith("--")):
        words = shlex.split(line)
        flags = {"min_shapes": [], "opt_shapes": [], "max_shapes": [], "dims": []}
        for flag, value in zip(words[::2], words[1::2], strict=True):
            flags[flag.removeprefix("--").replace("-", "_").replace("dim", "dims", 1)].append(value)
        assert len(resolve([IMAGES, TOKENS], **flags)) == 1


def test_unnamed_dimensions_are_told_shape_flags_alone():
    with pytest.raises(ProfileError) as caught:
        resolve([UNNAMED])
    assert "--dim" not in caught.value.fix
    assert "--min-shapes x:1x8 --opt-shapes x:8x8 --max-shapes x:32x8" in caught.value.fix
    assert "x: ?x8" in caught.value.fix


def test_a_wrong_number_of_values_is_refused():
    with pytest.raises(ProfileError, match="shape tensor of 4 values"):
        resolve([SHAPE], opt_shapes=["size:1x2"])
