"""Requests and results come out of the pipes as they went in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import builder_models as models
import pytest

from enginecache import errors
from enginecache.host.targets import DeviceModel, Target
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.key.precision import Conversion
from enginecache.model import ModelSource
from enginecache.trt.build.codec import (
    MODEL_NAME,
    TIMING_CACHE_NAME,
    decode_error,
    decode_request,
    encode_error,
    encode_request,
)


def test_request_comes_out_as_it_went_in(tmp_path):
    request = models.request_for(tmp_path, models.conv_model(), profiles=models.BATCHES)
    full = replace(
        request,
        source=ModelSource.of("/models/\udce9.onnx"),
        options=BuildOptions(
            workspace_bytes=1 << 40,
            optimization_level=1,
            precision=("fp16", "int8"),
            hardware_compatibility="ampere_plus",
            builder_flags=("TF32=OFF",),
            plugins=(PluginLibrary(Path("/plugins/\udce9.so"), "d" * 64),),
        ),
        toolchain=models.TRT,
        target=Target(models.SM89.compute_capabilities, DeviceModel("NVIDIA L4", 58), and_later=True),
        device=models.ADA,
        conversion=Conversion("fp16", "onnxconverter-common", "1.16.0", "1.23.2", keeps_io=True),
        timing_cache=b"timings",
    )
    (full.work_dir / TIMING_CACHE_NAME).write_bytes(b"timings")
    for each in (request, full):
        assert decode_request(json.loads(json.dumps(encode_request(each)))) == each


def test_model_bytes_go_through_the_folder_and_not_the_pipe(tmp_path):
    data = models.conv_model(1).SerializeToString()
    request = models.request_for(tmp_path, ModelSource.of(data, base_dir=tmp_path))
    (request.work_dir / MODEL_NAME).write_bytes(data)
    line = json.dumps(encode_request(request))
    assert len(line) < 4096
    assert decode_request(json.loads(line)) == request


@pytest.mark.parametrize(
    "kind",
    [
        errors.BuildError,
        errors.BuilderCrashError,
        errors.BuilderKilledError,
        errors.ModelChangedError,
        errors.ModelError,
        errors.NoDeviceError,
        errors.OptionError,
        errors.ProfileError,
        errors.StoreError,
        errors.TargetError,
        errors.ToolchainError,
        errors.UnsupportedOptionError,
    ],
)
def test_error_comes_out_as_its_own_class(tmp_path, kind):
    error = decode_error(json.loads(json.dumps(encode_error(kind("what", "fix")))), tmp_path / "log")
    assert type(error) is kind
    assert (error.what, error.fix) == ("what", "fix")
    if isinstance(error, errors.BuildError):
        assert error.log_path == str(tmp_path / "log")


def test_line_cannot_name_another_class(tmp_path):
    record = {"event": "error", "class": "SystemExit", "what": "what", "fix": ""}
    assert type(decode_error(record, tmp_path)) is errors.EngineCacheError
