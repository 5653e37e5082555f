import json

import numpy as np
import pytest

from enginecache.quality.compare import TOLERANCES, WITHOUT_TF32, compare, tolerance_for
from enginecache.quality.result import Check, OutputNumbers, PointNumbers

NAN, INF = float("nan"), float("inf")


def floats(*values):
    return np.array(values, np.float32)


def test_error_is_the_largest_one_of_the_largest_value():
    found = compare("y", floats(10, -20, 0), floats(10.5, -19, 0.25))
    assert found.error == pytest.approx(0.05)
    assert found.max_abs_error == pytest.approx(1)
    assert found.max_rel_error == pytest.approx(0.05)
    assert found.cosine == pytest.approx(1, abs=1e-2)
    assert found.is_within(0.05001)
    assert not found.is_within(0.0499)


def test_error_where_the_reference_is_zero_is_absolute():
    found = compare("y", floats(0, 0), floats(0, 0.125))
    assert (found.error, found.max_rel_error, found.cosine) == (0.125, None, None)


def test_small_weights_that_became_zero_are_an_error_of_1():
    assert compare("y", floats(1e-9, -2e-9), floats(0, 0)).error == 1


@pytest.mark.parametrize(
    ("found", "nan", "inf"), [((1, NAN), 1, 0), ((INF, 2), 0, 1), ((-INF, NAN), 1, 1)], ids=["nan", "inf", "both"]
)
def test_what_is_not_finite_fails_at_any_tolerance_and_is_counted(found, nan, inf):
    output = compare("y", floats(1, 2), floats(*found))
    assert (output.nan, output.inf, output.unlike) == (nan, inf, nan + inf)
    assert not output.is_within(1e9)


def test_what_is_not_finite_in_the_reference_too_is_no_error():
    expected = floats(1, NAN, INF, -INF)
    assert compare("y", expected, expected.copy()).is_within(0)
    assert compare("y", expected, floats(1, NAN, -INF, INF)).unlike == 2
    assert compare("y", expected, floats(1, 0, INF, -INF)).unlike == 1


def test_half_and_double_are_compared_as_numbers():
    assert compare("y", np.array([1e300]), np.array([1e300])).error == 0
    assert compare("y", floats(1, 3), np.array([1, 3], np.float16)).is_within(0)
    assert compare("y", np.array([1e308, 1]), np.array([-1e308, 1])).error > 1


def test_error_of_integers_is_the_share_that_differs():
    found = compare("k", np.array([1, 2, 3, 2**62]), np.array([1, 2, 4, 2**62 + 1]))
    assert (found.error, found.max_abs_error) == (0.5, 1)
    assert compare("k", np.array([True, False]), np.array([True, False])).is_within(0)
    assert compare("k", np.array([1, 2]), np.array([1, 2], np.int32)).is_within(0)


def test_another_shape_or_type_has_no_numbers_and_fails():
    assert "2x1" in compare("y", np.zeros((2, 1)), np.zeros(2)).problem
    assert not compare("y", np.zeros((2, 1)), np.zeros(2)).is_within(1e9)
    assert compare("y", floats(1), np.array(["a"])).problem


def test_output_without_elements_is_alike():
    assert compare("y", np.zeros((0, 3)), np.zeros((0, 3))).is_within(0)


def test_scalar_is_compared():
    assert compare("y", np.array(2.0), np.array(1.0)).error == 0.5


def test_tolerance_is_that_of_the_lowest_precision():
    assert tolerance_for(()) == TOLERANCES["fp32"]
    assert tolerance_for((), ("TF32=OFF",)) == WITHOUT_TF32
    assert tolerance_for(("fp16",)) == TOLERANCES["fp16"]
    assert tolerance_for(("fp16", "int8")) == TOLERANCES["int8"]
    assert WITHOUT_TF32 < TOLERANCES["fp32"] < TOLERANCES["fp16"] < TOLERANCES["bf16"]


def a_check(**changes):
    outputs = (
        OutputNumbers("y", 0.01, 0.1, 0.2, 0.99),
        OutputNumbers("k", problem="another shape"),
    )
    fields = {
        "verdict": "failed",
        "scope": "graph",
        "digest": "d" * 64,
        "reference": "onnxruntime 1",
        "seed": 0,
        "tolerance": 0.02,
        "reason": "so",
        "inputs": (("x", "seed"),),
        "checked_at": "2026-12-01T00:00:00Z",
        "points": (PointNumbers(0, "min", {"x": (1, 2)}, outputs), PointNumbers(0, "max", {"x": (8, 2)}, outputs[:1])),
    }
    return Check(**{**fields, **changes})


def test_result_survives_its_text():
    check = a_check()
    assert Check.from_text(check.to_text(), "d" * 64) == check
    assert json.loads(check.to_text()) == check.to_json()


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", "1", a_check().to_text().replace("failed", "splendid")], ids=range(7)
)
def test_what_is_no_result_is_none(text):
    assert Check.from_text(text, "d" * 64) is None


def test_result_of_another_plan_is_none():
    assert Check.from_text(a_check().to_text(), "e" * 64) is None


def test_result_names_the_worst_point_of_each_output():
    far = PointNumbers(0, "max", {"x": (8, 2)}, (OutputNumbers("y", 0.5),))
    check = a_check(points=(far, *a_check().points))
    assert [(output.name, output.error, bool(output.problem)) for output in check.worst] == [
        ("y", 0.5, False),
        ("k", 0, True),
    ]
