"""Dataclasses as plain JSON values, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginecache.files.plain import from_plain, to_plain
from enginecache.host.targets import ComputeCapability, Reach
from enginecache.key.options import PluginLibrary
from enginecache.trt.load.request import Failure, LoadRequest


class Pair(NamedTuple):
    path: Path
    number: int


@dataclass(frozen=True)
class Inner:
    name: str
    flag: bool = False
    size: int | None = None
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    maybe: Inner | None
    pairs: tuple[Pair, ...]
    named: tuple[tuple[str, Inner], ...]
    dims: tuple[int | str | None, ...]
    data: bytes | None = None


PATHS = st.sampled_from(["/a", "/models/\udce9.onnx", "b c"]).map(Path)
INNER = st.builds(Inner, st.text(), st.booleans(), st.none() | st.integers(), st.sampled_from(["a", "b"]))
OUTER = st.builds(
    Outer,
    INNER,
    st.none() | INNER,
    st.lists(st.builds(Pair, PATHS, st.integers())).map(tuple),
    st.lists(st.tuples(st.text(), INNER)).map(tuple),
    st.lists(st.none() | st.integers() | st.text()).map(tuple),
)
LOAD_REQUEST = st.builds(
    LoadRequest,
    path=PATHS,
    digest=st.text(),
    flavour=st.just("tensorrt"),
    version=st.text(),
    reach=st.builds(Reach, st.just((ComputeCapability(8, 9), ComputeCapability(12, 0))), st.booleans()),
    tuned_for=st.none() | st.text(),
    is_version_compatible=st.booleans(),
    plugins=st.lists(st.builds(PluginLibrary, PATHS, st.text())).map(tuple),
    allows_host_code=st.booleans(),
)
LINES = st.lists(st.text()).map(tuple)
FAILURE = st.builds(Failure, st.just("crash"), LINES, LINES, st.text())


@given(st.one_of(OUTER, LOAD_REQUEST, FAILURE))
def test_what_crosses_a_pipe_comes_out_as_it_went_in(value):
    assert from_plain(type(value), json.loads(json.dumps(to_plain(value)))) == value


def test_what_has_no_form_in_json_is_refused_on_both_sides():
    inner = Inner("x")
    with pytest.raises(TypeError, match="bytes has no form in JSON"):
        to_plain(Outer(inner, None, (), (), (), b"data"))
    with pytest.raises(TypeError, match="bytes have no form"):
        from_plain(Outer, {**to_plain(Outer(inner, None, (), (), ())), "data": "text"})


def test_names_that_the_class_does_not_have_are_ignored_and_missing_ones_are_an_error():
    assert from_plain(Inner, {**to_plain(Inner("x")), "event": "done"}) == Inner("x")
    with pytest.raises(KeyError, match="flag"):
        from_plain(Inner, {"name": "x"})
