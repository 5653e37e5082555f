"""Variables of the environment: which are let through to a builder, and which of those are in the key."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from fakes import SM_89, TOOLCHAIN, FakeBuilder, fake_cache
from models import linear, save

from enginecache import environment
from enginecache.config import Config
from enginecache.environment import KEYED, PASSED, REMOVED, REPLACED, RULES, UNUSED
from enginecache.errors import ConfigError, EngineCacheError
from enginecache.host.targets import Target
from enginecache.key.options import BuildOptions
from enginecache.model import ModelSource, identify
from enginecache.pipeline.request import Request
from enginecache.trt.build.process import ProcessBuilder
from enginecache.trt.build.request import BuildRequest

ROOT = Path(__file__).parents[1]
PATTERNS = [pattern for pattern, _, _, _ in RULES]


def a_name_of(pattern: str) -> str:
    """A variable for which this rule counts, and none before it."""
    for middle in ("QQ", "77", "Z_Z"):
        name = pattern.replace("*", middle)
        if environment._rule(name) == next((kind, why) for p, kind, why, _ in RULES if p == pattern):
            return name
    raise AssertionError(f"no variable has the rule {pattern}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA_TF32_OVERRIDE", KEYED),
        ("__ANY_SWITCH_NOWUD", KEYED),
        ("CUDNN_OF_THE_FUTURE", KEYED),
        ("CUDNN_VERSION", UNUSED),
        ("LD_LIBRARY_PATH", PASSED),
        ("LD_PRELOAD", REMOVED),
        ("SOMETHING_ELSE", None),
        ("__switch\udcff_NOWUD", None),
    ],
)
def test_a_name_counts_before_a_pattern_and_the_first_pattern_before_others(name, kind):
    assert environment.kind_of(name) == kind


TRACED_ON_A_GPU = """
    CASK_INJECTION64_PATH CASK_LOG_INFO CUBLASLT_DISABLE_CPU_INSTRUCTIONS_MASK CUBLAS_LOGDEST_DBG CUBLAS_LOGINFO_DBG
    CUDA_1826b2cf CUDA_AUTO_BOOST CUDA_CACHE_DISABLE CUDA_CACHE_MAXSIZE CUDA_CACHE_PATH CUDA_DEVICE_MAX_CONNECTIONS
    CUDA_DEVICE_MAX_COPY_CONNECTIONS CUDA_DISABLE_JIT CUDA_DISABLE_PERF_BOOST CUDA_DISABLE_PTX_JIT CUDA_FORCE_JIT
    CUDA_FORCE_PTX_JIT CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING CUDA_SCALE_LAUNCH_QUEUES CUDBG_GET_SESSION_FROM_ENV
    CUTENSOR_DEBUG_VERBOSE_LEVEL FORCE_ENABLE_COOPERATIVE_LAUNCH_PATCH NPY_NUMPY_2_BEHAVIOR NVCL_PLATFORM_VERSION_WAR
    NVCL_USE_SUST_B NVRTC_INTERNAL_GLOBAL_LOCK NV_OPENCL_DISABLE_UNPIN_ON_SYNC NV_OPENCL_DISABLE_UVM
    NV_OPENCL_ENABLE_PINNED_MEMCPY_PATH NV_OPENCL_MAX_PIN_SIZE NV_OPENCL_MIN_PIN_SIZE NV_OPENCL_PIN_THRESHOLD
    NV_PROFILE_FILE_LIMIT NV_PROFILE_SIZE_LIMIT NV_PROFILE_TIMEOUT __CUDA_DISABLE_FORWARD_COMPATIBILITY
    __RM_ENABLE_VERBOSE_OUTPUT __RM_NO_VERSION_CHECK
"""
"""Recorded on an H200 with TensorRT 8.6.0 and driver 580.159.04, 2026-11-30; docs/hardware.md."""


@pytest.mark.parametrize("name", TRACED_ON_A_GPU.split())
def test_every_name_that_was_traced_on_a_gpu_has_a_rule_that_says_so(name):
    rule = environment._rule(name)
    assert rule is not None
    assert any((kind, why) == rule and "traced on a GPU" in source for _, kind, why, source in RULES)


def test_clocks_and_drivers_of_the_gpu_are_part_of_the_key(open_cache, model, monkeypatch):
    cache = open_cache()
    request = Request.of(model, {"dims": {"batch": 4}})
    plain = cache._resolve(request).key.digest
    for name in ("CUDA_AUTO_BOOST", "__CUDA_DISABLE_FORWARD_COMPATIBILITY", "FORCE_ENABLE_COOPERATIVE_LAUNCH_PATCH"):
        monkeypatch.setenv(name, "1")
        assert cache._resolve(request).key.digest != plain, name
        monkeypatch.delenv(name)


def test_variables_of_the_key_are_read_by_name_and_value(open_cache, model, monkeypatch):
    cache = open_cache()

    def key_now():
        return cache._resolve(Request.of(model, {"dims": {"batch": 4}})).key

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


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict[str, str]:
    """The environment of a builder's process whose parent has a variable for every rule, and one that has none."""
    folder = tmp_path_factory.mktemp("started")
    dump = folder / "python3"
    dump.write_text(
        f"#!/bin/sh\n[ -e {folder}/environment ] || cat /proc/$$/environ > {folder}/environment\n", encoding="utf-8"
    )
    dump.chmod(0o755)
    variables = {a_name_of(pattern): f"value {number}" for number, pattern in enumerate(PATTERNS)}
    variables |= {"SOMETHING_ELSE": "1", "ALSO_NAMED": "2", "PATH": os.environ["PATH"]}
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        given = environment.passed(environment.snapshot(), ("ALSO_NAMED",))
        for name in variables:
            patch.setenv(name, "changed since the key was made")
        run_with(dump, folder, given)
    text = (folder / "environment").read_bytes().decode()
    return dict(line.split("=", 1) for line in text.split("\0") if line)


def run_with(python: Path, folder: Path, given: environment.Pairs) -> None:
    source = ModelSource.of(b"", None)
    (folder / "work").mkdir()
    with pytest.raises(EngineCacheError):
        ProcessBuilder(python=str(python)).build(request_for(folder, given, source))


def request_for(folder: Path, given: environment.Pairs, source: ModelSource) -> BuildRequest:

    source = ModelSource.of(linear().SerializeToString(), None)
    return BuildRequest(
        source=source,
        identity=identify(source),
        profiles=(),
        options=BuildOptions(),
        toolchain=TOOLCHAIN,
        target=Target((SM_89,)),
        device=None,
        work_dir=folder / "work",
        log_path=folder / "log",
        environment=given,
    )


@pytest.fixture(scope="module")
def resolving(tmp_path_factory):
    """A cache and a model, for keys alone."""
    folder = tmp_path_factory.mktemp("resolving")
    cache = fake_cache(folder / "cache")
    cache.make()
    yield cache, save(linear(), folder / "model.onnx")
    assert cache.verify(deep=True).is_clean


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_rule_makes_another_key_or_keeps_the_variable_out_or_says_why_it_changes_no_plan(
    pattern, started, resolving, monkeypatch
):
    cache, model = resolving
    name = a_name_of(pattern)
    monkeypatch.delenv(name, raising=False)
    plain = cache._resolve(Request.of(model, {"dims": {"batch": 4}}))
    monkeypatch.setenv(name, "x")
    key = cache._resolve(Request.of(model, {"dims": {"batch": 4}})).key
    kind, why = next((kind, why) for p, kind, why, _ in RULES if p == pattern)
    value = f"value {PATTERNS.index(pattern)}"
    if kind == KEYED:
        assert key.digest != plain.key.digest
        assert key.fields()["environment"] == {name: "x"}
        assert started[name] == value  # of the moment at which the key was made
    else:
        assert key.digest == plain.key.digest
    if kind == PASSED:
        assert why
        assert name == "PATH" or started[name] == value
    elif kind == REPLACED:
        assert started[name] not in {value, "changed since the key was made"}
    elif kind != KEYED:
        assert name not in started


def test_a_variable_without_a_rule_is_not_passed_but_where_the_user_names_it(started):
    assert "SOMETHING_ELSE" not in started
    assert started["ALSO_NAMED"] == "2"


def test_every_rule_can_count_and_has_one_star_at_most():
    assert len(set(PATTERNS)) == len(PATTERNS)
    for pattern, kind, why, source in RULES:
        assert pattern.count("*") <= 1
        assert kind in {PASSED, KEYED, REMOVED, UNUSED, REPLACED}
        assert why, pattern
        assert source, pattern
        assert a_name_of(pattern)


def test_the_builder_is_given_the_values_of_the_key(open_cache, model, monkeypatch):
    builder = FakeBuilder()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("SOMETHING_ELSE", "0")
    open_cache(builder).get(model, dims={"batch": 4})
    given = dict(builder.requests[0].environment)
    assert given["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "SOMETHING_ELSE" not in given


def test_what_is_left_out_is_said_when_it_is_built_and_by_explain(open_cache, model, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/lib/libjemalloc.so")
    cache = open_cache()
    assert "LD_PRELOAD is set and is not passed to the builder" in str(cache.explain(model, dims={"batch": 4}).reasons)
    (warning,) = [reason.text for reason in cache.get(model, dims={"batch": 4}).reasons if reason.code == "warning"]
    assert "add LD_PRELOAD to ENGINECACHE_PASS_ENVIRONMENT" in warning
    named = open_cache(pass_environment=("LD_PRELOAD",))
    entry = named.get(model, dims={"batch": 4})
    assert entry.outcome == "built"
    assert entry.record.fields["environment"] == {"LD_PRELOAD": "/lib/libjemalloc.so"}
    assert not [reason for reason in entry.reasons if reason.code == "warning"]


def test_what_the_user_names_is_part_of_the_key_unless_a_rule_passes_it(open_cache, model, monkeypatch):
    cache = open_cache(pass_environment=("MINE", "TZ"))
    ask = {"dims": {"batch": 4}}
    plain = cache.get(model, **ask)
    monkeypatch.setenv("TZ", "UTC")
    assert cache.get(model, **ask).key == plain.key
    monkeypatch.setenv("MINE", "1")
    mine = cache.get(model, **ask)  # at once, although the hit before is remembered
    assert mine.outcome == "built"
    assert mine.record.fields["environment"] == {"MINE": "1"}
    assert cache.get(model, **ask).key == mine.key
    monkeypatch.setenv("MINE", "2")
    assert cache.get(model, **ask).outcome == "built"


@pytest.mark.parametrize(
    ("text", "names"),
    [("B,A", ("A", "B")), (" A  B\n", ("A", "B")), ("A,,A", ("A",)), ("", ()), (",", ())],
)
def test_names_to_pass_are_read_from_a_text(text, names):
    assert (
        Config.load({"ENGINECACHE_CONFIG": "/dev/null", "ENGINECACHE_PASS_ENVIRONMENT": text}).pass_environment == names
    )


def test_names_to_pass_are_read_from_a_list_in_the_file(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('pass_environment = ["B", "A"]', encoding="utf-8")
    assert Config.load({"ENGINECACHE_CONFIG": str(file)}).pass_environment == ("A", "B")
    assert Config.load({"ENGINECACHE_CONFIG": str(file)}, pass_environment=["C"]).pass_environment == ("C",)


@pytest.mark.parametrize(
    ("text", "why"), [("A-B", "is not the name of an environment variable"), ("PYTHONPATH", "cannot be passed on")]
)
def test_a_name_that_cannot_be_passed_is_refused(text, why):
    with pytest.raises(ConfigError, match=why):
        Config.load({"ENGINECACHE_CONFIG": "/dev/null", "ENGINECACHE_PASS_ENVIRONMENT": text})


def test_timing_caches_are_kept_apart_by_the_variables_of_the_key(tmp_path):
    from dataclasses import replace

    from fakes import H100

    from enginecache.pipeline.timing_caches import TimingCaches
    from enginecache.storage.folder import Root

    root = Root.open(tmp_path / "cache")
    caches = TimingCaches(root)
    tensorrt = replace(TOOLCHAIN, flavour="tensorrt")
    names = [
        caches.slot(tensorrt, H100, BuildOptions(), given)
        for given in ((), (("NVIDIA_TF32_OVERRIDE", "0"),), (("NVIDIA_TF32_OVERRIDE", "1"),))
    ]
    assert len(set(names)) == 3


def test_the_page_of_the_documentation_is_that_of_the_rules():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/make_environment_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    assert module.reference() == written, "run `python docs/make_environment_reference.py`"
