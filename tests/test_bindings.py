"""The loaded version against the key's."""

from __future__ import annotations

import types
from dataclasses import replace

import builder_models as models
import pytest

from enginecache.errors import ToolchainError
from enginecache.trt.loaded_version import _ask, agree, check_loaded, library_version, loaded_library


@pytest.mark.parametrize(
    ("library", "version", "is_same"),
    [
        ("10.16.1.11", "10.16.1.11", True),
        ("10.16.1.12", "10.16.1.11", False),
        ("10.0.1.6", "10.0.1", True),
        ("8.6.1", "8.6.1.post1", True),
        ("8.6.2", "8.6.1", False),
        ("1.7.1.116", "1.7.1.116.post2", True),
        ("10", "10.16.1.11", False),
        ("", "", False),
    ],
)
def test_versions_agree_as_far_as_both_go(library, version, is_same):
    assert agree(library, version) is is_same


def test_bindings_must_be_the_version_to_its_last_number():
    trt = types.SimpleNamespace(__version__="1.7.1")
    with pytest.raises(ToolchainError, match=r"bindings here are 1\.7\.1"):
        check_loaded(trt, models.RTX, None)
    trt = types.SimpleNamespace(__version__="1.7.1.116")
    assert check_loaded(trt, models.RTX, None) == "1.7.1.116"
    with pytest.raises(ToolchainError, match=r"under them is 1\.7\.1\.117"):
        check_loaded(trt, models.RTX, "1.7.1.117")
    with pytest.raises(ToolchainError):
        check_loaded(trt, replace(models.RTX, version="unknown"), None)


@pytest.mark.parametrize(("number", "version"), [(8601, "8.6.1"), (100001, "10.0.1"), (10701, "1.7.1")])
def test_old_library_tells_one_number(number, version):
    # A stand-in for a CDLL: of the real libraries only RTX 1.7.1 is here, and it has the other functions too.
    library = types.SimpleNamespace(getInferLibVersion=lambda: number)
    assert _ask(library) == version


def test_library_that_is_not_loaded_is_a_toolchain_error():
    assert loaded_library("tensorrt") is None
    with pytest.raises(ToolchainError, match="not loaded"):
        library_version("tensorrt")
