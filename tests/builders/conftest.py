"""Fixtures of the builders' tests."""

from __future__ import annotations

import importlib.util

import pytest
import trt_shim
from builder_processes import BuilderWithModules, children

from enginecache.trt.build.process import ProcessBuilder


@pytest.fixture
def builder():
    """Builds with the real TensorRT-RTX, in a child process; leaves no process behind."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("probe: no module tensorrt_rtx")
    before = children()
    yield ProcessBuilder()
    assert children() <= before


@pytest.fixture(scope="session")
def shim_builder_of(tmp_path_factory):
    """Gives a builder whose child has the genuine TensorRT 11.4 bindings; arguments as for ``make_shim``."""
    missing = trt_shim.missing_parts()
    if missing:
        pytest.skip(f"probe: no {missing}")

    def make(**arguments):
        folder = trt_shim.make_shim(tmp_path_factory.mktemp("shim"), **arguments)
        return BuilderWithModules(folder)

    return make


@pytest.fixture(scope="session")
def shim_builder(shim_builder_of):
    return shim_builder_of()
