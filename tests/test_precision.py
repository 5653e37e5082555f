"""Precisions on each release: how they are enabled, and the errors if one is not available."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from importlib import metadata

import pytest
from models import linear

from enginecache.errors import OptionError, UnsupportedOptionError
from enginecache.host.targets import ComputeCapability, Target
from enginecache.host.toolchain import Toolchain
from enginecache.key import precision
from enginecache.key.key import EngineKey
from enginecache.key.options import BuildOptions
from enginecache.key.precision import Conversion, is_strongly_typed, plan_conversion
from enginecache.model import ModelIdentity, ModelSource, identify


def toolchain(release):
    flavour, _, version = release.rpartition(" ")
    return Toolchain(flavour, version, 13, "linux", "x86_64")


FLAGS = [toolchain(f"tensorrt {version}") for version in ("8.6.1", "10.0.1", "10.16.1.11")]
TYPED = [toolchain(release) for release in ("tensorrt 11.4.0.106", "tensorrt-rtx 1.7.1.116", "tensorrt-rtx 1.0.0.21")]
RTX = TYPED[1]


def model(*quantization):
    return ModelIdentity("0" * 64, "1" * 64, "2" * 64, (), (), is_settled=True, quantization=quantization)


def plan(*names, on=RTX, identity=None, **fields):
    return plan_conversion(BuildOptions(precision=names, **fields), on, identity or model())


def refusal(kind, *names, **arguments):
    with pytest.raises(kind) as caught:
        plan(*names, **arguments)
    assert caught.value.fix
    return caught.value


def test_releases_are_told_apart_by_flavour_and_major_version():
    assert [is_strongly_typed(release) for release in FLAGS] == [False] * 3
    assert [is_strongly_typed(release) for release in TYPED] == [True] * 3


@pytest.mark.parametrize("release", [*FLAGS, *TYPED], ids=str)
def test_no_precision_needs_no_conversion(release):
    assert plan(on=release) is None
    assert plan(on=release, identity=model("int8")) is None


@pytest.mark.parametrize("release", FLAGS, ids=str)
def test_release_with_builder_flags_needs_no_conversion(release):
    assert plan("fp16", "bf16", on=release) is None
    assert plan("fp16", "int8", "fp8", on=release, identity=model("fp8", "int8")) is None


@pytest.mark.parametrize("release", TYPED, ids=str)
def test_fp16_is_a_conversion_on_strongly_typed_releases(release):
    found = plan("fp16", on=release)
    wanted = metadata.version("onnxconverter-common"), metadata.version("onnx")
    assert found == Conversion("fp16", "onnxconverter-common", *wanted, keeps_io=True)
    assert plan("fp16", on=release, convert_io=True) == replace(found, keeps_io=False)
    assert found.fields() == {
        "precision": "fp16",
        "converter": "onnxconverter-common",
        "version": wanted[0],
        "onnx_version": wanted[1],
        "keeps_io": True,
    }


def test_every_part_of_a_conversion_is_in_the_key():
    def digest(conversion):
        target = Target((ComputeCapability(8, 9),))
        return EngineKey.of(model(), (), BuildOptions(precision=("fp16",)), RTX, target, conversion).digest

    conversions = [
        None,
        Conversion("fp16", "a", "1", "2", keeps_io=True),
        Conversion("bf16", "a", "1", "2", keeps_io=True),
        Conversion("fp16", "b", "1", "2", keeps_io=True),
        Conversion("fp16", "a", "2", "2", keeps_io=True),
        Conversion("fp16", "a", "1", "3", keeps_io=True),
        Conversion("fp16", "a", "1", "2", keeps_io=False),
    ]
    assert len({digest(conversion) for conversion in conversions}) == len(conversions)


def test_bf16_without_modelopt_names_the_extra_and_fp16():
    if importlib.util.find_spec("modelopt") is not None:
        pytest.skip("probe: modelopt is installed")
    error = refusal(UnsupportedOptionError, "bf16")
    assert error.exit_code == 8
    assert "tensorrt-rtx 1.7.1.116 has no builder flag for bf16" in error.what
    assert "nvidia-modelopt, which would convert the graph to bf16, is not installed" in error.what
    assert "pip install 'nvidia-modelopt[onnx]'" in error.fix
    assert "use --fp16, whose converter is installed" in error.fix


def test_fp16_without_its_converter_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(precision.CONVERTERS, "fp16", ("no-such-converter", "pip install no-such-converter"))
    error = refusal(UnsupportedOptionError, "fp16")
    assert "no-such-converter, which would convert the graph to fp16, is not installed" in error.what
    assert "pip install no-such-converter" in error.fix
    assert "--fp16" not in error.fix


def test_fp16_and_bf16_contradict_each_other_where_the_graph_has_the_types():
    assert "--fp16 and --bf16 together" in refusal(OptionError, "fp16", "bf16").what


@pytest.mark.parametrize("release", [FLAGS[0], FLAGS[2], *TYPED], ids=str)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantized_precision_needs_nodes_of_its_type(release, name):
    error = refusal(OptionError, name, on=release)
    assert error.exit_code == 2
    assert f"no QuantizeLinear and DequantizeLinear nodes of {name}; there is no calibration" in error.what
    assert f"--quantize_mode {name}" in error.fix
    assert ("quantize_static" in error.fix) is (name == "int8")
    other = "fp8" if name == "int8" else "int8"
    assert (
        f"its Q/DQ nodes are of {other}, uint8"
        in refusal(OptionError, name, on=release, identity=model(other, "uint8")).what
    )
    assert plan(name, on=release, identity=model(name)) is None


def test_quantized_graph_is_still_converted_for_fp16():
    assert plan("fp16", "int8", identity=model("int8")) == plan("fp16")


def test_convert_io_without_a_conversion_is_refused():
    assert "takes precisions as builder flags" in refusal(OptionError, "fp16", on=FLAGS[2], convert_io=True).what
    assert "for --fp16 and --bf16 alone" in refusal(OptionError, convert_io=True).what
    assert refusal(OptionError, "int8", identity=model("int8"), convert_io=True).fix.startswith("Add --fp16")


def test_identity_of_a_real_model_without_nodes_of_int8_is_refused():
    identity = identify(ModelSource.of(linear().SerializeToString()))
    assert "no calibration here" in refusal(OptionError, "int8", identity=identity).what
