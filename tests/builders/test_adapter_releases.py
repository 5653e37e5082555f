"""The adapter over the API lists of five releases; only RTX 1.7.1 and the 11.4 bindings can also run here for real."""

from __future__ import annotations

import itertools
from dataclasses import replace

import builder_models as models
import pytest
from listed_api import ALWAYS_ASKED, RELEASES, STATIC, Script, a_request, is_rtx, run

from enginecache.errors import BuildError, NoDeviceError, ProfileError, TargetError
from enginecache.host.targets import ComputeCapability, Target
from enginecache.host.toolchain import PORTABLE_COMPUTE_CAPABILITIES as PORTABLE
from enginecache.key.options import BuildOptions
from enginecache.model import ModelSource

NETWORK_INPUTS = [("s", (2,), True), ("x", (-1, 4), False)]
SHAPES = models.profile(x=((1, 4), (4, 4), (8, 4)))
VALUES = models.profile(x=((1, 4), (4, 4), (8, 4)), s=((1, 1), (2, 8), (8, 32), "values"))


MATRIX = list(
    itertools.product(
        RELEASES,
        ("path", "bytes"),
        (BuildOptions(), BuildOptions(workspace_bytes=1 << 30, optimization_level=5)),
        ((), (SHAPES,), (VALUES, VALUES)),
    )
)


@pytest.mark.parametrize(("release", "kind", "options", "profiles"), MATRIX)
def test_whole_matrix_builds_with_the_names_that_the_release_has(tmp_path, release, kind, options, profiles):
    source = ModelSource.of(b"onnx", base_dir=tmp_path) if kind == "bytes" else ModelSource.of(tmp_path / "model.onnx")
    inputs = {0: STATIC, 1: NETWORK_INPUTS[1:], 2: NETWORK_INPUTS}[len(profiles)]
    script, reports = Script(inputs=inputs), []
    request = a_request(tmp_path, release, source=source, options=options, profiles=profiles)

    plan = run(release, request, script, reports)

    assert bytes(memoryview(plan.memory)) == b"vtrt plan"
    assert plan.reach.compute_capabilities == (ComputeCapability(8, 9),)
    if kind == "bytes":
        assert script.arguments("OnnxParser.parse") == [(b"onnx", str(tmp_path / "model.onnx"))]
    else:
        assert script.arguments("OnnxParser.parse_from_file") == [(str(tmp_path / "model.onnx"),)]
    assert script.arguments("IBuilderConfig.builder_optimization_level") == [(options.optimization_level,)]
    limit = [(0, options.workspace_bytes)] if options.workspace_bytes else []
    assert script.arguments("IBuilderConfig.set_memory_pool_limit") == limit
    assert len(script.arguments("IBuilderConfig.add_optimization_profile")) == len(profiles)
    assert len(script.arguments("IOptimizationProfile.set_shape_input")) == sum(p is VALUES for p in profiles)
    assert "IBuilderConfig.max_workspace_size" not in script.names()
    # The features that differ, each asked for before it is used.
    has_monitor = release != "tensorrt-8.6.1"
    assert ("IBuilderConfig.progress_monitor" in script.names()) is has_monitor
    assert bool(reports) is has_monitor
    assert script.absent == ALWAYS_ASKED[release]


@pytest.mark.parametrize("release", RELEASES)
def test_explicit_batch_is_set_where_the_release_has_it(tmp_path, release):
    script = Script(inputs=STATIC)
    run(release, a_request(tmp_path, release), script)
    has_flag = release in {"tensorrt-8.6.1", "tensorrt-10.0.1", "tensorrt-10.16.1.11"}
    assert script.arguments("Builder.create_network") == [(1 if has_flag else 0,)]


def test_targets_of_rtx_are_set_in_order(tmp_path):
    release, script = "tensorrt_rtx-1.7.1.116", Script(inputs=STATIC)
    plan = run(release, a_request(tmp_path, release, target=Target.parse(("sm_89", "8.0"))), script)
    assert script.arguments("IBuilderConfig.num_compute_capabilities") == [(2,)]
    assert [(int(member), index) for member, index in script.arguments("IBuilderConfig.set_compute_capability")] == [
        (80, 0),
        (89, 1),
    ]
    assert plan.reach.compute_capabilities == (ComputeCapability(8, 0), ComputeCapability(8, 9))


def test_portable_target_sets_no_compute_capability(tmp_path):
    release, script = "tensorrt_rtx-1.7.1.116", Script(inputs=STATIC)
    plan = run(release, a_request(tmp_path, release, target=Target(())), script)
    assert plan.reach.compute_capabilities == PORTABLE
    assert not script.names() & {"IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}


@pytest.mark.parametrize("release", RELEASES[:4])
def test_tensorrt_builds_for_its_own_device_alone(tmp_path, release):
    script = Script(inputs=STATIC)
    with pytest.raises(TargetError, match=r"NVIDIA L4, 8\.9"):
        run(release, a_request(tmp_path, release, target=Target.parse(("9.0",))), script)
    with pytest.raises(NoDeviceError):
        run(release, a_request(tmp_path, release, device=None), script)
    assert "OnnxParser.parse_from_file" not in script.names()  # said before the model is read


@pytest.mark.parametrize("release", RELEASES)
def test_parser_errors_name_the_node_in_every_release(tmp_path, release):
    error = {
        "node": lambda: 7,
        "desc": lambda: "something is wrong",
        "node_name": lambda: "conv1",
        "node_operator": lambda: "Conv",
    }
    text = 'ModelImporter.cpp:140: While parsing node number 7 [Conv -> "y"]:'
    script = Script(inputs=STATIC, parser_errors=[error], logged=[("ERROR", text), ("VERBOSE", "noise")])
    with pytest.raises(BuildError) as caught:
        run(release, a_request(tmp_path, release), script)
    place = "node number 7 (Conv)" if release == "tensorrt-8.6.1" else "node 'conv1' (Conv)"
    assert f"{place}: something is wrong" in caught.value.what


@pytest.mark.parametrize("release", RELEASES)
def test_no_plan_is_a_build_error_in_every_release(tmp_path, release):
    script = Script(inputs=STATIC, plan=None, logged=[("ERROR", "the reason")])
    with pytest.raises(BuildError, match="the reason"):
        run(release, a_request(tmp_path, release), script)


@pytest.mark.parametrize("release", RELEASES)
def test_missing_values_are_a_profile_error_before_the_build(tmp_path, release):
    script = Script(inputs=NETWORK_INPUTS)
    with pytest.raises(ProfileError) as caught:
        run(release, a_request(tmp_path, release, profiles=(SHAPES,)), script)
    flags = "--min-shapes s:MINxMIN,x:1x4 --opt-shapes s:OPTxOPT,x:4x4 --max-shapes s:MAXxMAX,x:8x4"
    assert flags in caught.value.fix
    assert "Builder.build_serialized_network" not in script.names()


def test_option_without_effect_is_a_warning(tmp_path):
    for release in RELEASES:
        options = BuildOptions(optimization_level=5)
        plan = run(release, a_request(tmp_path, release, options=options), Script(inputs=STATIC))
        expected = ("TensorRT-RTX 1.7.1.116 ignores the optimization level",) if is_rtx(release) else ()
        assert plan.warnings == expected


@pytest.mark.parametrize("release", RELEASES)
def test_standard_plugins_are_registered_before_the_model_is_read(tmp_path, release):
    script = Script(inputs=STATIC)
    run(release, a_request(tmp_path, release), script)
    names = [name for name, _ in script.calls]
    assert names.index("module.init_libnvinfer_plugins") < names.index("OnnxParser.parse_from_file")


def test_path_that_is_not_utf8_goes_as_bytes(tmp_path):
    release, script = RELEASES[0], Script(inputs=STATIC)
    request = a_request(tmp_path, release)
    run(release, replace(request, source=ModelSource.of("/models/\udce9.onnx")), script)
    assert script.arguments("OnnxParser.parse_from_file") == [(b"/models/\xe9.onnx",)]
