"""The `tensorrt` flavour, over the genuine 11.4 bindings: see :mod:`trt_shim`."""

from __future__ import annotations

import sys
from dataclasses import replace

import builder_models as models
import pytest

from enginecache.errors import BuildError, NoDeviceError, ProfileError, TargetError, ToolchainError
from enginecache.options import BuildOptions
from enginecache.targets import ComputeCapability, Target

pytestmark = pytest.mark.rtx


def a_request(tmp_path, *arguments, **changes):
    return models.request_for(tmp_path, *arguments, **{"toolchain": models.TRT, "device": models.ADA, **changes})


def test_tensorrt_builds_for_its_device(tmp_path, shim_builder):
    request, events = a_request(tmp_path), []
    plan = shim_builder.build(request, events.append)
    assert plan.plan_path.stat().st_size > 1_000_000
    assert plan.loaded_version == "11.4.0.106"
    assert plan.compute_capabilities == (ComputeCapability(8, 9),)
    assert [event.fraction for event in events][-1] == 1.0
    assert "[I] tensorrt 11.4.0.106, library 11.4.0.106" in request.log_path.read_text()
    assert "tensorrt" not in sys.modules


def test_options_and_profiles_reach_tensorrt(tmp_path, shim_builder):
    options = BuildOptions(workspace_bytes=1 << 30, optimization_level=1)
    plan = shim_builder.build(a_request(tmp_path, models.conv_model(), profiles=models.BATCHES, options=options))
    assert plan.plan_path.exists()
    assert plan.warnings == ()  # the level is ignored by TensorRT-RTX alone


def test_chosen_device_is_the_only_one_that_the_child_sees(tmp_path, shim_builder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    environment = shim_builder._environment(a_request(tmp_path))
    assert environment["CUDA_VISIBLE_DEVICES"] == models.ADA.uuid
    rtx = shim_builder._environment(models.request_for(tmp_path))
    assert rtx["CUDA_VISIBLE_DEVICES"] == "7"


def test_target_other_than_the_device_is_refused(tmp_path, shim_builder):
    with pytest.raises(TargetError, match=r"NVIDIA L4, 8\.9\), not for sm_90"):
        shim_builder.build(a_request(tmp_path, target=Target.parse(("9.0",))))
    with pytest.raises(TargetError, match="not for portable"):
        shim_builder.build(a_request(tmp_path, target=Target(())))


def test_no_device_is_refused_with_what_else_can_be_done(tmp_path, shim_builder):
    with pytest.raises(NoDeviceError) as caught:
        shim_builder.build(a_request(tmp_path, device=None))
    assert "--backend tensorrt-rtx" in caught.value.fix


def test_refusals_have_the_same_reasons(tmp_path, shim_builder):
    with pytest.raises(BuildError, match=r"TensorRT 11\.4\.0\.106 refused .* it has no operator Frobnicate"):
        shim_builder.build(a_request(tmp_path, models.unknown_operator_model()))
    with pytest.raises(ProfileError, match="'x' is dynamic"):
        shim_builder.build(a_request(tmp_path, models.conv_model()))


def test_library_of_another_build_under_the_right_bindings_builds_nothing(tmp_path, shim_builder_of):
    builder = shim_builder_of(version=(11, 4, 0, 99))
    with pytest.raises(ToolchainError) as caught:
        builder.build(a_request(tmp_path))
    assert "bindings here are 11.4.0.106, and the library loaded under them is 11.4.0.99" in caught.value.what


def test_library_that_does_not_tell_its_version_leaves_the_bindings_word(tmp_path, shim_builder_of):
    builder = shim_builder_of(defines=["SILENT"])
    assert builder.build(a_request(tmp_path, models.conv_model(1))).loaded_version == "11.4.0.106"
    with pytest.raises(ToolchainError):
        builder.build(a_request(tmp_path, toolchain=replace(models.TRT, version="11.4.0.99")))
