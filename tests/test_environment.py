"""Variables of the environment: which are let through to a builder, and which of those are in the key."""

from __future__ import annotations

import os

import pytest

from enginecache import environment
from enginecache.request import Request


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA_TF32_OVERRIDE", environment.KEYED),
        ("__ANY_SWITCH_NOWUD", environment.KEYED),
        ("CUDNN_OF_THE_FUTURE", environment.KEYED),
        ("CUDNN_VERSION", environment.UNUSED),
        ("LD_LIBRARY_PATH", environment.PASSED),
        ("LD_PRELOAD", environment.REMOVED),
        ("SOMETHING_ELSE", None),
        ("__switch\udcff_NOWUD", None),
    ],
)
def test_a_name_counts_before_a_pattern_and_the_first_pattern_before_others(name, kind):
    assert environment.kind_of(name) == kind


def test_variables_of_the_key_are_read_by_name_and_value(open_cache, model, monkeypatch):
    cache = open_cache()

    def key_now():
        return cache.resolve(Request.of(model, {"dims": {"batch": 4}})).key

    plain = key_now()
    assert plain.fields()["environment"] == {}
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert key_now().fields()["environment"] == {"NVIDIA_TF32_OVERRIDE": "0"}
    assert key_now().digest != plain.digest
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    assert key_now() == plain


def test_explain_shows_the_variables_and_names_the_one_that_differs(open_cache, model, monkeypatch):
    cache = open_cache()
    cache.get(model, dims={"batch": 4})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    explained = cache.explain(model, dims={"batch": 4})
    assert explained.verdict == "miss"
    assert explained.fields["environment"] == {"NVIDIA_TF32_OVERRIDE": "0"}
    assert 'environment.NVIDIA_TF32_OVERRIDE: asked "0", stored not set' in str(explained.reasons)


def test_a_server_sees_a_changed_variable_at_once(open_cache, model, monkeypatch):
    cache = open_cache()
    plain = cache.get(model, dims={"batch": 4})
    assert cache.get(model, dims={"batch": 4}).outcome == "hit"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    other = cache.get(model, dims={"batch": 4})
    assert (other.outcome, other.key == plain.key) == ("built", False)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    assert cache.get(model, dims={"batch": 4}).key == plain.key


def test_what_decides_is_read_again_when_the_environment_changes(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    before = environment.deciding()
    assert environment.deciding() is before
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert ("NVIDIA_TF32_OVERRIDE", "0") in environment.deciding()
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    assert environment.deciding() == before


def test_a_platform_without_the_mapping_behind_the_environment_is_served_too(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")

    class Plain(dict):
        pass

    monkeypatch.setattr(environment.os, "environ", Plain(os.environ))
    assert environment.snapshot()["NVIDIA_TF32_OVERRIDE"] == "0"
    assert ("NVIDIA_TF32_OVERRIDE", "0") in environment.deciding()
