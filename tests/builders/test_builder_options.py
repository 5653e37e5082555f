"""Every option on every release, over the API lists; and what of it TensorRT does not take."""

from __future__ import annotations

import builder_models as models
import pytest
from listed_api import ALWAYS_ASKED, RELEASES, STATIC, Script, a_request, is_rtx, run

from enginecache.errors import BuildError, OptionError, TargetError, UnsupportedOptionError
from enginecache.files.digest import digest_of
from enginecache.host.targets import ComputeCapability, Reach, Target
from enginecache.key.options import BuildOptions, PluginLibrary

V8, V10_0, V10_16, V11, RTX = RELEASES
AMPERE_PLUS = Target((ComputeCapability(8, 0),), and_later=True)

FLAGS = {
    # options: flags that are set, releases that have none of them and take the type from the graph, that refuse
    "fp16": (BuildOptions(precision=("fp16",)), {"FP16"}, {V11, RTX}, set()),
    "bf16": (BuildOptions(precision=("bf16",)), {"BF16"}, {V11, RTX}, {V8}),
    "int8": (BuildOptions(precision=("int8",)), {"INT8"}, {V11, RTX}, set()),
    "fp8": (BuildOptions(precision=("fp8",)), {"FP8"}, {V11, RTX}, set()),
    "two": (BuildOptions(precision=("fp16", "int8")), {"FP16", "INT8"}, {V11, RTX}, set()),
    "version": (BuildOptions(version_compatible=True), {"VERSION_COMPATIBLE"}, set(), {RTX}),
    "strip": (BuildOptions(strip_plan=True), {"STRIP_PLAN"}, set(), {V8}),
    "refit": (BuildOptions(builder_flags=("REFIT",)), {"REFIT"}, set(), set()),
    "identical": (BuildOptions(builder_flags=("REFIT_IDENTICAL",)), {"REFIT_IDENTICAL"}, set(), {V8}),
    "nans": (BuildOptions(builder_flags=("STRICT_NANS",)), {"STRICT_NANS"}, set(), {V8, V10_0}),
    "heuristic": (
        BuildOptions(builder_flags=("ENABLE_TACTIC_HEURISTIC",)),
        {"ENABLE_TACTIC_HEURISTIC"},
        set(),
        {V10_0, V10_16, V11, RTX},
    ),
    "allocation": (
        BuildOptions(builder_flags=("REQUIRE_USER_ALLOCATION",)),
        {"REQUIRE_USER_ALLOCATION"},
        set(),
        {V8, V10_0, V10_16, V11},
    ),
    "nonsense": (BuildOptions(builder_flags=("NONSENSE",)), set(), set(), set(RELEASES)),
    "off": (BuildOptions(builder_flags=("DEBUG", "NONSENSE=OFF")), set(), set(), set(RELEASES)),
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", FLAGS)
def test_flag_is_set_where_the_release_has_it_and_refused_elsewhere(tmp_path, release, name):
    options, flags, converted, refusing = FLAGS[name]
    script = Script(inputs=STATIC)
    request = a_request(tmp_path, release, options=options)

    if release in refusing:
        with pytest.raises(UnsupportedOptionError) as caught:
            run(release, request, script)
        assert caught.value.exit_code == 8
        assert caught.value.fix
        assert "OnnxParser.parse_from_file" not in script.names()  # said before the model is read
        assert not script.flags()
    else:
        assert run(release, request, script).warnings == ()
        assert script.flags() == (set() if release in converted else flags)

    missing = script.absent - ALWAYS_ASKED[release]
    assert missing <= {f"BuilderFlag.{flag}" for flag in ("NONSENSE", *flags)}
    # TensorRT-RTX's refusals by the table come before anything is asked of it.
    is_by_table = is_rtx(release) and name == "version"
    assert bool(missing) is (release in refusing and not is_by_table)


@pytest.mark.parametrize("release", RELEASES)
def test_flag_that_is_set_by_default_can_be_cleared(tmp_path, release):
    script = Script(inputs=STATIC)
    run(release, a_request(tmp_path, release, options=BuildOptions(builder_flags=("TF32=OFF",))), script)
    assert script.flags("clear_flag") == {"TF32"}
    assert not script.flags()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("level", "lacking"),
    [("none", set()), ("same_compute_capability", {V8, V10_0, RTX}), ("ampere_plus", {RTX})],
)
def test_compatibility_level_is_set_where_the_release_has_it(tmp_path, release, level, lacking):
    script = Script(inputs=STATIC)
    target = AMPERE_PLUS if level == "ampere_plus" and not is_rtx(release) else models.SM89
    request = a_request(tmp_path, release, options=BuildOptions(hardware_compatibility=level), target=target)
    if release in lacking:
        with pytest.raises(UnsupportedOptionError) as caught:
            run(release, request, script)
        assert "--target" in caught.value.fix if is_rtx(release) else "TensorRT 10.9" in caught.value.fix
    else:
        assert run(release, request, script).reach == Reach(target.compute_capabilities, target.and_later)
        levels = [value.name for (value,) in script.arguments("IBuilderConfig.hardware_compatibility_level")]
        assert levels == ([] if level == "none" else [level.upper()])
    asked = {"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"} if release in lacking - {RTX} else set()
    assert script.absent - ALWAYS_ASKED[release] == asked


def test_device_below_the_level_is_refused_with_what_it_needs(tmp_path):
    request = a_request(
        tmp_path,
        V10_16,
        options=BuildOptions(hardware_compatibility="ampere_plus"),
        target=AMPERE_PLUS,
        device=models.TURING,
    )
    with pytest.raises(TargetError, match=r"Tesla T4, 7\.5\), not for sm_80 and later") as caught:
        run(V10_16, request, Script(inputs=STATIC))
    assert "compute capability 8.0 or later" in caught.value.fix


@pytest.mark.parametrize("release", RELEASES)
def test_precision_that_the_gpu_gains_nothing_by_is_left_out_and_said(tmp_path, release):
    script = Script(inputs=STATIC, fast=False)
    precision = ("fp16", "int8", "fp8")
    plan = run(release, a_request(tmp_path, release, options=BuildOptions(precision=precision)), script)
    if release in {V11, RTX}:
        assert not plan.warnings
        return
    assert plan.warnings == (
        "this GPU has no fast FP16: FP16 was left out",
        "this GPU has no fast INT8: INT8 was left out",
    )
    assert script.flags() == {"FP8"}


def test_refusal_of_a_precision_names_what_has_it(tmp_path):
    with pytest.raises(UnsupportedOptionError) as caught:
        run(V8, a_request(tmp_path, V8, options=BuildOptions(precision=("bf16",))), Script(inputs=STATIC))
    assert caught.value.what == "TensorRT 8.6.1 cannot compute in BF16: it has no such builder flag"
    assert caught.value.fix == "TensorRT 10 has it. This release has --fp16 or --int8 or --fp8."


def test_refusal_of_a_flag_lists_those_that_the_release_has(tmp_path):
    options = BuildOptions(builder_flags=("NONSENSE",))
    with pytest.raises(UnsupportedOptionError) as caught:
        run(V11, a_request(tmp_path, V11, options=options), Script(inputs=STATIC))
    assert caught.value.what == "TensorRT 11.4.0.106 has no builder flag NONSENSE"
    assert "REFIT_IDENTICAL, REFIT_INDIVIDUAL, SAFETY_SCOPE, SPARSE_WEIGHTS" in caught.value.fix
    assert "name" not in caught.value.fix


@pytest.mark.parametrize("release", RELEASES)
def test_flag_that_tensorrt_does_not_take_is_an_error_in_its_words(tmp_path, release):
    script = Script(inputs=STATIC, refusals={"EXCLUDE_LEAN_RUNTIME": "kEXCLUDE_LEAN_RUNTIME needs another"})
    request = a_request(tmp_path, release, options=BuildOptions(builder_flags=("EXCLUDE_LEAN_RUNTIME",)))
    with pytest.raises(UnsupportedOptionError, match="flag EXCLUDE_LEAN_RUNTIME: kEXCLUDE_LEAN_RUNTIME needs another"):
        run(release, request, script)


@pytest.mark.parametrize("release", RELEASES[:4])
def test_level_that_tensorrt_does_not_take_is_an_error_in_its_words(tmp_path, release):
    script = Script(inputs=STATIC, refusals={"hardware_compatibility_level": "not on this GPU"})
    options = BuildOptions(hardware_compatibility="ampere_plus")
    with pytest.raises(UnsupportedOptionError, match="compatibility level AMPERE_PLUS: not on this GPU"):
        run(release, a_request(tmp_path, release, options=options, target=AMPERE_PLUS), script)


def library(tmp_path, content=b"a library"):
    path = tmp_path / "libplugin.so"
    path.write_bytes(content)
    return PluginLibrary(path, digest_of(content))


@pytest.fixture
def rtx_library(monkeypatch):
    """Provide TensorRT-RTX's own library under the name that its parser wants, as far as the adapter can see."""
    monkeypatch.setattr("enginecache.trt.build.plugins.RTX_LIBRARY", None)


@pytest.mark.parametrize("release", RELEASES)
def test_plugin_library_is_loaded_before_the_model_is_read(tmp_path, release, rtx_library):
    script = Script(inputs=STATIC)
    run(release, a_request(tmp_path, release, options=BuildOptions(plugins=(library(tmp_path),))), script)
    names = [name for name, _ in script.calls]
    assert names.index("IPluginRegistry.load_library") < names.index("OnnxParser.parse_from_file")
    ((path,),) = script.arguments("IPluginRegistry.load_library")
    assert path.startswith("/proc/self/fd/")
    with open(path, "rb") as file:  # noqa: PTH123  # the open file, whatever its name is by now
        assert file.read() == b"a library"
    assert script.absent - ALWAYS_ASKED[release] == ({"IPluginRegistry.all_creators"} if release == V8 else set())


@pytest.mark.parametrize("release", RELEASES)
def test_plugin_library_that_tensorrt_refuses_is_an_error_in_its_words(tmp_path, release, rtx_library):
    script = Script(inputs=STATIC, refusals={"library": "no creators in it"})
    request = a_request(tmp_path, release, options=BuildOptions(plugins=(library(tmp_path),)))
    with pytest.raises(BuildError, match=r"plugin library .*/libplugin\.so: no creators in it"):
        run(release, request, script)
    assert "OnnxParser.parse_from_file" not in script.names()


def test_plugin_library_other_than_the_key_names_is_not_loaded(tmp_path):
    plugin = library(tmp_path)
    for change in (lambda: plugin.path.write_bytes(b"another one"), plugin.path.unlink):
        change()
        script = Script(inputs=STATIC)
        with pytest.raises(OptionError, match=r"libplugin\.so (?:changed|cannot be read)"):
            run(V10_16, a_request(tmp_path, V10_16, options=BuildOptions(plugins=(plugin,))), script)
        assert "IPluginRegistry.load_library" not in script.names()


@pytest.mark.parametrize("release", RELEASES)
def test_build_without_a_timing_cache_touches_none(tmp_path, release):
    script = Script(inputs=STATIC)
    assert run(release, a_request(tmp_path, release), script).timing_cache is None
    assert not [name for name in script.names() if "timing" in name]


@pytest.mark.parametrize("release", RELEASES[:4])
@pytest.mark.parametrize(("given", "after"), [(b"", b"empty"), (b"timings", b"timings")])
def test_timing_cache_is_given_to_the_build_and_taken_from_it(tmp_path, release, given, after):
    script = Script(inputs=STATIC)
    plan = run(release, a_request(tmp_path, release, timing_cache=given), script)
    assert plan.timing_cache == after
    assert plan.warnings == ()
    ((_, mismatch),) = script.arguments("IBuilderConfig.set_timing_cache")
    assert mismatch == ("ignore_mismatch", False)


@pytest.mark.parametrize("release", RELEASES[:4])
@pytest.mark.parametrize("trouble", ["null", "damaged", "foreign"])
def test_timing_cache_that_is_not_taken_is_said_once_and_replaced_by_an_empty_one(tmp_path, release, trouble):
    refusals = {f"{trouble} timing cache": "it is of another GPU"}
    plan = run(release, a_request(tmp_path, release, timing_cache=b"timings"), Script(inputs=STATIC, refusals=refusals))
    assert plan.timing_cache == b"empty"
    (warning,) = plan.warnings
    assert warning.endswith("does not take the timing cache, and began with an empty one: it is of another GPU")


def test_refused_timing_cache_is_not_why_a_build_fails_later(tmp_path):
    refusals = {"null timing cache": "it is of another GPU"}
    script = Script(inputs=STATIC, refusals=refusals, plan=None, logged=[("ERROR", "the reason")])
    with pytest.raises(BuildError, match="the reason"):
        run(V10_16, a_request(tmp_path, V10_16, timing_cache=b"timings"), script)
