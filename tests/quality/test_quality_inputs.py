import io
import os
import zipfile

import builder_models
import check_models as models
import numpy as np
import pytest

from enginecache.errors import OptionError
from enginecache.model import ModelInput
from enginecache.quality.inputs import (
    Point,
    PointInput,
    arrays_of,
    check_ranges,
    index_ranges,
    other_arrays,
    parse_range,
    point_of_file,
    points_of,
)

X = ModelInput("x", "FLOAT", ("batch", 4))
BATCHES = (builder_models.profile(x=((1, 4), (2, 4), (8, 4))),)


def shapes(points):
    return [(point.profile, point.at, [entry.shape for entry in point.inputs]) for point in points]


def test_every_profile_is_checked_at_optimum_minimum_and_maximum():
    points = points_of([X, ModelInput("s", "FLOAT", (3,))], [*BATCHES, builder_models.profile(x=((9, 4),) * 3)])
    assert shapes(points) == [
        (0, "opt", [(2, 4), (3,)]),
        (0, "min", [(1, 4), (3,)]),
        (0, "max", [(8, 4), (3,)]),
        (1, "opt", [(9, 4), (3,)]),
    ]


def test_static_model_is_checked_once():
    assert shapes(points_of([ModelInput("x", "FLOAT", (2, 3))], [])) == [(0, "static", [(2, 3)])]


def test_shape_tensor_gets_the_values_of_the_profile():
    profile = builder_models.profile(x=((1, 4), (2, 4), (8, 4)), s=((4, 1), (4, 2), (4, 8), "values"))
    points = points_of([X, ModelInput("s", "INT64", (2,))], [profile])
    arrays = [arrays_of(point, 0, 0, {})["s"] for point in points]
    assert [array.tolist() for array in arrays] == [[4, 2], [4, 1], [4, 8]]
    assert arrays[0].dtype == np.int64


def test_points_survive_json():
    for point in (*points_of([X], BATCHES), Point(0, "given", (PointInput("s", "INT64", (2,), (1, 2)),), "/a.npz")):
        assert Point.from_json(point.to_json()) == point


def one(dtype, shape=(64,), values=None):
    return Point(0, "opt", (PointInput("x", dtype, shape, values),))


def test_same_seed_makes_the_same_values_and_another_others():
    first, again, other, elsewhere = (
        arrays_of(one("FLOAT"), index, seed, {})["x"] for index, seed in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, elsewhere)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "kind"),
    [
        *(("BOOL", 0, 1, "bool"), ("INT64", 0, 1, "int64"), ("INT32", 0, 1, "int32"), ("UINT64", 0, 1, "uint64")),
        *(("UINT8", 0, 255, "uint8"), ("INT8", -128, 127, "int8")),
    ],
)
def test_integers_and_booleans_have_values_that_are_mostly_valid(dtype, low, high, kind):
    array = arrays_of(one(dtype, (5000,)), 0, 0, {})["x"]
    assert (array.dtype, array.min(), array.max()) == (kind, low, high)


@pytest.mark.parametrize("dtype", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"])
def test_floats_are_normal(dtype):
    array = arrays_of(one(dtype, (5000,)), 0, 0, {})["x"].astype(float)
    assert abs(array.mean()) < 0.1
    assert abs(array.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("dtype", "limits", "low", "high"),
    [
        *(("FLOAT", (-3.0, 5.0), -3, 5), ("INT64", (10.0, 12.0), 10, 12), ("UINT8", (-5.0, 1e9), 0, 255)),
        *(("INT64", (-(2.0**40), 0.0), -(2**40), 0), ("BOOL", (1.0, 1.0), 1, 1), ("INT64", (7.0, 7.0), 7, 7)),
    ],
)
def test_range_is_kept_with_both_ends(dtype, limits, low, high):
    array = arrays_of(one(dtype, (5000,)), 0, 0, {"x": limits})["x"]
    assert low <= array.min() <= array.max() <= high
    if dtype != "FLOAT" and high - low < 1000:
        assert (array.min(), array.max()) == (low, high)


def test_type_without_values_is_refused():
    with pytest.raises(OptionError, match="STRING"):
        arrays_of(one("STRING"), 0, 0, {})


@pytest.mark.parametrize(
    ("text", "name", "limits"),
    [
        *(("ids=0:30521", "ids", (0, 30521)), ("x=-1.5:2e3", "x", (-1.5, 2000)), ("a=b=.5:1.", "a=b", (0.5, 1))),
        ("a:0=0:1", "a:0", (0, 1)),
    ],
)
def test_range_is_read(text, name, limits):
    assert parse_range(text) == (name, limits)


@pytest.mark.parametrize("text", ["", "x", "x=", "x=1", "x=1:", "=0:1", "x=a:b", "x=0:nan", "x=0:inf", "x=0:1:2x"])
def test_what_is_no_range_is_refused_with_the_form(text):
    with pytest.raises(OptionError, match="NAME=LOW:HIGH"):
        parse_range(text)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"z": (0, 1)}, "not an input"),
        ({"x": (2, 1)}, "empty"),
        ({"i": (0, 0.5)}, "integers"),
        ({"x": (-1e308, 1e308)}, "endless"),
        ({"x": (float("inf"), float("inf"))}, "endless"),
    ],
)
def test_range_that_does_not_fit_the_model_is_refused(ranges, said):
    with pytest.raises(OptionError, match=said):
        check_ranges([X, ModelInput("i", "INT64", (2,))], ranges)


def saved(folder, **arrays):
    path = folder / "inputs.npz"
    np.savez(path, **arrays)
    return path


def test_given_inputs_are_of_the_first_profile_that_has_their_shapes(tmp_path):
    profiles = [*BATCHES, builder_models.profile(x=((9, 4), (10, 4), (20, 4)))]
    point = point_of_file(saved(tmp_path, x=np.ones((12, 4)), more=np.ones(1)), [X], profiles)
    assert (point.profile, point.at, point.inputs[0].shape) == (1, "given", (12, 4))
    array = arrays_of(point, 0, 0, {})["x"]
    assert (array.dtype, array.sum()) == (np.float32, 48)


def test_given_values_of_a_shape_tensor_are_compared_with_the_profile(tmp_path):
    inputs = [X, ModelInput("s", "INT64", (2,))]
    profile = builder_models.profile(x=((1, 4), (2, 4), (8, 4)), s=((4, 1), (4, 2), (4, 8), "values"))
    point = point_of_file(saved(tmp_path, x=np.ones((2, 4)), s=np.array([4, 5])), inputs, [profile])
    assert point.inputs[1].values == (4, 5)
    with pytest.raises(OptionError, match="no profile"):
        point_of_file(saved(tmp_path, x=np.ones((2, 4)), s=np.array([4, 9])), inputs, [profile])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        *(({"y": np.ones((2, 4))}, "no array for the input x"), ({"x": np.ones((9, 4))}, "no profile has inputs")),
        *(({"x": np.ones((2, 4, 1))}, "no profile has inputs"), ({"x": np.array([["a"] * 4])}, "of type <U1")),
        ({"x": np.array([{}], object)}, "never unpickled"),
    ],
)
def test_given_inputs_that_do_not_fit_are_refused(tmp_path, arrays, said):
    with pytest.raises(OptionError, match=said):
        point_of_file(saved(tmp_path, **arrays), [X], BATCHES)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "inputs.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=r"inputs\.npz"):
        point_of_file(path, [X], BATCHES)


def archive(*, flags=0, compression=0):
    """A zip archive with a member that is no array."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("x", b"hello")
    content = bytearray(packed.getvalue())
    central = content.index(b"PK\x01\x02")
    for place in (6, central + 8):
        content[place] |= flags
    for place in (8, central + 10):
        content[place] |= compression
    return bytes(content)


@pytest.mark.parametrize("content", [archive(), archive(flags=1), archive(compression=99)])
def test_archive_without_readable_arrays_is_refused(tmp_path, content):
    (tmp_path / "inputs.npz").write_bytes(content)
    with pytest.raises(OptionError, match=r"inputs\.npz"):
        point_of_file(tmp_path / "inputs.npz", [X], BATCHES)


def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "inputs.npz")
    with pytest.raises(OptionError, match="not a regular file"):
        point_of_file(tmp_path / "inputs.npz", [X], BATCHES)


def test_pickle_in_a_file_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.array([Bomb()], object))
    with pytest.raises(OptionError, match="never unpickled"):
        point_of_file(path, [X], BATCHES)
    assert not (tmp_path / "ran").exists()


def test_given_inputs_are_shuffled_for_the_second_run():
    arrays = {"x": np.arange(12.0).reshape(3, 4), "s": np.array([4, 2])}
    point = Point(0, "given", (PointInput("x", "FLOAT", (3, 4)), PointInput("s", "INT64", (2,), (4, 2))))
    other = other_arrays(arrays, point)
    assert sorted(other["x"].ravel()) == list(range(12))
    assert not np.array_equal(other["x"], arrays["x"])
    assert np.array_equal(other["s"], arrays["s"])
    assert np.array_equal(other_arrays({"x": np.ones(3)}, point)["x"], np.full(3, 0.5))


def test_indices_of_a_table_are_known_from_the_graph():
    model = models.model(
        "(int64[2,3] i, int64[2,3] m, float[2,3] x) => (float[2,3,4] y)"
        "{ a = Cast<to=6>(i) b = Gather(t, a) c = Gather<axis=1>(u, i) k = Cast<to=1>(m) y = Identity(b) }",
        t=models.normal(100, 4),
        u=models.normal(4, 50),
    )
    assert index_ranges(model) == {"i": (0, 49)}
