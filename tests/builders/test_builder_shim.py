"""The `tensorrt` flavour, over the genuine 11.4 bindings: see :mod:`trt_shim`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import builder_models as models
import pytest

from enginecache.errors import (
    BuildError,
    NoDeviceError,
    ProfileError,
    TargetError,
    ToolchainError,
    UnsupportedOptionError,
)
from enginecache.files.digest import digest_of
from enginecache.host.targets import ComputeCapability, Reach, Target
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.trt.build import process as child
from enginecache.trt.child import child_environment

pytestmark = pytest.mark.rtx


def a_request(tmp_path, *arguments, **changes):
    return models.request_for(tmp_path, *arguments, **{"toolchain": models.TRT, "device": models.ADA, **changes})


def test_tensorrt_builds_for_its_device(tmp_path, shim_builder):
    request, events = a_request(tmp_path), []
    plan = shim_builder.build(request, events.append)
    assert plan.plan_path.stat().st_size > 1_000_000
    assert plan.loaded_version == "11.4.0.106"
    assert plan.reach.compute_capabilities == (ComputeCapability(8, 9),)
    assert ("Building engine", 1) in [(event.phase, event.step) for event in events]
    assert "[I] tensorrt 11.4.0.106, library 11.4.0.106" in request.log_path.read_text()
    assert "tensorrt" not in sys.modules


def test_options_and_profiles_reach_tensorrt(tmp_path, shim_builder):
    options = BuildOptions(workspace_bytes=1 << 30, optimization_level=1)
    plan = shim_builder.build(a_request(tmp_path, models.conv_model(), profiles=models.BATCHES, options=options))
    assert plan.plan_path.exists()
    assert plan.warnings == ()  # the level is ignored by TensorRT-RTX alone


def test_chosen_device_is_the_only_one_that_the_child_sees(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    environment = child_environment(a_request(tmp_path).device)
    assert environment["CUDA_VISIBLE_DEVICES"] == models.ADA.uuid
    rtx = child_environment(models.request_for(tmp_path).device)
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


# The options, each for real: it builds, or TensorRT itself says why not.

FROBNICATE = Path(__file__).parent / "data" / "frobnicate.cpp"
AMPERE_PLUS = Target((ComputeCapability(8, 0),), and_later=True)


def build(shim_builder, tmp_path, model=None, **changes):
    return shim_builder.build(a_request(tmp_path, model or models.conv_model(1), **changes))


def refusal(shim_builder, tmp_path, **options):
    with pytest.raises(UnsupportedOptionError) as caught:
        build(shim_builder, tmp_path, options=BuildOptions(**options))
    return caught.value


def test_options_that_need_no_gpu_build(tmp_path, shim_builder):
    options = BuildOptions(
        workspace_bytes=1 << 30,
        optimization_level=5,
        precision=("fp16",),  # a builder without such flags: the graph has it
        version_compatible=True,
        builder_flags=("EXCLUDE_LEAN_RUNTIME", "SPARSE_WEIGHTS", "TF32=OFF", "WEIGHT_STREAMING"),
    )
    plan = build(shim_builder, tmp_path, options=options)
    assert plan.plan_path.stat().st_size > 10_000
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("level", "target", "reach"),
    [
        ("same_compute_capability", models.SM89, Reach((ComputeCapability(8, 9),))),
        ("ampere_plus", AMPERE_PLUS, Reach((ComputeCapability(8, 0),), and_later=True)),
    ],
)
def test_compatibility_level_reaches_tensorrt(tmp_path, shim_builder, level, target, reach):
    plan = build(shim_builder, tmp_path, options=BuildOptions(hardware_compatibility=level), target=target)
    assert plan.reach == reach
    # TensorRT-RTX under the bindings: what it has to say is passed on.
    assert plan.warnings == ("setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX",)


def test_version_compatible_plan_needs_the_lean_runtime(tmp_path, shim_builder):
    error = refusal(shim_builder, tmp_path, version_compatible=True)
    assert "Unable to load library: libnvinfer_lean.so.1" in error.what
    assert "--builder-flag EXCLUDE_LEAN_RUNTIME" in error.fix


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"strip_plan": True}, "--strip-plan"),
        ({"builder_flags": ("REFIT",)}, "--builder-flag REFIT"),
    ],
)
def test_plan_for_refitting_needs_a_gpu(tmp_path, shim_builder, options, asked):
    error = refusal(shim_builder, tmp_path, **options)
    assert f"calls CUDA while it builds a plan with {asked}, and that failed: MyelinCheckException" in error.what
    assert f"or leave {asked} out" in error.fix


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("EXCLUDE_LEAN_RUNTIME",), "kEXCLUDE_LEAN_RUNTIME can only be set if kVERSION_COMPATIBLE is set"),
        (("REFIT", "REFIT_IDENTICAL"), "kREFIT, kREFIT_INDIVIDUAL and kREFIT_IDENTICAL are mutually exclusive"),
    ],
)
def test_flags_that_tensorrt_drops_are_an_error_in_its_words(tmp_path, shim_builder, flags, words):
    error = refusal(shim_builder, tmp_path, builder_flags=flags)
    assert f"does not take the builder flag {flags[0]}: " in error.what
    assert words in error.what


@pytest.fixture(scope="session")
def plugin_of(tmp_path_factory):
    """Compiles the plugin Frobnicate, and gives its library; arguments are definitions."""
    if shutil.which("g++") is None:
        pytest.skip("probe: no g++")

    def compiled(*defines, source=FROBNICATE):
        path = tmp_path_factory.mktemp("plugin") / "libfrobnicate.so"
        flags = [f"-D{define}" for define in defines]
        subprocess.run(["g++", "-O1", "-shared", "-fPIC", *flags, "-o", path, "-x", "c++", source], check=True)
        return PluginLibrary(path, digest_of(path.read_bytes()))

    return compiled


@pytest.fixture
def parser_library(tmp_path, monkeypatch):
    """TensorRT-RTX's library by the name that its parser opens it by; its own package lacks that."""
    libraries = Path(importlib.util.find_spec("tensorrt_rtx_libs").origin).parent
    folder = tmp_path / "rtx"
    folder.mkdir()
    (folder / "libtensorrt_rtx.so").symlink_to(libraries / "libtensorrt_rtx.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))


@pytest.mark.parametrize("defines", [(), ("SELF_REGISTERING",)])
def test_operator_of_a_plugin_library_builds(tmp_path, shim_builder, plugin_of, parser_library, defines):
    options = BuildOptions(plugins=(plugin_of(*defines),))
    plan = build(shim_builder, tmp_path, models.unknown_operator_model(), options=options)
    assert plan.plan_path.stat().st_size > 10_000


def test_operator_of_a_plugin_library_builds_with_tensorrt_rtx(tmp_path, builder, plugin_of):
    options = BuildOptions(plugins=(plugin_of(),))
    plan = builder.build(models.request_for(tmp_path, models.unknown_operator_model(), options=options))
    assert plan.plan_path.stat().st_size > 10_000


def test_tensorrt_rtx_without_the_name_that_its_parser_opens_says_how_to_give_it(
    tmp_path, builder, plugin_of, monkeypatch
):
    monkeypatch.setattr(child, "find_spec", lambda _: None)  # no package, but NVIDIA's archive
    options = BuildOptions(plugins=(plugin_of(),))
    with pytest.raises(UnsupportedOptionError, match=r"opens libtensorrt_rtx\.so to make a plugin") as caught:
        builder.build(models.request_for(tmp_path, models.unknown_operator_model(), options=options))
    assert "tensorrt_rtx_libs/libtensorrt_rtx.so.1 DIR/libtensorrt_rtx.so" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "SymbolAddress for getCreators could not be loaded"),
        (b"no library", "Unable to load library: libfrobnicate.so: file too short"),
    ],
)
def test_library_without_plugins_is_refused_in_tensorrt_words(tmp_path, shim_builder, plugin_of, content, words):
    plugin = plugin_of(source=os.devnull)
    if content is not None:
        plugin.path.write_bytes(content)
        plugin = PluginLibrary(plugin.path, digest_of(content))
    with pytest.raises(BuildError, match=r"does not take the plugin library .*libfrobnicate\.so") as caught:
        build(shim_builder, tmp_path, options=BuildOptions(plugins=(plugin,)))
    assert words in caught.value.what
    assert "/proc/self/fd" not in str(caught.value)


def test_missing_plugin_is_named_with_the_option_that_names_its_library(tmp_path, shim_builder):
    with pytest.raises(BuildError, match="Plugin not found") as caught:
        build(shim_builder, tmp_path, models.unknown_operator_model())
    assert "If the plugin Frobnicate is in a library of plugins, name that: --plugin FILE" in caught.value.fix


def test_timing_cache_comes_back_and_damage_is_an_empty_one(tmp_path, shim_builder):
    # TensorRT-RTX's timing caches hold no timings, 172 bytes of header; and without a driver it reads none back.
    first = build(shim_builder, tmp_path, timing_cache=b"")
    assert first.timing_cache.startswith(b"ptrt")
    assert first.warnings == ()
    second = build(shim_builder, tmp_path, timing_cache=b"rubbish")
    assert second.timing_cache == first.timing_cache
    (warning,) = second.warnings
    assert "TensorRT 11.4.0.106 does not take the timing cache, and began with an empty one: " in warning
    assert "Failed to deserialize timing cache" in warning
