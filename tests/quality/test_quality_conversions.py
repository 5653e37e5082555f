"""The CPU half of the check: bad conversions are refused, and good ones pass."""

import check_models as models
import pytest

BAD, GOOD = models.bad_pairs(), models.good_models()


@pytest.mark.parametrize("name", BAD)
def test_bad_conversion_fails(tmp_path, name):
    original, converted = BAD[name]
    found = models.check(tmp_path / "bad", original, converted)
    assert (found.verdict, found.scope) == ("failed", "graph"), found
    assert "output y" in found.reason


@pytest.mark.parametrize("name", GOOD)
def test_good_conversion_passes(tmp_path, name):
    found = models.check(tmp_path / "good", GOOD[name])
    assert (found.verdict, found.scope, found.reason) == ("passed", "graph", "")


def test_there_are_ten_bad_ones_and_twenty_good_ones():
    assert (len(BAD), len(GOOD)) == (10, 20)


@pytest.mark.parametrize("name", [name for name in BAD if BAD[name][1] is not None])
def test_model_of_a_bad_conversion_passes_against_itself(tmp_path, name):
    original = BAD[name][0]
    assert models.check(tmp_path / "itself", original, original).verdict == "passed"
